"""Checkpoints that are damaged, unfinished, unwanted or not finite."""

import dataclasses
import json
import math
import shutil
import time

import faults_harness as harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from mdm_jax.checkpoints import checkpoint as checkpoint_lib
from mdm_jax.checkpoints import manifest
from mdm_jax.checkpoints.checkpoint import Checkpoints
from mdm_jax.core.errors import NumericsError, StorageError, UserError
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.training.state import TrainState
from mdm_jax.weights import averaged_params

pytestmark = pytest.mark.usefixtures("mesh")


def _state(step, value=1.0):
  params = {"w": jnp.full((64, 32), value), "b": jnp.arange(5.0)}
  ema = jax.tree.map(lambda x: x / 2, params)
  return TrainState(jnp.asarray(step, jnp.int32), params, ema, {}, {})


def _measured(value, lower_is_better=True):
  head = {"name": "any", "value": value, "lower_is_better": lower_is_better}
  return {"headline": head, "another": 7.0}


def _save(folder, *steps, bounds=None, **options):
  """Saves some steps, and what was measured of those that were."""
  with Checkpoints(folder, **options) as checkpoints:
    for step in steps:
      checkpoints.save(step, _state(step, float(step)), {"tokens_seen": step})
      if bounds and step in bounds:
        checkpoints.record(step, _measured(bounds[step]))


def _restored(folder):
  """The newest step and the value its parameters have."""
  with Checkpoints(folder) as checkpoints:
    step = checkpoints.latest()
    like = jax.eval_shape(lambda: _state(0))
    state = checkpoints.restore(step, like)
    assert int(state.step) == step
    return step, float(state.params["w"][0, 0])


def _step(folder, step):
  return folder / "checkpoints" / str(step)


def _files(folder):
  return [p for p in folder.rglob("*") if p.is_file()]


# MARK: damage


def _truncate(folder):
  path = harness.largest_file(folder)
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _remove_a_file(folder):
  harness.largest_file(folder).unlink()


def _empty_the_folder(folder):
  shutil.rmtree(folder)
  folder.mkdir()


def _empty_its_metadata(folder):
  (folder / "state" / "_METADATA").write_bytes(b"")


def _change_the_manifest(folder):
  path = folder / "manifest.json"
  changed = path.read_text().replace('"tokens_seen": ', '"tokens_seen": 1')
  path.write_text(changed)


DAMAGE = {
  "fault_17_truncated": _truncate,
  "fault_17_missing": _remove_a_file,
  "fault_18_bit": lambda folder: harness.flip_a_bit(
    harness.largest_file(folder)
  ),
  "fault_19_empty_folder": _empty_the_folder,
  "fault_19_empty_metadata": _empty_its_metadata,
  "fault_19_no_manifest": lambda folder: (folder / "manifest.json").unlink(),
  "fault_19_manifest": _change_the_manifest,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_fault_damage_is_passed_over(kind, tmp_path, capsys):
  _save(tmp_path, 1, 2)
  assert _restored(tmp_path) == (2, 2.0)  # the control
  capsys.readouterr()
  DAMAGE[kind](_step(tmp_path, 2))
  assert _restored(tmp_path) == (1, 1.0)
  told = " ".join(capsys.readouterr().out.split())
  assert "checkpoint 2 is damaged (" in told


@pytest.mark.parametrize("kind", DAMAGE)
def test_fault_with_nothing_whole_left_it_refuses(kind, tmp_path):
  _save(tmp_path, 1, 2)
  for step in (1, 2):
    DAMAGE[kind](_step(tmp_path, step))
  with pytest.raises(StorageError, match="the last of update 2"):
    with Checkpoints(tmp_path) as checkpoints:
      checkpoints.latest()
  assert _step(tmp_path, 1).exists() and _step(tmp_path, 2).exists()


def test_fault_17_checkpoints_that_are_gone_are_not_forgotten(tmp_path):
  _save(tmp_path, 1)
  shutil.rmtree(tmp_path / "checkpoints")
  with pytest.raises(StorageError, match="another --workdir"):
    with Checkpoints(tmp_path) as checkpoints:
      checkpoints.latest()


def test_fault_18_every_bit_of_every_file_is_watched(tmp_path):
  _save(tmp_path, 1)
  folder = epath.Path(_step(tmp_path, 1))
  assert manifest.problem(folder) is None
  watched = 0
  for path in _files(_step(tmp_path, 1)):
    content = path.read_bytes()
    for place in {0, len(content) // 3, len(content) - 1} if content else ():
      broken = bytearray(content)
      broken[place] ^= 1
      path.write_bytes(bytes(broken))
      assert manifest.problem(folder), (path, place)
      watched += 1
    path.write_bytes(content)
  assert watched > 15 and manifest.problem(folder) is None


def test_fault_18_orbax_alone_would_not_notice(tmp_path):
  """Why there is a manifest: the same flip, restored in silence."""
  _save(tmp_path, 1)
  found = set()
  whole = harness.largest_file(_step(tmp_path, 1))
  content = whole.read_bytes()
  for place in range(0, len(content), max(len(content) // 40, 1)):
    broken = bytearray(content)
    broken[place] ^= 1
    whole.write_bytes(bytes(broken))
    try:
      found.add(len(harness.state_hash(tmp_path, 1)))
    except Exception:
      continue
  assert found  # at least one was read without an error


def test_a_damaged_best_is_not_the_best(tmp_path):
  _save(tmp_path, 1, 2, 3, bounds={1: 2.0, 2: 1.0, 3: 3.0}, keep_latest=3)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.best() == 2
  _truncate(_step(tmp_path, 2))
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.best() == 1


def test_a_damaged_best_is_never_read(tmp_path):
  _save(tmp_path, 1)
  harness.flip_a_bit(harness.largest_file(_step(tmp_path, 1)))
  with Checkpoints(tmp_path) as checkpoints, pytest.raises(StorageError):
    checkpoints.best()


def test_fault_24_a_newer_format_says_so(tmp_path, monkeypatch):
  monkeypatch.setattr(manifest, "FORMAT", manifest.FORMAT + 1)
  _save(tmp_path, 1)
  monkeypatch.undo()
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(UserError, match=r"by mdm_jax .*format 3.*newer one"):
      checkpoints.latest()


def test_fault_22_another_optimizer_has_no_state_here(tmp_path):
  _save(tmp_path, 1)
  wanted = dataclasses.replace(_state(0), opt_state={"momentum": jnp.ones(3)})
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(UserError, match="no opt_state/momentum.*init_from"):
      checkpoints.restore(1, jax.eval_shape(lambda: wanted))


# MARK: never finished, and not wanted


def test_fault_07_what_was_never_finished_is_no_damage(tmp_path, capsys):
  _save(tmp_path, 1)
  unfinished = _step(tmp_path, 2) / "state.orbax-checkpoint-tmp-3"
  unfinished.mkdir(parents=True)
  (unfinished / "d").write_bytes(b"half")
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest() == 1
    assert "checkpoint 2 is incomplete" in capsys.readouterr().out
    checkpoints.set_aside_after(1)
    assert not (tmp_path / "set_aside").exists()
    checkpoints.save(2, _state(2, 7.0), {})
  assert _restored(tmp_path) == (2, 7.0)


def test_fault_07_a_first_save_that_never_finished_is_a_fresh_start(tmp_path):
  (_step(tmp_path, 2) / "state").mkdir(parents=True)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest() is None
    checkpoints.set_aside_after(None)
    checkpoints.save(2, _state(2, 7.0), {})
  assert _restored(tmp_path) == (2, 7.0)


def test_what_is_not_wanted_is_kept_aside(tmp_path):
  _save(tmp_path, 1, 2)
  harness.flip_a_bit(harness.largest_file(_step(tmp_path, 2)))
  before = {p.name: p.read_bytes() for p in _files(_step(tmp_path, 2))}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.set_aside_after(checkpoints.latest())
    checkpoints.save(2, _state(2, 9.0), {})
  aside = tmp_path / "set_aside" / "2"
  assert {p.name: p.read_bytes() for p in _files(aside)} == before
  assert _restored(tmp_path) == (2, 9.0)


# MARK: which are kept


def test_the_newest_and_the_best_are_kept(tmp_path):
  bounds = {1: 3.0, 2: 2.0, 3: 2.5}
  _save(tmp_path, 1, 2, 3, 4, bounds=bounds, keep_latest=1)
  assert harness.steps(tmp_path) == [2, 4]
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest() == 4 and checkpoints.best() == 2
    assert checkpoints.progress(4) == {"tokens_seen": 4}


def test_the_best_is_by_what_an_evaluation_names(tmp_path):
  """More may be better; and what names nothing is not taken for a number."""
  with Checkpoints(tmp_path, keep_latest=1) as checkpoints:
    for step, value in {1: 0.2, 2: 0.7, 3: 0.5}.items():
      checkpoints.save(step, _state(step), {})
      checkpoints.record(step, _measured(value, lower_is_better=False))
    checkpoints.save(4, _state(4), {})
    checkpoints.wait()
    assert harness.steps(tmp_path) == [2, 4] and checkpoints.best() == 2
  path = _step(tmp_path, 2) / "evaluation.json"
  path.write_text(json.dumps({"another": 7.0}))
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(UserError, match="by an older version") as error:
      checkpoints.best()
  assert "\n" not in str(error.value)


def test_some_are_kept_for_good(tmp_path):
  _save(tmp_path, *range(1, 8), keep_latest=1, keep_every=3)
  assert harness.steps(tmp_path) == [3, 6, 7]


def test_fault_25_a_bound_that_is_no_number_is_never_the_best(tmp_path):
  """With losses 3, 2, nan, 2.5, nan, some libraries delete the true best."""
  bounds = {1: 3.0, 2: 2.0, 3: math.nan, 4: 2.5, 5: math.nan}
  _save(tmp_path, *bounds, bounds=bounds, keep_latest=1)
  assert harness.steps(tmp_path) == [2, 5]
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.best() == 2


def test_fault_25_damaged_steps_are_not_counted_as_kept(tmp_path):
  _save(tmp_path, 1, 2)
  _truncate(_step(tmp_path, 2))
  with Checkpoints(tmp_path, keep_latest=2) as checkpoints:
    checkpoints.save(3, _state(3), {})
  # Of three folders two are whole, and both are kept.
  assert harness.steps(tmp_path) == [1, 2, 3]
  with Checkpoints(tmp_path, keep_latest=2) as checkpoints:
    checkpoints.save(4, _state(4), {})
  assert harness.steps(tmp_path) == [2, 3, 4]


# MARK: saves that fail


@pytest.mark.parametrize("part", ["params", "ema_params", "opt_state"])
def test_fault_27_what_is_not_finite_is_not_saved(part, tmp_path):
  _save(tmp_path, 1)
  broken = {"w": jnp.array([1.0, jnp.nan])}
  state = dataclasses.replace(_state(2), **{part: broken})
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(NumericsError, match="update 2 .* checkpoint is 1"):
      checkpoints.latest()
      checkpoints.save(2, state, {})
  assert harness.steps(tmp_path) == [1]


def _failing(*_, **__):
  raise OSError(28, "No space left on device")


def test_fault_13_a_save_that_fails_later_is_raised_once_and_for_all(
  tmp_path, monkeypatch
):
  _save(tmp_path, 1)
  monkeypatch.setattr(manifest, "write", _failing)
  checkpoints = Checkpoints(tmp_path)
  assert checkpoints.latest() == 1
  checkpoints.save(2, _state(2), {})
  with pytest.raises(StorageError, match=r"checkpoint 2 .*one is 1"):
    checkpoints.close()
  with Checkpoints(tmp_path) as again:
    assert again.latest() == 1


def test_fault_13_the_loop_hears_of_it_soon(tmp_path, monkeypatch):
  monkeypatch.setattr(manifest, "write", _failing)
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(2, _state(2), {})
  with pytest.raises(StorageError):
    for _ in range(1000):
      checkpoints.check_save()
      time.sleep(0.01)


def test_fault_13_an_error_that_is_reported_is_not_replaced(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(manifest, "write", _failing)
  with pytest.raises(ZeroDivisionError), Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(2, _state(2), {})
    raise ZeroDivisionError


def test_fault_13_room_is_looked_for_first(tmp_path, monkeypatch):
  _save(tmp_path, 1)
  free = lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.latest()
    monkeypatch.setattr(checkpoint_lib.shutil, "disk_usage", free)
    with pytest.raises(StorageError, match="no space for checkpoint 2"):
      checkpoints.save(2, _state(2), {})
  assert harness.steps(tmp_path) == [1]


def test_every_step_is_logged_with_its_size(tmp_path):
  told = []
  _save(tmp_path, 1, 2, on_sealed=told.append)
  lines = [
    json.loads(line)
    for line in (tmp_path / "checkpoints.jsonl").read_text().splitlines()
  ]
  assert [line["step"] for line in lines] == [1, 2] == told
  size = sum(p.stat().st_size for p in _files(_step(tmp_path, 2)))
  own = (_step(tmp_path, 2) / "manifest.json").stat().st_size
  assert lines[1]["bytes"] == size - own


def test_what_was_saved_comes_back_bit_for_bit(tmp_path):
  values = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
  values[0, :3] = -0.0, 1e-45, 3e38
  state = dataclasses.replace(_state(3), params={"w": jnp.asarray(values)})
  like = jax.eval_shape(lambda: state)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(3, state, {})
  with Checkpoints(tmp_path) as checkpoints:
    restored = checkpoints.restore(3, like)
  found = np.asarray(restored.params["w"])
  np.testing.assert_array_equal(found.view(np.int32), values.view(np.int32))


# MARK: beside a training that deletes what is being read


def _before(monkeypatch, owner, name, step, folder):
  """Has a step deleted as training does it, once, before a call."""
  original, deleted = getattr(owner, name), []

  def wrapped(*args, **kwargs):
    if not deleted and _step(folder, step).exists():
      deleted.append((_step(folder, step) / "manifest.json").unlink())
      shutil.rmtree(_step(folder, step))
    return original(*args, **kwargs)

  monkeypatch.setattr(owner, name, wrapped)


@pytest.mark.parametrize(
  "owner, name",
  [
    (manifest, "read"),
    (manifest, "_hash"),
    (Checkpoints, "check"),
    (checkpoint_lib, "_placed"),  # checked already
  ],
)
def test_found_C8_a_step_that_is_deleted_meanwhile_is_passed_over(
  owner, name, tmp_path, tiny_model, monkeypatch, capsys
):
  denoiser = Denoiser(tiny_model, Vocabulary(300))
  with Checkpoints(tmp_path) as checkpoints:
    for step in (1, 2):
      params = jax.tree.map(
        lambda p: jnp.full_like(p, step),  # noqa: B023
        denoiser.init(jax.random.key(0)),
      )
      checkpoints.save(step, {"ema_params": params, "other": params}, {})
      checkpoints.record(step, _measured(3.0 - step))
  with Checkpoints(tmp_path) as checkpoints:
    _before(monkeypatch, owner, name, 2, tmp_path)
    step, params = averaged_params(checkpoints, denoiser)
    assert step == 1 == checkpoints.latest()
    assert all((leaf == 1).all() for leaf in jax.tree.leaves(params))
    assert checkpoints.progress(step) == {}
  told = capsys.readouterr().out
  assert told == "checkpoint 2 was deleted by another process: skipping it\n"


def test_a_step_that_comes_while_the_last_one_goes_is_found(
  tmp_path, monkeypatch
):
  _save(tmp_path, 1, 2)
  kept = tmp_path / "kept"
  _step(tmp_path, 2).rename(kept)
  original = manifest.problem

  def problem(folder):
    if kept.exists():
      kept.rename(_step(tmp_path, 2))
      shutil.rmtree(_step(tmp_path, 1))
    return original(folder)

  monkeypatch.setattr(manifest, "problem", problem)
  assert _restored(tmp_path) == (2, 2.0)
