"""The training loop: what it logs, when it reads metrics, where it may stop."""

import contextlib
import dataclasses
import re

import jax
import jaxtyping
import numpy as np
import pytest

from mdm_jax import training_loop
from mdm_jax.benchmarks import workload
from mdm_jax.blueprint import make_trainer
from mdm_jax.checkpoints.checkpoint import Checkpoints
from mdm_jax.core.errors import Stopped, UserError
from mdm_jax.resume import Origin
from mdm_jax.runtime.session import Session
from mdm_jax.start import Run
from mdm_jax.training import run_log
from mdm_jax.training.hooks import Hook, Hooks
from mdm_jax.training.saving import Saving
from mdm_jax.training.trainer import Trainer
from mdm_jax.workdir import Workdir

TINY = workload.PRESETS["tiny"]
LOG_EVERY = 4
FIRST_STAGE = 10  # updates, two and a half windows
TIMED = re.compile("perf/|goodput/|memory/|.*seconds|.*per_second|health/")
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
    data = dataclasses.replace(data, stages=(rows, rows))
    super().__init__(make_trainer(config, data, mesh), data, mesh)
    self.config = config
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
def _run(trainer, folder, hooks=()):
  """Yields a function that goes on with a run."""
  workdir = Workdir(folder)
  workdir.create()
  with (
    Checkpoints(workdir.path) as checkpoints,
    Session(workdir.path) as session,
  ):
    run = Run(trainer.config, trainer, workdir, checkpoints, session, Origin())
    with run.subscribed(hooks) as subscribed:
      yield lambda state, until: training_loop.train(
        trainer, state, until, *subscribed
      )


def _logged(folder, *parts, trainer):
  with _run(trainer, folder) as advance:
    state = trainer.init()
    for until in parts:
      state = advance(state, until)
      assert int(state.step) == until
    return Workdir(folder).read_metrics()


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
  keep = lambda line: {k: v for k, v in line.items() if not TIMED.match(k)}
  kept = list(map(keep, parts))
  assert len(kept) == 6 and kept == list(map(keep, whole))


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


def test_an_update_that_was_not_applied_is_reported(
  trainer, tmp_path, monkeypatch
):
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


def _rows_of(trainer, start, until, folder):
  """Returns the tokens that each update of a part of a run was given."""
  seen, update = {}, trainer.update

  def noted(state, number, batch=None):
    seen[number] = np.asarray(batch.tokens)
    return update(state, number, batch)

  with _run(trainer, folder) as advance, pytest.MonkeyPatch.context() as m:
    m.setattr(trainer, "update", noted)
    state = dataclasses.replace(trainer.init(), step=np.int32(start))
    advance(state, until)
  return seen


def test_rows_read_ahead_are_those_of_their_update(trainer, tmp_path):
  """From any update on, across a stage's end, and past updates left out."""
  trainer.curriculum = dataclasses.replace(
    trainer.curriculum, skipped=((11, 13),)
  )
  seen = _rows_of(trainer, 7, 16, tmp_path)
  assert [*seen] == [7, 8, 9, 10, 13, 14, 15]
  for update, tokens in seen.items():
    rows = trainer.data.stages[0].tokens[trainer.row_numbers(update)]
    np.testing.assert_array_equal(np.concatenate(tokens), rows)


def test_an_error_of_reading_stops_the_run_at_its_update(trainer, tmp_path):
  batch = trainer.batch

  def fail(stage, update):
    if update == 5:
      raise UserError("the row files are gone")
    return batch(stage, update)

  trainer.batch = fail
  with pytest.raises(UserError, match="^the row files are gone$"):
    _logged(tmp_path, 9, trainer=trainer)
  # It was read while an earlier update ran, and all earlier ones were made.
  assert ("dispatched", 4) in trainer.told
  assert ("dispatched", 5) not in trainer.told


class _Listener(Hook):
  """Writes down what it hears, and asks for what it was told to ask for."""

  def __init__(self, heard, wants=(), stops=None):
    self._heard, self._wants, self._stops = heard, wants, stops

  @contextlib.contextmanager
  def during(self, cause, update):
    self._heard.append(f"<{cause} {update}")
    yield
    self._heard.append(f"{cause}>")

  def on_stage(self, stage, update):
    self._heard.append(f"stage {stage.index} at {update}")

  def on_metrics(self, done, metrics):
    self._heard.append(f"metrics {done}")

  def on_update(self, done, state):
    assert int(state.step) == done
    self._heard.append(f"update {done}")

  def wants_state(self, done):
    return done in self._wants

  def should_stop(self, done):
    return "enough" if done == self._stops else None

  def on_save(self, done, state, kept):
    kept["mine"] = done
    self._heard.append(f"save {done}")

  def on_evaluate(self, done, state):
    self._heard.append(f"evaluate {done}")

  def on_end(self, state):
    self._heard.append("end")


def _heard(trainer, folder, until, **asks):
  """What a hook hears from the ninth update on."""
  heard, save = [], Saving.save

  def written(self, done, *rest):
    heard.append(f"written {done}")
    save(self, done, *rest)

  hooks = [_Listener(heard, **asks)]
  with (
    _run(trainer, folder, hooks) as advance,
    pytest.MonkeyPatch.context() as m,
  ):
    m.setattr(Saving, "save", written)
    state = dataclasses.replace(trainer.init(), step=np.int32(9))
    with contextlib.suppress(Stopped):
      advance(state, until)
  return heard


def test_hooks_hear_of_everything_in_its_order(trainer, tmp_path):
  update = "<data 9,data>,<train 9,metrics 10,train>,update 10"
  saved = "<save 9,save 10,written 10,save>,<eval 9,evaluate 10,eval>"
  later = "stage 1 at 10,<data 10,data>,<train 10,metrics 11,train>,update 11"
  expected = f"stage 0 at 9,{update},{saved},{later},end"
  assert ",".join(_heard(trainer, tmp_path, 11, wants=[10])) == expected
  with Checkpoints(tmp_path) as checkpoints:  # saved before it was evaluated
    assert checkpoints.progress(10)["mine"] == 10


def test_a_hook_stops_the_run_where_all_is_saved(trainer, tmp_path):
  heard = _heard(trainer, tmp_path, 20, wants=[10], stops=10)
  # A state that is wanted is saved; whoever wanted it has it after a resume.
  assert heard[-5:] == ["save 10", "written 10", "save>", "<save 9", "save>"]
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest() == 10


def test_one_hook_that_stops_does_not_keep_others_from_being_asked():
  asked = []

  class Asked(Hook):
    def should_stop(self, done):
      asked.append(done)

    wants_state = should_stop

  first = _Listener([], wants=[1], stops=1)
  hooks = Hooks(first, Asked())
  assert hooks.should_stop(1) == "enough" and hooks.wants_state(1)
  assert asked == [1, 1]
