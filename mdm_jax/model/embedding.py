"""Embedding lookup in a table that is sharded over the vocabulary.

The table is gathered over the data axes, as every parameter is, but never over
the tensor axis: each tensor shard looks up the ids it holds, and the sum over
shards is the result (Megatron-LM, Shoeybi et al. 2019, arXiv 1909.08053,
section 3). No device ever holds the table, or its gradient, for the whole
vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from mdm_jax.core.sharding import RULES, sum_over_shards


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def look_up(
  dtype: jnp.dtype, table: Float[Array, "V D"], ids: Int[Array, "B L"]
) -> Float[Array, "B L D"]:
  """Returns the embeddings of some ids.

  The gradient is accumulated in the table's dtype: half of all tokens may be
  MASK, and in bfloat16 most of the terms added to its row would be lost.

  Args:
    dtype: dtype of the result.
    table: embedding table, in the parameters' dtype.
    ids: ids to look up.
  """
  # Cast before the gather: communication is then in the smaller dtype.
  whole = jax.reshard(table.astype(dtype), RULES.spec("vocab", None))
  find = jax.shard_map(
    _find,
    in_specs=(RULES.spec("vocab", None), RULES.spec("batch", "length")),
    out_specs=RULES.spec("batch", "length", None),
  )
  return find(whole, _in_shards(ids))


def _forward(dtype, table, ids):
  return look_up(dtype, table, ids), (table, ids)


def _backward(dtype, residuals, grad):
  del dtype
  table, ids = residuals
  shards = jax.sharding.get_abstract_mesh().shape[RULES.vocab]
  add = jax.shard_map(
    functools.partial(_add, len(table) // shards, table.dtype),
    in_specs=(
      RULES.spec("batch", "length"),
      RULES.spec("batch", "length", None),
    ),
    out_specs=RULES.spec("vocab", "embed"),
    check_vma=False,  # nothing inside is differentiated
  )
  return add(_in_shards(ids), grad), None


look_up.defvjp(_forward, _backward)


def _in_shards(ids: Int[Array, "B L"]) -> Int[Array, "B L"]:
  return jax.reshard(ids, RULES.spec("batch", "length"))


def _find(
  table: Float[Array, "W D"], ids: Int[Array, "B L"]
) -> Float[Array, "B L D"]:
  """Looks up a data shard's ids in the tables of all tensor shards.

  Runs inside a `shard_map`; W is the number of ids in one tensor shard.
  """
  # Ids of other shards are out of range and give zeros, so the sum is the row.
  rows = table.at[_own(ids, len(table))].get(mode="fill", fill_value=0)
  return jax.lax.psum(rows, RULES.vocab)


def _add(
  size: int, dtype: jnp.dtype, ids: Int[Array, "B L"], grad: Array
) -> Float[Array, "W E"]:
  """Sums the gradient of each id over a shard's tokens, then over shards."""
  # Ids of other shards are out of range, and so are dropped.
  total = jnp.zeros((size, grad.shape[-1]), dtype)
  total = total.at[_own(ids, size)].add(grad.astype(dtype), mode="drop")
  # With one data shard nothing needs to be reduced, and XLA accumulates into
  # the same array as the head's gradient (tied embeddings).
  if jax.lax.axis_size(RULES.batch) == 1:
    return total
  return sum_over_shards(total, P(None, RULES.embed))


def _own(ids: Int[Array, "B L"], size: int) -> Int[Array, "B L"]:
  """Returns ids as rows of this shard's table; `size` if held elsewhere."""
  # Out of range on the right: a negative index would count from the end.
  own = ids - jax.lax.axis_index(RULES.vocab) * size
  return jnp.where((own >= 0) & (own < size), own, size)
