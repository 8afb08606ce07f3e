"""Batches: which rows an update sees, and on which device each lies."""

import jax
import numpy as np
import pytest
from grain.experimental import index_shuffle
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from mesh_harness import make_mesh

from mdm_jax.core.sharding import AXES, RULES, batch_sharding, data_shards
from mdm_jax.data import batches
from mdm_jax.data.batches import make_batch, row_numbers, stage_seed
from mdm_jax.data.rows import Rows

ROWS = Rows(
  np.arange(40 * 6, dtype=np.uint16).reshape(40, 6),
  np.tile(np.arange(6, dtype=np.uint16), (40, 1)),
)
CASES = {
  "rows": st.integers(1, 200),
  "seed": st.integers(0, 2**32 - 1),
  "per_update": st.integers(1, 16),
}


def _epochs(rows, seed, per_update, count):
  """The order of the first epochs, however updates divide them."""
  updates = -(-rows * count // per_update)
  drawn = [row_numbers(rows, seed, u, per_update) for u in range(updates)]
  flat = np.concatenate(drawn)[: rows * count]
  return flat.reshape(count, rows)


# MARK: which rows


@given(**CASES)
@settings(deadline=None, max_examples=40)
def test_every_epoch_is_a_permutation(rows, seed, per_update):
  for epoch in _epochs(rows, seed, per_update, 3):
    assert sorted(epoch) == list(range(rows))


@given(**CASES, update=st.integers(0, 10**7))
@settings(deadline=None, max_examples=40)
def test_an_update_depends_on_its_number_alone(rows, seed, per_update, update):
  first = row_numbers(rows, seed, update, per_update)
  row_numbers(rows, seed, update + 1, per_update)
  np.random.seed(0)
  assert (row_numbers(rows, seed, update, per_update) == first).all()


def test_the_batch_size_does_not_change_the_order():
  orders = [_epochs(60, 5, n, 3) for n in (1, 7, 16)]
  assert (orders[0] == orders[1]).all() and (orders[0] == orders[2]).all()


def test_epochs_stages_and_seeds_differ():
  orders = [
    tuple(epoch)
    for seed in range(8)
    for stage in range(4)
    for epoch in _epochs(50, stage_seed(seed, stage), 5, 4)
  ]
  assert len(set(orders)) == len(orders)
  assert tuple(range(50)) not in orders


def test_rows_are_well_mixed():
  first = _epochs(1000, 0, 10, 1)[0]
  assert abs(np.corrcoef(first, np.arange(1000))[0, 1]) < 0.1
  assert (np.abs(np.diff(first)) == 1).mean() < 0.02


def test_stage_seeds_are_pure_and_far_apart():
  seeds = [stage_seed(seed, stage) for seed in range(50) for stage in range(4)]
  assert seeds == [stage_seed(s, i) for s in range(50) for i in range(4)]
  assert all(0 <= seed < 2**32 for seed in seeds)
  assert np.diff(sorted(seeds)).min() > 10_000


def test_the_largest_seed_does_not_overflow():
  assert sorted(_epochs(20, 2**32 - 1, 4, 2)[1]) == list(range(20))


ORDERS = {  # of seed 42: (rows, stage, update) and the rows drawn
  (50, 0, 0): [28, 9, 2, 17, 33, 11, 24, 22],
  (50, 0, 6): [14, 13, 41, 7, 25, 6, 24, 33],  # into the second epoch
  (1, 0, 3): [0, 0, 0, 0],
  (2, 1, 3): [0, 1, 0, 1, 1, 0],
  (70_000, 2, 1000): [10766, 54110, 1051, 3254, 47208, 50461],
}


@pytest.mark.parametrize("rows, stage, update", ORDERS)
def test_the_order_stays_as_it_is(rows, stage, update):
  """A run that was begun with an earlier version reads on as it was."""
  expected = ORDERS[rows, stage, update]
  seed = stage_seed(42, stage)
  drawn = row_numbers(rows, seed, update, len(expected))
  assert drawn.tolist() == expected


@given(**CASES, update=st.integers(0, 10**7))
@settings(deadline=None, max_examples=40)
def test_the_order_is_grains(rows, seed, per_update, update):
  first = update * per_update
  expected = [
    index_shuffle(
      index=number % rows,
      max_index=rows - 1,
      seed=(seed + number // rows) % 2**32,
      rounds=4,
    )
    for number in range(first, first + per_update)
  ]
  drawn = row_numbers(rows, seed, update, per_update)
  assert drawn.tolist() == expected


# MARK: where rows lie


@pytest.mark.parametrize("accumulation", [1, 2])
def test_rows_are_placed_in_order(any_mesh, accumulation):
  numbers = row_numbers(40, 3, 0, 16)
  batch = make_batch(ROWS, numbers, accumulation, any_mesh)
  shape = (accumulation, 16 // accumulation, 6)
  for found, values in (
    (batch.tokens, ROWS.tokens),
    (batch.segments, ROWS.segments),
  ):
    assert found.shape == shape and found.dtype == np.int32
    assert jax.typeof(found).sharding.spec == RULES.spec(None, "batch", None)
    assert (np.asarray(found) == values[numbers].reshape(shape)).all()


def test_every_device_holds_its_share_of_each_microbatch(any_mesh):
  numbers = row_numbers(40, 3, 0, 16)
  tokens = make_batch(ROWS, numbers, 2, any_mesh).tokens
  whole = ROWS.tokens[numbers].reshape(2, 8, 6)
  share = 8 // data_shards(any_mesh)
  for shard in tokens.addressable_shards:
    assert shard.data.shape == (2, share, 6)
    assert (np.asarray(shard.data) == whole[shard.index]).all()


def test_the_rows_do_not_depend_on_the_order_of_the_devices():
  """A TPU's mesh is in the order of its wires, not of its hosts."""
  devices = np.array(jax.devices())[[5, 2, 7, 0, 3, 6, 1, 4]].reshape(1, 4, 2)
  mesh = jax.sharding.Mesh(devices, AXES, (AxisType.Explicit,) * 3)
  numbers = row_numbers(40, 3, 0, 16)
  tokens = make_batch(ROWS, numbers, 2, mesh).tokens
  assert (np.asarray(tokens) == ROWS.tokens[numbers].reshape(2, 8, 6)).all()


def test_rows_are_read_once_and_no_others():
  """The two devices of a tensor axis share what is read."""
  asked = []

  class Recorded:
    shape = ROWS.tokens.shape

    def __getitem__(self, rows):
      asked.extend(rows.ravel().tolist())
      return ROWS.tokens[rows]

  numbers = row_numbers(40, 3, 0, 16)
  batches._place(
    Recorded(), numbers.reshape(2, 8), batch_sharding(make_mesh("4x2"), 3, 1)
  )
  assert sorted(asked) == sorted(numbers)


def test_a_batch_passes_through_jit(mesh):
  batch = make_batch(ROWS, np.arange(8), 1, mesh)
  total = jax.jit(lambda b: b.tokens.sum())(batch)
  assert int(total) == ROWS.tokens[:8].sum()
