"""Larger batches: which fit, and what is said of them."""

import jax
import pytest

from mdm_jax import plan
from mdm_jax.benchmarks import workload
from mdm_jax.blueprint import make_trainer
from mdm_jax.planning import larger_batches

GIB = 2**30


@pytest.fixture
def trainer(mesh):
  preset = workload.PRESETS["tiny"]
  config = workload.make_config(preset)
  data = workload.make_data(preset, workload.make_rows(preset, 32))
  with jax.numpy_dtype_promotion("standard"):
    yield make_trainer(config, data, mesh)


def _rows(trainer, memory):
  """Returns the rows of updates that fit, where each row takes one byte."""
  total = lambda run: run.accumulation * run.batch_size
  return [b.rows for b in larger_batches.fitting(trainer, memory, total)]


def test_rows_are_doubled_as_long_as_they_fit(trainer):
  assert trainer.batch_size == 8 and trainer.accumulation == 1
  assert _rows(trainer, 100) == [16, 32, 64]
  assert _rows(trainer, 63) == [16, 32]
  assert _rows(trainer, 15) == []
  assert _rows(trainer, 10**6) == [16, 32, 64]  # no more than three


def test_the_runs_own_rows_come_first_if_they_are_split(trainer):
  trainer.accumulation = 2
  assert _rows(trainer, 33) == [16, 32]
  assert _rows(trainer, 15) == []


def test_what_is_said():
  batches = [
    larger_batches.Batch(rows, rows * 512, rows * GIB // 8)
    for rows in (16, 32, 64)
  ]
  same, larger = larger_batches.describe(16, batches)
  assert same.startswith("all 16 rows of an update fit at once (2.0 GiB)")
  assert "data.batch_size=16 with optimizer.accumulation=1" in same
  sizes = "32 rows (4.0 GiB, 16,384 tokens), 64 rows (8.0 GiB, 32,768 tokens)"
  assert f"updates that fit: {sizes}; for k times the rows" in larger
  assert larger_batches.describe(8, batches)[0].count("rows (") == 3
  assert larger_batches.describe(8, []) == []


def test_a_run_says_it_where_the_memory_is_known(trainer, monkeypatch):
  assert plan._larger_batches(trainer) == []  # a CPU's is not
  monkeypatch.setattr(plan, "_memory", lambda: 2**30)
  (line,) = plan._larger_batches(trainer)
  assert line.startswith("larger updates that fit: 16 rows (0.0 GiB, 256 ")
  assert "32 rows" in line and "64 rows" not in line  # the stage has 32
