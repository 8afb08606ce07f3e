"""The reverse process: from masks to text in a fixed number of denoiser calls.

Every step decides where before what: the positions come from an order drawn in
advance, only their hidden states pass through the vocabulary projection, and
only they are drawn. One token a step is then an exact sample of the model's
any-order distribution. (Drawing everywhere and keeping the likeliest is an
undeclared temperature: Hayakawa et al. 2025, arXiv 2510.04525.)

A step that re-uses the hidden states of a finished block would replace the
`denoiser.hidden` call in `_step`; nothing else knows how they are computed.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from mdm_jax.core.config import SampleConfig
from mdm_jax.core.sharding import RULES
from mdm_jax.sampling import order, schedule, tokens


@runtime_checkable
class Predictor(Protocol):
  """What is asked of a denoiser: hidden states, and logits of some of them."""

  def hidden(
    self,
    params: Any,
    xt: Int[Array, "B L"],
    segments: Int[Array, "B L"],
    rate: Float[Array, "B"],
  ) -> Float[Array, "B L D"]: ...

  def logits(
    self, params: Any, hidden: Float[Array, "N D"]
  ) -> Float[Array, "N V"]: ...


# The canvas before each step, and the text after the last.
Path = Int[Array, "S B L"]

Sampler = Callable[
  [Any, Int[Array, "B L"], Bool[Array, "B L"], Key[Array, "B"]], Path
]


def make_sampler(
  config: SampleConfig, denoiser: Predictor, mask_id: int
) -> Sampler:
  """Returns the jitted sampler: (params, tokens, free, row_keys) -> path.

  Positions with `free` False keep their token; all others are drawn. A row
  depends on its own tokens and key only, not on the batch around it. All steps
  are returned, the finished text as the last: they are small beside one
  denoiser call, and show how the text came about.
  """
  temperature = tokens.effective_temperature(config)

  def draw(keys, logits):
    return tokens.draw(keys, logits, temperature, config.top_k, config.top_p)

  @jax.jit
  def sample(
    params: Any,
    x: Int[Array, "B L"],
    free: Bool[Array, "B L"],
    row_keys: Key[Array, "B"],
  ) -> Path:
    positions = order.random_order(_fold(row_keys, 0), free)
    rank = jnp.argsort(positions, axis=1)
    total = free.sum(axis=1)
    most = schedule.most_revealed(config.num_steps, x.shape[1])

    def step(i, path):
      x = path[i]
      start = schedule.revealed_before(i, config.num_steps, total)
      stop = schedule.revealed_before(i + 1, config.num_steps, total)
      slots = jnp.minimum(
        start[:, None] + jnp.arange(most)[None], x.shape[1] - 1
      )
      where = jnp.take_along_axis(positions, slots, axis=1)
      rate = ((total - start) / x.shape[1]).astype(jnp.float32)
      logits = _logits_at(denoiser, params, x, rate, where)
      drawn = draw(_fold(row_keys, i + 1), logits)
      turn = (start[:, None] <= rank) & (rank < stop[:, None])
      slot = jnp.clip(rank - start[:, None], 0, most - 1)
      x = jnp.where(turn, jnp.take_along_axis(drawn, slot, axis=1), x)
      return path.at[i + 1].set(x)

    x = jnp.where(free, mask_id, x)
    path = jnp.broadcast_to(x, (config.num_steps + 1, *x.shape))
    return jax.lax.fori_loop(0, config.num_steps, step, path)

  return sample


def _logits_at(
  denoiser: Predictor,
  params: Any,
  x: Int[Array, "B L"],
  rate: Float[Array, "B"],
  where: Int[Array, "B N"],
) -> Float[Array, "B N V"]:
  """One denoiser call; the head runs on the asked positions alone."""
  hidden = denoiser.hidden(params, x, jnp.ones_like(x), rate)
  picked = jnp.take_along_axis(hidden, where[..., None], axis=1)
  flat = denoiser.logits(params, picked.reshape(-1, picked.shape[-1]))
  flat = jax.reshard(flat, RULES.spec("batch", None))
  return flat.reshape(*where.shape, -1)


def _fold(keys: Key[Array, "B"], number: int | Int[Array, ""]):
  return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)
