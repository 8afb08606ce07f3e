"""Exact likelihoods of texts under a masked model, by the chain rule.

With one token per step the sampler draws from a joint distribution of the text,

  p(x) = product over steps k of p(x_i(k) | the tokens revealed before step k),

for every order that chooses position i(k) from what is revealed by then. So the
sampler itself, made to draw a given text, computes -log p(x) under any of its
orders. An order that saw hidden tokens would not define a distribution.

The terms of an order by position need no loop: their inputs xt are known in
advance, so they are independent rows (`make_ranks` and `make_terms`).

The mean of -log p(x) over random orders is the likelihood bound that an
evaluation estimates. With K orders, -log(mean of p(x)) is a bound as well, and
at least as tight by Jensen's inequality; with K = 1 both are the same on
average.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from mdm_jax.core.errors import UserError
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.model import inference
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.sampling import schedule
from mdm_jax.sampling.call import Call, Canvas, Predictor, padded
from mdm_jax.sampling.confidence import log_probability
from mdm_jax.sampling.config import SampleConfig
from mdm_jax.sampling.order import ORDERS, priority, rank
from mdm_jax.sampling.sampler import Steps, order_keys
from mdm_jax.sampling.tokens import Settings

# (params, texts, one key per text) -> -log p of each text, in nats.
ChainRule = Callable[[Any, Canvas, Key[Array, "B"]], Float[Array, "B"]]
# (texts, one key per text) -> the step that reveals each token; -1 if given.
Ranks = Callable[[Canvas, Key[Array, "B"]], Int[Array, "B L"]]
# (params, texts, hidden tokens, a hidden position per row) -> -log p of the
# token there, in nats.
Terms = Callable[
  [Any, Canvas, Bool[Array, "B L"], Int[Array, "B"]], Float[Array, "B"]
]
_MOST_ORDERS = 4096


class _Forced(Steps):
  """Steps that draw the tokens of a given text, and note their log p."""

  def draw(
    self,
    keys: Key[Array, "B"],
    slots: Int[Array, "B N"],
    logits: Float[Array, "B N V"],
  ) -> Int[Array, "B N"]:
    """Returns the text's own tokens."""
    del keys, logits
    return jnp.take_along_axis(self.canvas.tokens, slots, axis=1)

  def confidence(
    self, logits: Float[Array, "B N V"], drawn: Int[Array, "B N"]
  ) -> Float[Array, "B N"]:
    """Returns log p: a probability would underflow, or round to 1."""
    return log_probability(logits, drawn)


def make_chain_rule(
  order: str, denoiser: Predictor, vocab: Vocabulary, length: int
) -> ChainRule:
  """Returns a jitted (params, texts, row_keys) -> nats.

  A text's tokens are those of the canvas: `free` says which of them are
  predicted, the others are given. There are as many denoiser calls as the
  longest text has free tokens.

  Args:
    order: name of a sampling order.
    denoiser: computes hidden states and logits.
    vocab: the special ids.
    length: tokens per row.
  """
  config = SampleConfig(num_steps=length, order=order)

  @jax.jit
  def nats(
    params: Any, canvas: Canvas, row_keys: Key[Array, "B"]
  ) -> Float[Array, "B"]:
    canvas = padded(canvas, vocab.need("pad"))
    pace = jax.tree.map(jnp.asarray, schedule.pace(config, length))
    steps = _Forced(
      *(config, denoiser, vocab, params, canvas, pace, Settings(), row_keys)
    )
    advance = lambda carry: (carry[0] + 1, steps.step(*carry))
    unfinished = lambda carry: carry[1].masked.any()
    _, state = jax.lax.while_loop(
      unfinished, advance, (jnp.int32(0), steps.start())
    )
    # The state's zeros remain at given tokens.
    return -state.confidence.sum(axis=1)

  return nats


def make_ranks(order: str, vocab: Vocabulary) -> Ranks:
  """Returns a jitted (texts, row_keys) -> the step that reveals each token.

  Args:
    order: name of a sampling order that does not read logits.
    vocab: the special ids.
  """

  @jax.jit
  def ranks(canvas: Canvas, row_keys: Key[Array, "B"]) -> Int[Array, "B L"]:
    canvas = padded(canvas, vocab.need("pad"))
    length = canvas.free.shape[1]
    keys, block = order_keys(row_keys), jnp.zeros(length, jnp.int32)
    nothing = jnp.zeros_like(canvas.free, jnp.float32)

    def step(i, carry):
      masked, when = carry
      first = priority(order, keys, i, length)
      # As the sampler chooses, ties included.
      at = rank(masked, block, first, nothing)[:, :1]
      here = masked & (jnp.arange(length)[None] == at)
      return masked & ~here, jnp.where(here, i, when)

    start = canvas.free, jnp.full_like(canvas.tokens, -1)
    return jax.lax.fori_loop(0, length, step, start)[1]

  return ranks


def make_terms(denoiser: Predictor, vocab: Vocabulary) -> Terms:
  """Returns a jitted (params, texts, masked, at) -> nats of one token a row.

  Only the hidden states at these tokens are projected to the vocabulary.

  Args:
    denoiser: computes hidden states and logits.
    vocab: the special ids.
  """

  @jax.jit
  def terms(
    params: Any,
    canvas: Canvas,
    masked: Bool[Array, "B L"],
    at: Int[Array, "B"],
  ) -> Float[Array, "B"]:
    canvas = padded(canvas, vocab.need("pad"))
    if isinstance(denoiser, Denoiser):
      # The last block then runs at these positions only.
      params = inference.ready(denoiser, params) or params
    xt = jnp.where(masked, vocab.need("mask"), canvas.tokens)
    call = Call(
      *(SampleConfig(), denoiser, vocab, params),
      *(canvas, xt, masked, canvas.lengths),
      everywhere=False,
    )
    where = at[:, None]
    text = jnp.take_along_axis(canvas.tokens, where, axis=1)
    return -log_probability(call.logits(where), text)[:, 0]

  return terms


@dataclasses.dataclass(frozen=True)
class Likelihood:
  """Which likelihood to compute.

  Attributes:
    order: name of the sampling order.
    orders: number of random orders whose probabilities are averaged.
  """

  order: str = "left_to_right"
  orders: int = 1

  @property
  def exact(self) -> bool:
    """Whether it is the -log p of one distribution, not a bound on it."""
    return self.orders == 1

  @property
  def name(self) -> str:
    """Name in files and of the metric."""
    return f"chain_{self.order}" if self.exact else f"orders_{self.orders}"

  @property
  def title(self) -> str:
    """Name in tables."""
    if self.exact:
      return f"chain rule, order {self.order}"
    return f"bound of {self.orders} orders"


def read(spec: str, name: str, default: str) -> Likelihood:
  """Reads chain, chain:ORDER or orders:K.

  Args:
    spec: what to read.
    name: the argument or flag that it is from, for messages.
    default: another valid value, which the caller reads, for messages.

  Raises:
    UserError: it is something else.
  """
  kind, _, value = spec.partition(":")
  if kind == "chain":
    order = value or "left_to_right"
    ORDERS.check(order, f"{name}=chain")
    return Likelihood(order)
  if kind == "orders" and value.isdecimal():
    if 1 <= int(value) <= _MOST_ORDERS:
      return Likelihood("random", int(value))
  raise UserError(
    f"{name}={spec} must be {default}, chain, chain:ORDER or orders:K with K of"
    f" 1 to {_MOST_ORDERS}"
  )


def bound_of_orders(
  nats: Float[np.ndarray, "K N"],
) -> Float[np.ndarray, "N"]:
  """Returns -log(mean over K of exp(-nats)) of each of N texts."""
  least = nats.min(axis=0)
  return least - np.log(np.exp(least - nats).mean(axis=0))
