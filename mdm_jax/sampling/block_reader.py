"""Reads a block of a text, with cached keys and values of those before it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mdm_jax.model.context import Context, KVCache
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.objectives.base import Decoding


@dataclasses.dataclass
class Reader:
  """Calls the model for one block, with the keys and values of those before.

  To a step it looks like a model of rows of one block (`call.Predictor`).

  Attributes:
    model: computes hidden states, keys and values.
    decoding: the block length, and which positions attend to which.
    x: the ids before the block is drawn.
    end: length of each row.
    writing: rows that write their keys and values.
    cache: keys and values, before the call and after it.
    start: the block's first position.
    before: first position of the block to read again, clean; None for none.
    first: with shifted outputs, what predicts the block's first token: the
      output at the clean token before it. Set by a call with `before`.
  """

  model: Denoiser
  decoding: Decoding
  x: Int[Array, "B L"]
  end: Int[Array, "B"]
  writing: Bool[Array, "B"]
  cache: KVCache
  start: Int[Array, ""]
  before: Int[Array, ""] | None = None
  first: Float[Array, "B 1 D"] | None = None

  def hidden(
    self, params: Any, tokens: Int[Array, "B S"], context: Context
  ) -> Float[Array, "B S D"]:
    """Returns the block's hidden states; keeps the cache."""
    size, at, segments = self.decoding.block, self.start, context.segments
    if self.before is not None:
      at = self.before
      whole = put(self.x, tokens, self.start)
      tokens = window(whole, at, 2 * size)
      places = at + jnp.arange(2 * size)[None]
      segments = (places < self.end[:, None]).astype(jnp.int32)
    positions = 0 * segments + at + jnp.arange(segments.shape[1])[None]
    now = Context(
      segments,
      positions,
      self.decoding.visibility,
      cache=dataclasses.replace(self.cache, at=(at, self.writing)),
      keep=True,
      most_segments=1,
    )
    hidden, cache = self.model.hidden(params, tokens, now)
    # The loop's carry must keep its type: `at` and `side` as they were.
    self.cache = KVCache(cache.keys, cache.values, self.cache.side)
    if self.before is not None:
      hidden = window(hidden, self.start - at, size)
    return self._shifted(hidden) if self.model.config.shift_outputs else hidden

  def _shifted(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    """Returns the hidden states with the one for the first token put right."""
    if self.before is not None:
      self.first = window(hidden, 0, 1)
      return hidden
    # A call moved its outputs by one position and left its first one in place.
    # That is right for a text's first token, which has none before it.
    begins = self.start == 0
    own = window(hidden, 0, 1)
    return put(hidden, jnp.where(begins, own, self.first), 0)

  def logits(
    self, params: Any, hidden: Float[Array, "N D"]
  ) -> Float[Array, "N V"]:
    """Returns the model's logits."""
    return self.model.logits(params, hidden)


@dataclasses.dataclass
class WholeRows(Reader):
  """The same hidden states by calls over whole rows, without a cache.

  A reference for tests and benchmarks.
  """

  def hidden(
    self, params: Any, tokens: Int[Array, "B S"], context: Context
  ) -> Float[Array, "B S D"]:
    """Returns the block's hidden states."""
    row = put(self.x, tokens, self.start)
    places = jnp.arange(row.shape[1])[None]
    inside = (places < self.end[:, None]).astype(jnp.int32)
    # Positions count on behind an end, where later blocks are.
    now = Context(
      put(inside, context.segments, self.start),
      0 * row + places,
      self.decoding.visibility,
    )
    hidden = self.model.hidden(params, row, now)
    return window(hidden, self.start, tokens.shape[1])


def window(values: Array, start: Int[Array, ""] | int, size: int) -> Array:
  """Returns `size` positions of each row."""
  part = jax.lax.dynamic_slice_in_dim(values, start, size, axis=1)
  # Newer JAX versions lose the sharding of a one-row batch in this slice.
  return jax.reshard(part, jax.typeof(values).sharding)


def put(values: Array, part: Array, start: Int[Array, ""] | int) -> Array:
  """Returns the rows with some positions replaced."""
  return jax.lax.dynamic_update_slice_in_dim(values, part, start, axis=1)
