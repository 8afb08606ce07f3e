"""One denoiser call of a sampler: hidden states, and logits where asked.

Logits exist for some positions at a time, in chunks whose number depends on how
many are needed: a step that reveals six tokens projects six positions, and no
array has a vocabulary for every position.

A step that re-uses the keys and values of a finished block would give them to
`denoiser.hidden` in the context (`model/cache.py`); nothing else in a sampler
knows how hidden states are computed.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from mdm_jax.core.sharding import RULES
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.model.context import Context, row_context
from mdm_jax.sampling.config import SampleConfig

_MOST_LOGITS = 2**25  # numbers in one chunk of logits: 128 MiB
_CHUNKS = 4  # of all positions, at least

Carry = TypeVar("Carry")


@runtime_checkable
class Predictor(Protocol):
  """What is asked of a denoiser: hidden states, and logits of some of them."""

  def hidden(
    self,
    params: Any,
    tokens: Int[Array, "B L"],
    context: Context,
  ) -> Float[Array, "B L D"]: ...

  def logits(
    self, params: Any, hidden: Float[Array, "N D"]
  ) -> Float[Array, "N V"]: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Canvas:
  """What is given of each text; arrays, or shapes where nothing is computed.

  Attributes:
    tokens: ids [B, L] where given; whatever else where free.
    free: what is to be drawn [B, L]. The rest is never changed.
    lengths: tokens of each row [B]; what is behind them is padding.
  """

  tokens: Any
  free: Any
  lengths: Any


def padded(canvas: Canvas, pad: int) -> Canvas:
  """Returns the canvas with padding, and nothing else, behind each row."""
  inside = jnp.arange(canvas.tokens.shape[1])[None] < canvas.lengths[:, None]
  tokens = jnp.where(inside, canvas.tokens, pad)
  return Canvas(tokens, canvas.free & inside, canvas.lengths)


class Call:
  """The denoiser's answer to one state of the texts."""

  def __init__(
    self,
    config: SampleConfig,
    denoiser: Predictor,
    vocab: Vocabulary,
    params: Any,
    canvas: Canvas,
    x: Int[Array, "B L"],
    masked: Bool[Array, "B L"],
    end: Int[Array, "B"],
  ):
    self._denoiser, self._params, self._vocab = denoiser, params, vocab
    self._guidance = config.guidance
    inside = jnp.arange(x.shape[1])[None] < end[:, None]
    given = ~canvas.free & inside
    # An end of the text before a given token would cut that off.
    self._may_end = jnp.cumsum(given[:, ::-1], axis=1)[:, ::-1] == 0
    self._hidden = self._run(x, masked, inside)
    if self._guidance:
      x = jnp.where(given, vocab.mask, x)
      self._unprompted = self._run(x, masked | given, inside)

  def _run(self, x, masked, inside) -> Float[Array, "B L D"]:
    rate = masked.sum(axis=1) / jnp.maximum(inside.sum(axis=1), 1)
    context = row_context(
      inside.astype(jnp.int32),
      condition=rate.astype(jnp.float32),
      packed=False,
    )
    return self._denoiser.hidden(self._params, x, context)

  def logits(self, where: Int[Array, "B N"]) -> Float[Array, "B N V"]:
    """Returns logits at some positions; -inf for tokens that can't be there.

    With guidance, without + (1 + weight) (with - without), where all given
    tokens are masked for the second (Nie et al. 2024, arXiv 2410.18514).
    """
    logits = self._project(self._hidden, where)
    if self._guidance:
      without = self._project(self._unprompted, where)
      guided = without + (1 + self._guidance) * (logits - without)
      logits = jnp.where(jnp.isfinite(logits), guided, logits)
    may_end = _pick(self._may_end, where)
    is_end = self._vocab.is_end(jnp.arange(logits.shape[-1])[None, None])
    return jnp.where(is_end & ~may_end[..., None], -jnp.inf, logits)

  def _project(self, hidden, where) -> Float[Array, "B N V"]:
    picked = _pick(hidden, where)
    # A batch of one row could as well be split over its positions.
    split = RULES.spec("batch", None)
    flat = (where.size, picked.shape[-1])
    flat = jnp.reshape(picked, flat, out_sharding=split)
    flat = jax.reshard(self._denoiser.logits(self._params, flat), split)
    shape = (*where.shape, flat.shape[-1])
    return jnp.reshape(flat, shape, out_sharding=P(*split, None))

  def in_chunks(
    self,
    where: Int[Array, "B L"],
    count: Int[Array, "B"],
    most: int,
    body: Callable[[Int[Array, "B N"], Bool[Array, "B N"], Carry], Carry],
    carry: Carry,
  ) -> Carry:
    """Runs `body(slots, kept, carry)` over the first `count` of each row.

    Args:
      where: positions, in order.
      count: how many of each row are wanted.
      most: columns of a chunk, unless their logits would be too many.
      body: is given some columns of `where`, and which of them are wanted.
      carry: what the body changes.
    """
    rows, length = where.shape
    room = _MOST_LOGITS // (rows * self._vocab.size)
    size = max(min(most, room, -(-length // _CHUNKS)), 1)
    where = jnp.pad(where, ((0, 0), (0, -length % size)))

    def chunk(n, carry):
      slots = jax.lax.dynamic_slice_in_dim(where, n * size, size, axis=1)
      # JAX's newer versions forget there how one row is split.
      slots = jax.reshard(slots, jax.typeof(where).sharding)
      kept = n * size + jnp.arange(size)[None] < count[:, None]
      return body(slots, kept, carry)

    return jax.lax.fori_loop(0, -(-count.max() // size), chunk, carry)


def _pick(values: Array, where: Int[Array, "B N"]) -> Array:
  """Returns each row's values at its positions."""
  return jax.vmap(lambda row, at: row[at])(values, where)
