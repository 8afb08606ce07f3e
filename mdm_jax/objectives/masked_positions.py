"""Gathers the masked positions of rows into a buffer, and scatters back.

So the head computes logits at masked positions only, and each data shard
handles its own rows.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Shaped

from mdm_jax.core import hardware
from mdm_jax.core.sharding import BATCH_AXES
from mdm_jax.model.last_mlp import Unfinished


def pack(hidden, x0, masked, capacity: int, chunks: int):
  """Gathers each data shard's masked positions into a buffer; see `_pack`.

  Hidden states that are `Unfinished` are finished in the buffer.
  """
  rows = P(BATCH_AXES)
  run = jax.shard_map(
    functools.partial(_pack, slots=-(-capacity // chunks) * chunks),
    in_specs=(rows, rows, rows),
    out_specs=(rows, rows, rows, rows),
  )
  whole = not isinstance(hidden, Unfinished)
  given = (hidden,) if whole else hidden.by_position
  found, targets, position, slot = run(given, x0, masked)
  states = found[0] if whole else hidden.finished(*found)
  split = jax.shard_map(
    lambda x: x.reshape(chunks, -1, *x.shape[1:]),
    in_specs=rows,
    out_specs=P(None, *rows),
  )
  return split(states), split(targets), position, slot


def _pack(
  given: tuple[Shaped[Array, "B L D"] | None, ...],
  x0: Int[Array, "B L"],
  masked: Bool[Array, "B L"],
  slots: int,
) -> tuple[
  tuple[Shaped[Array, "S D"] | None, ...],
  Int[Array, "S"],
  Int[Array, "S"],
  Int[Array, "M"],
]:
  """Gathers one shard's masked positions into a buffer.

  Returns:
    The arrays given and the targets, by slot; the position that fills each
    slot; and the slot that each position fills. Unused slots and unmasked
    positions have an index past the end.
  """
  flat = masked.reshape(-1)
  slot = jnp.where(flat, jnp.cumsum(flat) - 1, slots)
  position = _positions(flat, slot, slots)
  move = lambda x: _move(x.reshape(flat.size, -1), position, slot)
  targets = x0.reshape(-1).at[position].get(mode="fill", fill_value=0)
  return jax.tree.map(move, given), targets, position, slot


def _positions(
  flat: Bool[Array, "M"], slot: Int[Array, "M"], slots: int
) -> Int[Array, "{slots}"]:
  """Returns the position that fills each slot; M for an unused one."""
  if hardware.on_gpu():  # where a sort is many kernels
    unused = jnp.full(slots, flat.size, slot.dtype)
    every = jnp.arange(flat.size, dtype=slot.dtype)
    return unused.at[slot].set(every, mode="drop")
  first = jnp.argsort(~flat, stable=True)  # on CPUs faster than nonzero
  first = jnp.pad(first, (0, slots))[:slots]
  return jnp.where(jnp.arange(slots) < flat.sum(), first, flat.size)


def pack_weights(
  weight: Float[Array, "B L"],
  masked: Bool[Array, "B L"],
  position: Int[Array, "S"],
  chunks: int,
) -> Float[Array, "C N"]:
  """Gathers one shard's weights; all NaN if there are too few slots."""
  weights = weight.reshape(-1).at[position].get(mode="fill", fill_value=0)
  overflow = masked.sum() > position.size
  return jnp.where(overflow, jnp.nan, weights).reshape(chunks, -1)


def unpack(packed, masked, slot):
  """Puts each data shard's losses back at their positions; see `_unpack`."""
  rows = P(BATCH_AXES)
  run = jax.shard_map(
    _unpack, in_specs=(P(None, *rows), rows, rows), out_specs=rows
  )
  return run(packed, masked, slot)


def _unpack(
  losses: Float[Array, "C N"],
  masked: Bool[Array, "B L"],
  slot: Int[Array, "M"],
) -> Float[Array, "B L"]:
  """Returns one shard's losses by position, 0 where nothing is masked."""
  placed = losses.reshape(-1).at[slot].get(mode="fill", fill_value=0)
  overflow = masked.sum() > losses.size
  return jnp.where(overflow, jnp.nan, placed.reshape(masked.shape))


@jax.custom_vjp
def _move(
  x: Shaped[Array, "N *D"], source: Int[Array, "M"], back: Int[Array, "N"]
) -> Shaped[Array, "M *D"]:
  """Returns x[source], with zeros for indices past the end.

  Given `back`, the inverse of `source`, the gradient is a gather too; JAX's own
  would be a scatter.
  """
  return x.at[source].get(mode="fill", fill_value=0)


def _move_forward(x, source, back):
  return _move(x, source, back), (source, back)


def _move_backward(indices, grad):
  source, back = indices
  return _move(grad, back, source), None, None


_move.defvjp(_move_forward, _move_backward)
