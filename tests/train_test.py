"""The loop: what it logs, when it reads numbers, where it may be parted."""

import contextlib
import dataclasses

import jax
import jaxtyping
import numpy as np
import pytest

from mdm_jax import train
from mdm_jax.benchmarks import workload
from mdm_jax.checkpoints.checkpoint import Checkpoints
from mdm_jax.core.progress import ProgressLine
from mdm_jax.runtime.session import Session
from mdm_jax.training import run_log
from mdm_jax.training.run_log import RunLog
from mdm_jax.training.trainer import Trainer
from mdm_jax.training.writers import Writers
from mdm_jax.workdir import Workdir

TINY = workload.PRESETS["tiny"]
LOG_EVERY = 4
FIRST_STAGE = 10  # updates, two and a half windows
NAMES = "loss", "tokens", "skipped"


@pytest.fixture(autouse=True)
def _optax_promotes():
  with jax.numpy_dtype_promotion("standard"):
    yield


@pytest.fixture(autouse=True)
def _unchecked():
  """The numbers of an update are arrays only as far as they are read."""
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)


class _Number:
  """A number on a device that takes note of being read."""

  def __init__(self, value, told, what):
    self._value, self._told, self._what = value, told, what

  def __array__(self, *_args, **_kwargs):
    self._told.append(self._what)
    return np.array(self._value, np.float32)


class _Scripted(Trainer):
  """A trainer whose updates give numbers that are known before."""

  def __init__(self, config, mesh):
    rows = workload.make_rows(TINY, 32)
    data = workload.make_data(TINY, rows)
    super().__init__(
      config, dataclasses.replace(data, stages=(rows, rows)), mesh
    )
    self.told = []
    self.numbers = {
      name: np.random.default_rng(i).uniform(0, 9, 100).astype(np.float32)
      for i, name in enumerate(NAMES[:2])
    } | {"skipped": np.zeros(100, np.float32)}

  def update(self, state, update, batch=None):
    self.told.append(("dispatched", update))
    metrics = {
      name: _Number(values[update], self.told, ("read", update))
      for name, values in self.numbers.items()
    }
    return dataclasses.replace(state, step=state.step + 1), metrics


@pytest.fixture
def trainer(mesh):
  config = workload.make_config(TINY)
  first, second = (
    dataclasses.replace(config.stages[0], updates=n) for n in (FIRST_STAGE, 90)
  )
  settings = dataclasses.replace(config.train, log_every=LOG_EVERY)
  config = dataclasses.replace(config, stages=(first, second), train=settings)
  return _Scripted(config, mesh)


@contextlib.contextmanager
def _run(trainer, folder):
  """A function that goes on with a run, and the run."""
  workdir = Workdir(folder)
  with (
    Checkpoints(workdir.path) as checkpoints,
    Writers(workdir.path, after=0) as writers,
    ProgressLine(trainer.curriculum.updates) as line,
    Session(workdir.path) as session,
  ):
    run = train.Run(trainer, workdir, checkpoints, session)
    log = RunLog(trainer, writers, line, session.attempt)
    yield (lambda state, until: run.advance(state, until, log), run)


def _logged(folder, *parts, trainer):
  with _run(trainer, folder) as (advance, run):
    state = trainer.init()
    for until in parts:
      state = advance(state, until)
      assert int(state.step) == until
    return run.workdir.read_metrics()


def test_a_point_is_the_mean_of_its_updates(trainer, tmp_path):
  lines = _logged(tmp_path, 20, trainer=trainer)
  # A window ends with its stage: updates 9 and 10 are in no point.
  windows = {4: (0, 4), 8: (4, 8), 12: (10, 12), 16: (12, 16), 20: (16, 20)}
  assert [line["step"] for line in lines] == list(windows)
  loss, tokens = (trainer.numbers[n].astype(np.float64) for n in NAMES[:2])
  for line in lines:
    part = slice(*windows[line["step"]])
    assert line["train/loss"] == pytest.approx(loss[part].mean(), rel=1e-14)
    seen = tokens[: line["step"]].sum()
    assert line["train/tokens_seen"] == pytest.approx(seen, rel=1e-14)
    assert line["train/stage"] == 1 + (line["step"] > FIRST_STAGE)
    seconds = line["train/update_seconds"] * (part.stop - part.start)
    speed = tokens[part].sum() / seconds
    assert line["train/tokens_per_second"] == pytest.approx(speed)
    assert line["train/skipped"] == 0 and "train/tokens" not in line


def test_a_run_in_parts_logs_the_same(trainer, tmp_path):
  whole = _logged(tmp_path / "whole", 24, trainer=trainer)
  # Between two points, or the window that is open would be lost.
  parts = _logged(tmp_path / "parts", 8, 12, 24, trainer=trainer)
  timings = {"train/tokens_per_second", "train/update_seconds"}
  keep = lambda line: {k: v for k, v in line.items() if k not in timings}
  kept = list(map(keep, parts))
  assert kept == list(map(keep, whole))


def test_an_update_is_dispatched_before_the_last_ones_numbers_are_read(
  trainer, tmp_path
):
  """So the device never waits, and no more than one update is ahead."""
  _logged(tmp_path, 9, trainer=trainer)
  order = list(dict.fromkeys(trainer.told))
  expected = [("dispatched", 0)]
  for update in range(1, 9):
    expected += [("dispatched", update), ("read", update - 1)]
  assert order == [*expected, ("read", 8)]


def test_an_update_that_was_not_applied_is_told(trainer, tmp_path, monkeypatch):
  told = []
  monkeypatch.setattr(
    run_log.logging,
    "warning",
    lambda text, *values: told.append((text % values, list(trainer.told))),
  )
  trainer.numbers["skipped"][5] = 1.0
  lines = _logged(tmp_path, 8, trainer=trainer)
  ((text, before),) = told
  assert text.startswith("update 6: not finite")  # counted from 1
  rows = ", ".join(map(str, trainer.row_numbers(5)))
  assert text.endswith(f"not applied; rows {rows} of stage train")
  assert ("dispatched", 6) in before and ("dispatched", 7) not in before
  assert [line["train/skipped"] for line in lines] == [0.0, 0.25]
