"""Faults of docs/reliability.md that need the whole program, in real processes.

Every test's number is that of the fault's row. The control is the run that
nobody hurts: what a test compares with, and what shows that it can fail.
"""

import json
import pydoc
import shutil
import signal
import time

import faults_harness as harness
import pytest

MOST = ("--config.train.keep_latest=9",)


@pytest.fixture(scope="session")
def place(tmp_path_factory):
  folder = tmp_path_factory.mktemp("faults")
  return harness.make_place(folder, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def whole(place):
  """The run that nobody hurt, all its checkpoints kept."""
  ended = place.run("whole", *MOST)
  assert ended.code == 0, ended.err
  return ended


@pytest.fixture
def half(place, whole, request):
  """The same run, as it was after 20 updates, 10 and 20 being saved."""
  return _half(place, request.node.name.replace("[", "_").strip("]"))


def _half(place, name):
  workdir = shutil.copytree(place.workdir("whole"), place.workdir(name))
  for step in (30, 40):
    shutil.rmtree(workdir / "checkpoints" / str(step))
  (workdir / "results.json").unlink()
  logged = (workdir / "checkpoints.jsonl").read_text().splitlines()
  (workdir / "checkpoints.jsonl").write_text("\n".join(logged[:2]) + "\n")
  return workdir


def _slow(seconds=0.05):
  return harness.SLOW_UPDATES.format(seconds=seconds)


def _check_same(place, workdir):
  """A run that was hurt has every bit of the one that was not."""
  expected = harness.numbers(place.workdir("whole"))
  found = harness.numbers(workdir)
  assert [line["step"] for line in found] == [x["step"] for x in expected]
  assert found == expected
  last = harness.UPDATES
  assert harness.state_hash(workdir, last) == harness.state_hash(
    place.workdir("whole"), last
  )
  a, b = (
    json.loads((w / "results.json").read_text())
    for w in (workdir, place.workdir("whole"))
  )
  for name in ("nelbo_per_token", "ce_by_mask_rate", "samples", "tokens_seen"):
    assert a[name] == b[name], name


def _points(workdir):
  """TensorBoard's steps of the loss, as it shows them."""
  accumulators = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator"
  )
  found = accumulators.EventAccumulator(str(workdir / "tensorboard"))
  return [e.step for e in found.Reload().Scalars("train/loss")]


# MARK: the flagship


def test_fault_01_06_stops_and_kills_change_no_bit(place, whole):
  """SIGTERM, then SIGKILL between saves, then SIGINT: not one bit differs."""
  name, workdir = "hurt", place.workdir("hurt")
  process = place.start(name, *MOST, patch=_slow())
  process.wait_for_update(12)
  process.signal(signal.SIGTERM)
  stopped = process.end()
  assert stopped.code == 42, stopped.err
  at = stopped.exit["update"]
  assert 12 <= at < 16 and stopped.exit["committed"] == at
  assert f"SIGTERM: saved update {at} of 40" in stopped.said

  process = place.start(name, *MOST, patch=_slow())
  process.wait_for_checkpoint(20)
  process.wait_for_update(23)
  assert process.kill().code == -signal.SIGKILL
  assert harness.steps(workdir)[-1] == 20

  process = place.start(name, *MOST, patch=_slow())
  process.wait_for_update(33)
  process.signal(signal.SIGINT)
  process.signal(signal.SIGTERM)
  assert process.end().code == 42

  ended = place.run(name, *MOST)
  assert ended.code == 0, ended.err
  _check_same(place, workdir)
  assert _points(workdir) == list(range(1, harness.UPDATES + 1))
  attempts = [
    json.loads(line)
    for line in (workdir / "attempts.jsonl").read_text().splitlines()
  ]
  assert [a["code"] for a in attempts] == [42, None, 42, 0]
  assert [a["start"] for a in attempts[:3]] == [0, at, 20]


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["opt_state", "ema_params", "params", "step"])
def test_the_flagship_would_see_what_is_lost(lost, place, half):
  """Without one part of the state, a resumed run is another run."""
  patch = f"""
import dataclasses
import jax.numpy as jnp
from mdm_jax.checkpoints.checkpoint import Checkpoints
_restore = Checkpoints.restore
def restore(self, step, like, partial=False):
  state = _restore(self, step, like, partial)
  if partial:
    return state
  import jax
  lose = lambda x: jnp.zeros_like(x) if {lost!r} != "step" else x + 1
  part = jax.tree.map(lose, state.{lost})
  return dataclasses.replace(state, {lost}=part)
Checkpoints.restore = restore
"""
  ended = place.run(half.name, *MOST, patch=patch)
  assert ended.code == 0, ended.err
  with pytest.raises(AssertionError):
    _check_same(place, half)


VARIANTS = {
  "dropout": ["--config.model.dropout=0.2"],
  "accumulation": ["--config.optimizer.accumulation=2"],
  "points_of_seven": ["--config.train.log_every=7"],
  "guard": ["--config.train.spike_sigmas=3", "--config.train.spike_window=8"]
  + ["--config.train.max_skipped=40"],  # so short a window skips many
  "nelbo": ["--config.objective.weighting=nelbo"]
  + ["--config.stages[0].mask_rate=None"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_fault_01_06_in_every_variant(name, place):
  args = [*MOST, *VARIANTS[name]]
  expected = place.run(f"{name}_whole", *args)
  assert expected.code == 0, expected.err
  process = place.start(name, *args, patch=_slow())
  process.wait_for_checkpoint(10)
  process.wait_for_update(13)
  process.signal(signal.SIGTERM)
  assert process.end().code == 42
  process = place.start(name, *args, patch=_slow())
  process.wait_for_checkpoint(20)
  process.kill()
  assert place.run(name, *args).code == 0
  a, b = (place.workdir(w) for w in (name, f"{name}_whole"))
  assert harness.numbers(a) == harness.numbers(b)
  assert harness.state_hash(a, 40) == harness.state_hash(b, 40)


# MARK: signals where nothing polls

SLEEPS = {
  "preparing": ("mdm_jax.start", "prepare_on_all"),
  "restoring": ("mdm_jax.checkpoints.checkpoint.Checkpoints", "restore"),
  "evaluating": ("mdm_jax.evaluate.Measures", "validation"),
  "sampling": ("mdm_jax.sampled_texts.SampledTexts", "sample"),
}
SLEEP = """
import pathlib, pydoc, time
home = pydoc.locate({home!r})
_call = getattr(home, {name!r})
def call(*args, **kwargs):
  pathlib.Path({marker!r}).touch()
  time.sleep(600)
setattr(home, {name!r}, call)
"""


@pytest.mark.parametrize("home,name", SLEEPS.values())
def test_sleeps_are_put_where_something_is(home, name):
  assert callable(getattr(pydoc.locate(home), name))


@pytest.mark.parametrize(
  "where",
  [
    "evaluating",
    *(pytest.param(w, marks=pytest.mark.slow) for w in SLEEPS if w[0] != "e"),
  ],
)
def test_fault_03_a_signal_is_answered_everywhere(where, place, half):
  home, name = SLEEPS[where]
  marker = place.folder / f"{half.name}.reached"
  patch = SLEEP.format(home=home, name=name, marker=str(marker))
  process = place.start(half.name, *MOST, patch=patch)
  process.wait_for(marker.exists)
  began = time.monotonic()
  process.signal(signal.SIGTERM)
  ended = process.end()
  assert ended.code == 42, ended.err
  assert time.monotonic() - began < 15
  assert ended.exit["code"] == 42
  evaluated = [x["step"] for x in harness.lines(half) if "eval/rows" in x]
  assert 40 not in evaluated  # nothing half measured is logged
  if where in ("evaluating", "sampling"):
    assert ended.exit["committed"] == 40
    assert place.run(half.name, *MOST).code == 0
    _check_same(place, half)


# MARK: death

RAISE = """
from mdm_jax.training.trainer import Trainer
_update = Trainer.update
def update(self, state, update, *args):
  if update == {at}:
    {what}
  return _update(self, state, update, *args)
Trainer.update = update
"""


@pytest.mark.slow
def test_fault_07_killed_while_saving(place, half):
  patch = """
import os
import orbax.checkpoint as ocp
_save = ocp.AsyncCheckpointer.save
def save(self, directory, *args, **kwargs):
  _save(self, directory, *args, **kwargs)
  if "30" in str(directory):
    os.kill(os.getpid(), 9)
ocp.AsyncCheckpointer.save = save
"""
  assert place.run(half.name, *MOST, patch=patch).code == -signal.SIGKILL
  assert not (half / "checkpoints" / "30" / "manifest.json").exists()
  ended = place.run(half.name, *MOST)
  assert ended.code == 0, ended.err
  assert "at update 20" in ended.said
  _check_same(place, half)


@pytest.mark.slow
def test_fault_09_a_hang_in_the_loop_is_reported(place, half):
  patch = RAISE.format(at=25, what="import time; time.sleep(600)")
  # Longer than a compilation on a busy machine takes.
  ended = place.run(
    half.name, "--config.train.watchdog_seconds=20", patch=patch
  )
  assert ended.code == 134
  assert "in update" in ended.err  # where it sleeps
  assert ended.exit["update"] == 25
  assert "no progress" in ended.exit["reason"]


@pytest.mark.slow
def test_fault_11_an_error_with_a_save_pending_ends_the_process(place, half):
  failing = """
from mdm_jax.checkpoints import manifest
def write(*args):
  raise OSError(28, "No space left on device")
manifest.write = write
"""
  began = time.monotonic()
  bug = RAISE.format(at=30, what="raise ZeroDivisionError('a bug')")
  ended = place.run(half.name, *MOST, patch=failing + bug)
  assert ended.code == 1, ended.err
  assert time.monotonic() - began < 90
  assert ended.err.strip().endswith("ZeroDivisionError: a bug")
  assert "ZeroDivisionError" in ended.exit["traceback"]
  assert ended.exit["committed"] == 20


@pytest.mark.slow
def test_fault_12_a_crash_loop_is_ended(place, half):
  patch = RAISE.format(at=25, what="raise ZeroDivisionError('a bug')")
  for _ in range(3):
    ended = place.run(half.name, *MOST, patch=patch)
    assert ended.code == 1, ended.err
  began = time.monotonic()
  ended = place.run(half.name, *MOST, patch=patch)
  assert ended.code == 5
  assert time.monotonic() - began < 30
  assert (
    ended.err.startswith("error: 3 attempts") and ended.err.count("\n") == 1
  )
  rows = json.loads((half / "attempts.jsonl").read_text().splitlines()[-2])
  assert str(rows["rows"]) in ended.err
  # What it advises works: without the update it gets through.
  ended = place.run(
    half.name, *MOST, "--config.train.skip_updates=24:26", patch=patch
  )
  assert ended.code == 0, ended.err
  assert "train.skip_updates" in ended.said


# MARK: storage

LIMIT = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from mdm_jax.checkpoints.checkpoint import Checkpoints
_save = Checkpoints.save
def save(self, step, state, progress):
  if step == 30:
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
  _save(self, step, state, progress)
Checkpoints.save = save
"""


def test_fault_13_a_full_disk_ends_it_and_loses_nothing(place, half):
  ended = place.run(half.name, *MOST, patch=LIMIT)
  assert ended.code == 4, ended.err
  # Threads of the array library write to the same stream, into the same line.
  assert "error: checkpoint 30 could not be saved" in ended.err
  reason = ended.exit["reason"]
  assert reason.startswith("checkpoint 30 could not be saved")
  assert reason.endswith("the last good one is 20")
  ended = place.run(half.name, *MOST)
  assert ended.code == 0 and "at update 20" in ended.said
  _check_same(place, half)


@pytest.mark.slow
def test_fault_14_curves_on_a_full_disk_are_left_out(place, half):
  patch = """
from mdm_jax.training.writers import JsonlWriter
_init = JsonlWriter.__init__
def init(self, *args):
  _init(self, *args)
  self._file = open("/dev/full", "w")
JsonlWriter.__init__ = init
"""
  ended = place.run(half.name, *MOST, patch=patch)
  assert ended.code == 0, ended.err
  assert ended.err.count("the run continues without it") == 1
  assert harness.last_update(half) == 20
  assert harness.steps(half)[-1] == harness.UPDATES
  assert _points(half) == list(range(1, harness.UPDATES + 1))


@pytest.mark.parametrize("path", ["/dev/null/x", "tiny.py/x", "tiny.py"])
def test_fault_15_a_workdir_that_can_not_be_written(path, place):
  began = time.monotonic()
  ended = place.run(path)
  assert ended.code == 4, ended.err
  assert time.monotonic() - began < 30
  assert ended.err.startswith(f"error: workdir {path} can't be written by ")
  assert "errno" in ended.err and ended.err.count("\n") == 1


def test_fault_16_a_bucket_without_its_package(place):
  patch = "import sys; sys.modules['gcsfs'] = None"
  ended = place.start("gs://bucket/run", patch=patch).end()
  assert ended.code == 2, ended.err
  assert "pip install -e '.[gs]'" in ended.err
  assert ended.err.count("\n") == 1


def test_fault_17_18_a_damaged_newest_is_not_loaded(place, half):
  newest = half / "checkpoints" / "20"
  harness.flip_a_bit(harness.largest_file(newest))
  ended = place.run(half.name, *MOST)
  assert ended.code == 0, ended.err
  assert "checkpoint 20 is damaged" in ended.said
  assert "at update 10" in ended.said
  assert (half / "set_aside" / "20").exists()
  _check_same(place, half)


@pytest.mark.slow
def test_fault_17_with_nothing_whole_nothing_is_overwritten(place, half):
  for step in (10, 20):
    harness.largest_file(half / "checkpoints" / str(step)).unlink()
  before = sorted(p.name for p in (half / "checkpoints").rglob("*"))
  ended = place.run(half.name, *MOST)
  assert ended.code == 4, ended.err
  assert "none of them is intact" in ended.said
  assert sorted(p.name for p in (half / "checkpoints").rglob("*")) == before
  assert ended.exit["code"] == 4


# MARK: another config


def test_fault_20_21_another_run_s_settings_are_refused(place, half):
  before = (half / "config.json").read_text()
  began = time.monotonic()
  ended = place.run(
    half.name,
    *("--config.model.embed_dim=32", "--config.seed=1"),
    "--config.optimizer.learning_rate=1e-3",
  )
  assert ended.code == 2, ended.err
  assert time.monotonic() - began < 30  # nothing was compiled
  assert "model.embed_dim  16     32" in ended.err
  assert "seed" in ended.err and "learning_rate" not in ended.err
  assert "Traceback" not in ended.err
  assert (half / "config.json").read_text() == before
  assert ended.exit["code"] == 2 and ended.exit["committed"] == 20


@pytest.mark.slow
def test_fault_21_harmless_settings_are_reported_and_kept(place, half):
  args = [*MOST, "--config.optimizer.learning_rate=1e-3"]
  ended = place.run(half.name, *args)
  assert ended.code == 0, ended.err
  assert "warning: settings changed from update 20 on" in ended.said
  assert "optimizer.learning_rate 0.003 0.001" in ended.said
  kept = [
    x["config_changes"] for x in harness.lines(half) if "config_changes" in x
  ]
  assert len(kept) == 1 and "0.001" in kept[0]
  assert (
    json.loads((half / "config.json").read_text())["optimizer"]["learning_rate"]
    == 1e-3
  )
  with pytest.raises(AssertionError):  # the control: it is another run now
    _check_same(place, half)


def test_fault_34_another_text_is_not_gone_on_with(place, half):
  path = place.folder / "text" / "signal.txt"
  text = path.read_text()
  path.write_text(text + "One more line.\n")
  try:
    ended = place.run(half.name, *MOST)
  finally:
    path.write_text(text)
  assert ended.code == 2, ended.err
  assert "was started with another text" in ended.err
  assert ended.err.count("\n") == 1
  assert ended.exit["committed"] == 20


# MARK: numerics

NAN = """
import dataclasses
import jax.numpy as jnp
from mdm_jax.objectives.masked import Masked
_examples = Masked.examples
def examples(self, batch, draws):
  found = _examples(self, batch, draws)
  bad = jnp.isin(draws._step, jnp.array({steps}))
  weights = jnp.where(bad, jnp.inf, found.weights)
  return dataclasses.replace(found, weights=weights)
Masked.examples = examples
"""


@pytest.mark.slow
def test_fault_26_one_bad_update_is_skipped_and_reported(place, half):
  ended = place.run(half.name, *MOST, patch=NAN.format(steps=[24]))
  assert ended.code == 0, ended.err
  assert "update 25: not finite" in ended.said and "rows" in ended.said
  logged = {x["step"]: x for x in harness.lines(half) if "train/skipped" in x}
  assert logged[25]["train/skipped"] == 1 == logged[25]["train/nonfinite"]
  assert "train/loss" not in logged[25]  # no number, no point
  assert logged[26]["train/skipped"] == 0
  assert logged[40]["health/nonfinite_total"] == 1


@pytest.mark.slow
def test_fault_27_many_bad_updates_end_it_with_a_report(place, half):
  ended = place.run(
    half.name, *MOST, patch=NAN.format(steps=list(range(24, 60)))
  )
  assert ended.code == 3, ended.err
  assert ended.err.splitlines()[-1].startswith("error: updates 25 to 27")
  assert harness.steps(half) == [10, 20]
  report = json.loads((half / "numerics_report" / "report.json").read_text())
  assert [u["update"] for u in report["updates"]] == [24, 25, 26]
  assert ended.exit["code"] == 3
  # What it advises works.
  ended = place.run(
    *(half.name, *MOST, "--config.train.skip_updates=24:27"),
    patch=NAN.format(steps=[24, 25, 26]),
  )
  assert ended.code == 0, ended.err
  assert "not finite" not in ended.said


@pytest.mark.slow
def test_fault_28_back_to_a_checkpoint_and_past_the_spike(place, half):
  args = [
    *(*MOST, "--config.train.restore_step=10"),
    "--config.train.skip_updates=14:18",
  ]
  process = place.start(half.name, *args, patch=_slow())
  process.wait_for_checkpoint(30)
  process.kill()
  assert (half / "set_aside" / "20").exists()
  ended = place.run(half.name, *args)  # the same command goes on
  assert ended.code == 0, ended.err
  assert "at update 30" in ended.said
  steps = [x["step"] for x in harness.lines(half) if "train/loss" in x]
  assert steps == [*range(1, 15), *range(19, 41)]
  saved = json.loads((half / "config.json").read_text())["train"]
  assert saved["skip_updates"] == "14:18" and saved["restore_step"] == 10


def test_fault_28_a_step_that_is_not_there(place, half):
  ended = place.run(half.name, "--config.train.restore_step=15")
  assert ended.code == 2
  assert "it has: 10, 20" in ended.err and ended.err.count("\n") == 1


WRONG = """
import dataclasses
import jax
from mdm_jax.training.trainer import Trainer
_update, _made = Trainer.update, []
def update(self, state, update, *args):
  state, metrics = _update(self, state, update, *args)
  _made.append(update)
  if {wrong} and update == 29 and _made.count(29) == {time}:
    up = lambda x: jax.numpy.nextafter(x, x + 1)
    ema = jax.tree.map(up, state.ema_params)
    state = dataclasses.replace(state, ema_params=ema)
  return state, metrics
Trainer.update = update
"""


@pytest.mark.slow
@pytest.mark.parametrize("first", [1, 2])
def test_fault_29_a_machine_that_computes_wrongly_is_found(first, place, half):
  args = [*MOST, "--config.train.recheck_every=5"]
  ended = place.run(half.name, *args, patch=WRONG.format(wrong=1, time=first))
  assert ended.code == 3, ended.err
  assert "error: update 30, computed twice" in ended.err
  assert harness.steps(half) == [10, 20]
  # The control: the same, computed rightly, is the run that nobody checked.
  ended = place.run(half.name, *args, patch=WRONG.format(wrong=0, time=first))
  assert ended.code == 0, ended.err
  _check_same(place, half)
