"""Rows of the vocabulary's table, which is split over devices.

The table is brought together over the data axes, as every parameter is, but
never over the tensor axis: each tensor shard finds the ids that it has, and the
sum over the shards is the row (Shoeybi et al. 2019, arXiv 1909.08053,
section 3). No device ever holds a table for all of the vocabulary, nor its
gradient.
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
  """Returns the rows of the table at some ids.

  The gradient is summed up in the table's dtype: half of all tokens may be the
  mask, and in bfloat16 most of what is added to its row would be lost.

  Args:
    dtype: of the result; the table is communicated in it.
    table: all rows.
    ids: which ones.
  """
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
  """Returns the rows of all shards at one shard's ids, W being its share."""
  rows = table.at[_own(ids, len(table))].get(mode="fill", fill_value=0)
  return jax.lax.psum(rows, RULES.vocab)


def _add(
  size: int, dtype: jnp.dtype, ids: Int[Array, "B L"], grad: Array
) -> Float[Array, "W E"]:
  """Adds up a shard's gradients by id, then all data shards'."""
  total = jnp.zeros((size, grad.shape[-1]), dtype)
  total = total.at[_own(ids, size)].add(grad.astype(dtype), mode="drop")
  if jax.lax.axis_size(RULES.batch) == 1:  # then XLA adds to the head's own
    return total
  return sum_over_shards(total, P(None, RULES.embed))


def _own(ids: Int[Array, "B L"], size: int) -> Int[Array, "B L"]:
  """Returns an id's row in this shard's share; `size` where it has none."""
  own = ids - jax.lax.axis_index(RULES.vocab) * size
  return jnp.where((own >= 0) & (own < size), own, size)
