"""Key/value cache: reuses the keys and values of earlier calls.

Calls with a cache give exactly what one call would give if no cached position
attends to later ones, as with causal or block visibility. `KVCache.at` selects
one of two modes:

- None (training in two passes): a call's keys and values are concatenated to
  the cached ones. Nothing is written, and gradients flow back into the calls
  that produced the cache.
- a number (decoding): they are written in place into a buffer of fixed length,
  from that position on, and queries attend to the whole buffer. Writing to the
  same position again replaces the keys of an unfinished block.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mdm_jax.core.sharding import RULES
from mdm_jax.model.config import ModelConfig
from mdm_jax.model.context import KVCache, Side

# Where a call writes: a position, or a position and which rows to write.
At = Int[Array, ""] | tuple[Int[Array, ""], Bool[Array, "B"]]

# Keys and values: of one layer, or of all layers for a decoding buffer.
Pair = tuple[Array, Array]


def init(
  config: ModelConfig, dtype: jnp.dtype, rows: int, length: int
) -> KVCache:
  """Returns an empty decoding cache, sharded as keys are.

  Args:
    config: the architecture.
    dtype: dtype of keys and values.
    rows: number of rows B.
    length: capacity M in tokens per row.
  """
  groups = config.num_kv_heads or config.num_heads
  shape = config.num_layers, rows, groups, length, config.head_size
  spec = RULES.spec(None, "batch", "heads", None, None)
  keys, values = (jnp.zeros(shape, dtype, out_sharding=spec) for _ in range(2))
  numbers = lambda fill: jnp.full(
    (rows, length), fill, jnp.int32, out_sharding=RULES.spec("batch", None)
  )
  # No token has segment -1, so empty slots are visible to no query.
  side = Side(numbers(-1), numbers(0), numbers(0))
  return KVCache(keys, values, side, jnp.zeros((), jnp.int32))


def joined(cache: KVCache, q: Side) -> Side:
  """Returns the keys' `Side`: the cached positions and the call's own.

  Args:
    cache: keys and values of earlier calls.
    q: the call's own positions.
  """
  split = RULES.spec("batch", None)
  at = cache.at[0] if isinstance(cache.at, tuple) else cache.at

  def join(old, new):
    new = jax.reshard(new, split)
    if at is None:
      return jnp.concatenate([jax.reshard(old, split), new], axis=1)
    return jax.lax.dynamic_update_slice_in_dim(old, new, at, axis=1)

  both = {
    f: join(getattr(cache.side, f), getattr(q, f))
    for f in ("segments", "label", "horizon")
  }
  return Side(**both)


def extend(
  cached: Pair | None,
  at: At | None,
  layer: Int[Array, ""],
  key: Float[Array, "B G S K"],
  value: Float[Array, "B G S K"],
) -> tuple[Pair, Pair]:
  """Adds a call's keys and values to a layer's cached ones.

  Args:
    cached: the layer's cached keys and values; with `at`, the buffers of all
      layers [N, B, G, M, K]; None without a cache.
    at: position in the buffers to write to, and perhaps which rows; None to
      concatenate.
    layer: index of the layer.
    key: the call's own keys.
    value: the call's own values.

  Returns:
    The layer's keys and values to attend to, and those to keep: the same, or
    with `at` the updated buffers of all layers.
  """
  own = key, value
  if cached is None:
    return own, own
  if at is None:
    both = tuple(
      jnp.concatenate([old, new], axis=2)
      for old, new in zip(cached, own, strict=True)
    )
    # The concatenation is both: later calls attend to all of it.
    return both, both
  # The buffers of all layers stay together: in a scan's carry they are updated
  # in place (see `Network._in_place`).
  at, rows = at if isinstance(at, tuple) else (at, None)
  place = layer, 0, 0, at, 0

  def write(old, new):
    new = new[None]
    if rows is not None:
      kept = jax.lax.dynamic_slice(old, place, new.shape)
      new = jnp.where(rows[None, :, None, None, None], new, kept)
    return jax.lax.dynamic_update_slice(old, new, place)

  buffers = tuple(map(write, cached, own))
  here = lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)
  return tuple(map(here, buffers)), buffers
