"""The batch of an update: a pure function of the prepared rows and its number.

Nothing is iterated and nothing is remembered, so resuming needs one integer,
and any number of hosts sees the same rows.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from grain.experimental import index_shuffle
from jaxtyping import Array, Int, Shaped

from mdm_jax.core.sharding import batch_sharding, padded_rows
from mdm_jax.data.rows import Fields, Rows, field

_SHUFFLE_ROUNDS = 4


@jax.tree_util.register_pytree_with_keys_class
class Batch(Fields):
  """The rows of one update: A microbatches of B packed rows of L tokens.

  Of B, the last ones are padding where shards could not have as many each. Each
  field has the shape [A, B, L]. It is a pytree, without the absent fields.
  """

  @property
  def answer(self) -> Any:
    """Where a token may be asked for: in all of the text, unless it is said."""
    found = self.fields.get("answer")
    return self.segments > 0 if found is None else found

  def tree_flatten_with_keys(self):
    """Returns the values with their names, for JAX."""
    key = jax.tree_util.GetAttrKey
    leaves = [(key(name), v) for name, v in self.fields.items()]
    return leaves, tuple(self.fields)

  @classmethod
  def tree_unflatten(cls, names, leaves) -> "Batch":
    """Returns the batch of some values, for JAX."""
    batch = object.__new__(cls)
    batch.fields = dict(zip(names, leaves, strict=True))
    return batch


def row_numbers(
  rows: int, seed: int, update: int, rows_per_update: int
) -> Int[np.ndarray, "{rows_per_update}"]:
  """Returns the rows an update draws: each epoch is a seeded permutation.

  Args:
    rows: rows there are.
    seed: of the permutations; another stage needs another one.
    update: counted from the start of the stage.
    rows_per_update: the effective batch.
  """
  first = update * rows_per_update
  return np.array(
    [
      # By position: names would cost half as much again.
      index_shuffle(
        i % rows, rows - 1, (seed + i // rows) % 2**32, _SHUFFLE_ROUNDS
      )
      for i in range(first, first + rows_per_update)
    ],
    np.int64,
  )


@functools.cache
def stage_seed(seed: int, stage: int) -> int:
  """Returns the seed of a stage's row order, far from its neighbours'."""
  state = np.random.SeedSequence([seed, stage]).generate_state(1)
  return int(state[0])


def make_batch(
  rows: Rows,
  numbers: Int[np.ndarray, "N"],
  accumulation: int,
  mesh: jax.sharding.Mesh,
) -> Batch:
  """Puts the numbered rows on the devices; a process reads only its own.

  Rows that are all padding follow, until every data shard has as many.
  """
  grid = numbers.reshape(accumulation, -1)
  if mesh.size == 1:
    read = lambda name, v: v[grid].astype(field(name).device)
    local = Batch(**{name: read(name, v) for name, v in rows.fields.items()})
    return _to_one_device(mesh)(local)
  sharding = batch_sharding(mesh, rank=3, axis=1)
  place = lambda name, v: _place(v, grid, sharding, field(name).device)
  return Batch(**{name: place(name, v) for name, v in rows.fields.items()})


def _place(
  values: Any,
  grid: Int[np.ndarray, "A N"],
  sharding: jax.sharding.NamedSharding,
  dtype: type = np.int32,
) -> Shaped[Array, "A B L"]:
  """Gives every device of this process its shard's rows, however they lie.

  Args:
    values: of a field of all rows; only those asked for are read.
    grid: numbers of the rows of each microbatch.
    sharding: of the result.
    dtype: of the result.
  """

  rows = padded_rows(grid.shape[1], sharding.mesh)

  @functools.cache  # the devices of a tensor axis have the same rows
  def read(first: int, end: int) -> np.ndarray:
    real = values[grid[:, first:end]].astype(dtype)
    missing = end - first - real.shape[1]
    return np.pad(real, ((0, 0), (0, missing), (0, 0)))

  def shard(index: tuple[slice, ...]) -> np.ndarray:
    first, end, _ = index[1].indices(rows)
    return read(first, end)

  shape = grid.shape[0], rows, values.shape[1]
  return jax.make_array_from_callback(shape, sharding, shard)


@functools.cache
def _to_one_device(mesh: jax.sharding.Mesh) -> Callable:
  """Returns a program that does nothing but have its arguments placed.

  `device_put` takes several times as long for a few rows, all of it Python.
  With several devices it is the other way round.
  """
  sharding = batch_sharding(mesh, rank=3, axis=1)
  same = lambda local: local
  return jax.jit(same, in_shardings=sharding, out_shardings=sharding)
