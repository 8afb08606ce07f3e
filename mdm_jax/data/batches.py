"""Builds the batch of an update as a pure function of its number.

There is no iterator and no saved position: the rows of update k follow from the
seed, the stage and k alone. So a resumed run needs only its update number, and
hosts agree on the global batch without communicating.
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

# Changing this reorders the rows of every run that is already under way.
_SHUFFLE_ROUNDS = 4


@jax.tree_util.register_pytree_with_keys_class
class Batch(Fields):
  """The rows of one update: A microbatches of B packed rows of L tokens.

  Every field has the shape [A, B, L]. If B does not divide evenly among the
  data shards, the last rows of each microbatch are padding. Batches are
  pytrees; absent optional fields have no leaf.
  """

  @property
  def answer(self) -> Any:
    """Which tokens may be masked and predicted; by default, all of the text."""
    found = self.fields.get("answer")
    return self.segments > 0 if found is None else found

  def tree_flatten_with_keys(self):
    """Returns the fields with their names, as JAX's pytree registry asks."""
    key = jax.tree_util.GetAttrKey
    leaves = [(key(name), v) for name, v in self.fields.items()]
    return leaves, tuple(self.fields)

  @classmethod
  def tree_unflatten(cls, names, leaves) -> "Batch":
    """Rebuilds a batch from its leaves, as JAX's pytree registry asks."""
    batch = object.__new__(cls)
    batch.fields = dict(zip(names, leaves, strict=True))
    return batch


def row_numbers(
  rows: int, seed: int, update: int, rows_per_update: int
) -> Int[np.ndarray, "{rows_per_update}"]:
  """Returns the row numbers of an update; each epoch is a seeded permutation.

  Epochs run back to back: an update may hold the last rows of one epoch and the
  first rows of the next.

  Args:
    rows: number of rows in the stage.
    seed: of the permutations; use `stage_seed`, so that stages differ.
    update: number of the update, counted from the start of the stage.
    rows_per_update: rows of all microbatches together.

  Returns:
    Row numbers in [0, rows).

  Example:
    >>> row_numbers(50, stage_seed(42, 0), update=0, rows_per_update=4)
    array([28,  9,  2, 17])
  """
  first = update * rows_per_update
  return np.array(
    [
      # Positional on purpose: with keywords the call takes 1.5 times as long.
      # The seed of epoch e is seed + e, modulo the 32 bits that Grain takes.
      index_shuffle(
        i % rows, rows - 1, (seed + i // rows) % 2**32, _SHUFFLE_ROUNDS
      )
      for i in range(first, first + rows_per_update)
    ],
    np.int64,
  )


@functools.cache
def stage_seed(seed: int, stage: int) -> int:
  """Returns the seed of a stage's row order.

  Epochs of a stage use consecutive seeds (`row_numbers`). Seeds of different
  stages are therefore hashed far apart, or one stage's second epoch could
  repeat the order of the next stage's first.
  """
  state = np.random.SeedSequence([seed, stage]).generate_state(1)
  return int(state[0])


def make_batch(
  rows: Rows,
  numbers: Int[np.ndarray, "N"],
  accumulation: int,
  mesh: jax.sharding.Mesh,
) -> Batch:
  """Gathers rows by number and places them on the mesh.

  Each process reads only the rows of its own devices. Rows of padding are
  appended until all data shards have the same number.

  Args:
    rows: the stage's rows; memory-mapped ones are read only where needed.
    numbers: rows of the update, of all microbatches one after the other.
    accumulation: number of microbatches A.
    mesh: devices to place the batch on.

  Returns:
    A batch of fields [A, B, L], sharded over rows.
  """
  grid = numbers.reshape(accumulation, -1)
  # One device: one gather, and a cheaper transfer (see `_to_one_device`).
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
  """Gives every local device the rows of its shard, in any device order.

  Args:
    values: one field of all rows [rows, L]; only the gathered rows are read.
    grid: row numbers of each microbatch.
    sharding: of the result.
    dtype: of the result.
  """

  rows = padded_rows(grid.shape[1], sharding.mesh)

  @functools.cache  # devices along the tensor axis share rows
  def read(first: int, end: int) -> np.ndarray:
    real = values[grid[:, first:end]].astype(dtype)
    missing = end - first - real.shape[1]
    # Zeros: segment 0 marks a row as padding, whatever its tokens.
    return np.pad(real, ((0, 0), (0, missing), (0, 0)))

  def shard(index: tuple[slice, ...]) -> np.ndarray:
    first, end, _ = index[1].indices(rows)
    return read(first, end)

  shape = grid.shape[0], rows, values.shape[1]
  return jax.make_array_from_callback(shape, sharding, shard)


@functools.cache
def _to_one_device(mesh: jax.sharding.Mesh) -> Callable:
  """Returns a compiled identity function whose inputs land on the mesh.

  For a few rows on one device, `jax.device_put` takes several times as long,
  all of it in Python. With several devices it is the faster of the two.
  """
  sharding = batch_sharding(mesh, rank=3, axis=1)
  same = lambda local: local
  return jax.jit(same, in_shardings=sharding, out_shardings=sharding)
