"""Keys and values of earlier calls, so that they need not be computed again.

Exact wherever no position sees what comes later than the cached ones: causal,
or by blocks. There are two ways to use a cache, by its `at`:

- None: the call's keys are put behind the cached ones. Nothing is written, and
  gradients flow back into the calls that made them (training in two passes).
- a number: they are written into a buffer of fixed length from there on, over
  whatever was there, and the whole buffer is attended to (decoding). So the
  keys of an unfinished block can be replaced until its tokens are final.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mdm_jax.core.sharding import RULES
from mdm_jax.model.config import ModelConfig
from mdm_jax.model.context import KVCache, Side

# One layer's, or with a buffer those of all.
Pair = tuple[Array, Array]


def init(
  config: ModelConfig, dtype: jnp.dtype, rows: int, length: int
) -> KVCache:
  """Returns an empty buffer, sharded as keys are.

  Args:
    config: the architecture.
    dtype: of keys and values.
    rows: B.
    length: M, the most tokens of a row.
  """
  groups = config.num_kv_heads or config.num_heads
  shape = config.num_layers, rows, groups, length, config.head_size
  spec = RULES.spec(None, "batch", "heads", None, None)
  keys, values = (jnp.zeros(shape, dtype, out_sharding=spec) for _ in range(2))
  numbers = lambda fill: jnp.full(
    (rows, length), fill, jnp.int32, out_sharding=RULES.spec("batch", None)
  )
  side = Side(numbers(-1), numbers(0), numbers(0))
  return KVCache(keys, values, side, jnp.zeros((), jnp.int32))


def joined(cache: KVCache, q: Side) -> Side:
  """Returns the keys' side of a call: what is cached, and the call's own."""
  split = RULES.spec("batch", None)

  def join(old, new):
    new = jax.reshard(new, split)
    if cache.at is None:
      return jnp.concatenate([jax.reshard(old, split), new], axis=1)
    return jax.lax.dynamic_update_slice_in_dim(old, new, cache.at, axis=1)

  both = {
    f: join(getattr(cache.side, f), getattr(q, f))
    for f in ("segments", "label", "horizon")
  }
  return Side(**both)


def extend(
  cached: Pair | None,
  at: Int[Array, ""] | None,
  layer: Int[Array, ""],
  key: Float[Array, "B G S K"],
  value: Float[Array, "B G S K"],
) -> tuple[Pair, Pair]:
  """Returns a layer's keys and values: to attend to, and to keep.

  Args:
    cached: this layer's earlier ones; with `at`, the buffers of all layers.
    at: where the call's own are written.
    layer: which one this is.
    key: of this call.
    value: of this call.
  """
  own = key, value
  if cached is None:
    return own, own
  if at is None:
    both = tuple(
      jnp.concatenate([old, new], axis=2)
      for old, new in zip(cached, own, strict=True)
    )
    return both, both
  buffers = tuple(
    jax.lax.dynamic_update_slice(old, new[None], (layer, 0, 0, at, 0))
    for old, new in zip(cached, own, strict=True)
  )
  here = lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)
  return tuple(map(here, buffers)), buffers
