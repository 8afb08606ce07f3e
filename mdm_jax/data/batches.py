"""The batch of an update: a pure function of the prepared rows and its number.

Nothing is iterated and nothing is remembered, so resuming needs one integer,
and any number of hosts sees the same rows.
"""

import dataclasses

import jax
import numpy as np
from grain.experimental import index_shuffle
from jaxtyping import Array, Int

from mdm_jax.core.sharding import batch_sharding
from mdm_jax.data.packing import Rows

_SHUFFLE_ROUNDS = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """The rows of one update: A microbatches of B packed rows.

  Attributes:
    tokens: x0.
    segments: number of the text each token belongs to in its row; 0: padding.
  """

  tokens: Int[Array, "A B L"]
  segments: Int[Array, "A B L"]


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
      index_shuffle(
        index=i % rows,
        max_index=rows - 1,
        seed=(seed + i // rows) % 2**32,
        rounds=_SHUFFLE_ROUNDS,
      )
      for i in range(first, first + rows_per_update)
    ],
    np.int64,
  )


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
  """Puts the numbered rows on the devices, every host its contiguous share."""
  per_microbatch = len(numbers) // accumulation
  grid = numbers.reshape(accumulation, per_microbatch)
  share = per_microbatch // jax.process_count()
  start = jax.process_index() * share
  local = grid[:, start : start + share]
  sharding = batch_sharding(mesh, rank=3, axis=1)
  place = lambda values: jax.make_array_from_process_local_data(
    sharding, values[local].astype(np.int32)
  )
  return Batch(place(rows.tokens), place(rows.segments))
