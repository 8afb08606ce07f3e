"""Buckets against real servers on this machine: files, lock, checkpoints."""

import os
import signal
import socket
import subprocess
import sys
import time

import command_harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import remote_harness
from etils import epath

from mdm_jax.checkpoints.checkpoint import Checkpoints
from mdm_jax.checkpoints.staging import Staging
from mdm_jax.core import buckets, distributed, files, safe_files
from mdm_jax.core.errors import StorageError, UserError
from mdm_jax.runtime.attempt import Attempt
from mdm_jax.training import writers as writers_lib
from mdm_jax.training.state import TrainState
from mdm_jax.workdir import Workdir

HOLDER = """
import sys, time
from etils import epath
from mdm_jax.runtime.attempt import Attempt
with Attempt(epath.Path(sys.argv[1]), "config", 3) as attempt:
  print("held", flush=True)
  time.sleep(600)
"""
READER = """
import sys
from etils import epath
from mdm_jax.core import files
print(files.read_json(epath.Path(sys.argv[1])))
"""


@pytest.fixture(scope="module", params=remote_harness.SERVERS)
def store(request, tmp_path_factory):
  """A store's environment, which is this process's too; packages cache it."""
  scheme = request.param
  if why_not := remote_harness.why_not(scheme):
    pytest.skip(why_not)
  log = tmp_path_factory.mktemp(scheme) / "log"
  with (
    remote_harness.serve(scheme, log) as env,
    pytest.MonkeyPatch.context() as patch,
  ):
    for name, value in env.items():
      patch.setenv(name, value)
    yield scheme, env


@pytest.fixture
def folder(store, request):
  """A folder of its own in the bucket."""
  name = request.node.name.translate(str.maketrans("[]", "__"))
  return epath.Path(f"{store[0]}://{remote_harness.BUCKET}/{name}")


# MARK: files


def test_files_are_those_of_a_folder(folder):
  assert files.names(folder) == [] and not files.exists(folder)
  files.make_folder(folder)
  files.write(folder / "a", b"old")
  files.write(folder / "a", b"new")
  files.write(folder / "empty", b"")
  files.write_json(folder / "below" / "deep" / "b.json", {"x": 1})
  assert files.read_text(folder / "a") == "new"
  assert files.read_json(folder / "below" / "deep" / "b.json") == {"x": 1}
  assert files.read_json(folder / "none.json") is None
  assert sorted(files.names(folder)) == ["a", "below", "empty"]
  assert files.sizes(folder) == {"a": 3, "empty": 0, "below/deep/b.json": 13}
  assert safe_files.read_bytes(folder / "a", most=3) == b"new"
  with pytest.raises(safe_files.UnsafeFile, match="can't be read"):
    safe_files.read_bytes(folder / "none")
  files.delete(folder / "a")
  files.delete(folder / "a")
  assert not files.exists(folder / "a") and files.exists(folder / "below")


def test_a_folder_moves_with_all_that_is_in_it(folder):
  for name in ("10/state/x", "10/manifest.json"):
    files.write(folder / "checkpoints" / name, name.encode())
  files.write(folder / "checkpoints" / "100" / "x", b"another")
  target = folder / "set_aside" / "10"
  files.move_folder(folder / "checkpoints" / "10", target)
  assert files.read_text(target / "state" / "x") == "10/state/x"
  assert files.sizes(target) == {"state/x": 10, "manifest.json": 16}
  assert files.names(folder / "checkpoints") == ["100"]


@pytest.mark.parametrize("end", [b"\0", b"\n", b"\r", b"\r\n"])
def test_a_folder_is_copied_here_and_back(folder, tmp_path, end):
  here = epath.Path(tmp_path)
  (here / "a" / "d").mkdir(parents=True)
  (here / "a" / "d" / "x").write_bytes(bytes(range(256)) + end)
  files.copy_files(here / "a", folder, files.sizes(here / "a"))
  files.copy_files(folder, here / "b", files.sizes(folder))
  same = (here / "a" / "d" / "x").read_bytes()
  assert (here / "b" / "d" / "x").read_bytes() == same


def test_what_others_write_is_seen(folder, store):
  """A listing that a package keeps would hide it."""
  files.write(folder / "checkpoints" / "1" / "x", b"")
  assert files.names(folder / "checkpoints") == ["1"]
  other = (
    "import sys; from etils import epath; from mdm_jax.core import files;"
    "files.write(epath.Path(sys.argv[1]), b'longer than before')"
  )
  for name in ("2/x", "1/x"):
    path = str(folder / "checkpoints" / name)
    subprocess.run([sys.executable, "-c", other, path], check=True)
  assert sorted(files.names(folder / "checkpoints")) == ["1", "2"]
  assert files.sizes(folder / "checkpoints") == {"1/x": 18, "2/x": 18}
  assert (folder / "checkpoints" / "1" / "x").stat().length == 18


# MARK: what grows


def test_lines_are_appended(folder):
  path = folder / "attempts.jsonl"
  assert files.read_lines(path) == []
  for number in range(3):
    files.append_line(path, {"number": number})
  assert files.read_lines(path) == [{"number": n} for n in range(3)]


def test_what_grows_is_what_was_flushed(folder):
  file = files.open_to_append(folder / "x", b"one\n")
  file.write("two\n")
  assert files.read_text(folder / "x") == "one\n"
  file.flush()
  assert files.read_text(folder / "x") == "one\ntwo\n"
  file.write(b"three\n")
  file.close()
  assert files.read_text(folder / "x") == "one\ntwo\nthree\n"


def _write(folder, steps, after=-1):
  """Writes points, as far as a kill would leave them."""
  # Two attempts of a second would share an event file's name.
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(writers_lib.os, "getpid", lambda: after)
    writers = writers_lib.Writers(folder, after)
  for step in steps:
    writers.write_scalars(step, {"train/loss": step / 2})
  return writers


def _events(folder, tmp_path):
  accumulators = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator"
  )
  here = remote_harness.download(folder / "tensorboard", tmp_path / "events")
  found = accumulators.EventAccumulator(str(here)).Reload()
  return [(e.step, e.value) for e in found.Scalars("train/loss")]


def test_curves_are_those_of_a_folder(folder, tmp_path):
  """Killed after a flush, then gone on with from update 3."""
  for place in (folder, epath.Path(tmp_path) / "local"):
    files.make_folder(place)
    killed = _write(place, (1, 2, 3, 4))
    killed.flush()
    _write(place, (4, 5), after=3).__exit__()
  expected = [{"step": s, "train/loss": s / 2} for s in range(1, 6)]
  assert files.read_lines(folder / "metrics.jsonl") == expected
  local = tmp_path / "local" / "metrics.jsonl"
  assert files.read_text(folder / "metrics.jsonl") == local.read_text()
  steps = [(step, step / 2) for step in range(1, 6)]
  assert _events(folder, tmp_path) == steps


def test_a_kill_loses_only_what_was_not_flushed(folder, tmp_path):
  writers = _write(folder, (1,))  # the first is written at once
  writers.write_scalars(2, {"train/loss": 1.0})
  assert [x["step"] for x in files.read_lines(folder / "metrics.jsonl")] == [1]
  writers.flush()
  writers.write_scalars(3, {"train/loss": 1.5})
  found = files.read_lines(folder / "metrics.jsonl")
  assert [line["step"] for line in found] == [1, 2]
  assert [step for step, _ in _events(folder, tmp_path)] == [1, 2]


# MARK: the lock


def test_a_second_run_is_refused_until_the_first_is_dead(folder):
  first = subprocess.Popen(
    [sys.executable, "-c", HOLDER, str(folder)],
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    assert first.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"in use by process {first.pid} on"):
      Attempt(folder, "config", 3).__enter__()
  finally:
    first.send_signal(signal.SIGKILL)
    first.wait()
  with Attempt(folder, "config", 3) as second:
    assert second.number == 2
  ended = files.read_lines(folder / "attempts.jsonl")
  assert [line["code"] for line in ended] == [None, 0]
  assert files.read_json(folder / "exit.json")["code"] == 0
  assert not files.exists(folder / "lock.json")


@pytest.mark.parametrize(("silent", "taken"), [(20.0, False), (70.0, True)])
def test_another_host_s_lock_is_taken_when_it_is_stale(silent, taken, folder):
  lock = {"host": f"not-{socket.gethostname()}", "pid": 1, "number": 1}
  lock |= {"beat": time.time() - silent, "start": 0, "update": 0}
  lock |= {"committed": 0, "config": "config", "seconds": {}, "started": 0.0}
  files.write_json(folder / "lock.json", lock)
  attempt = Attempt(folder, "config", 3)
  if taken:
    with attempt:
      assert files.read_json(folder / "lock.json")["pid"] == os.getpid()
  else:
    with pytest.raises(UserError, match="lock renewed 20 s ago"):
      attempt.__enter__()
    assert files.read_json(folder / "lock.json") == lock


def test_of_two_that_start_at_once_one_is_refused(folder):
  """Both have seen that there is no lock; the store lets one write it."""
  first, second = (Attempt(folder, "config", 3) for _ in range(2))
  first._take_over()
  second._take_over()
  first._claim()
  with pytest.raises(UserError, match="in use by a process that started"):
    second._claim()


# MARK: checkpoints


def _state(step):
  params = {"w": jnp.arange(6000.0) * step, "b": jnp.ones(3)}
  ema = jax.tree.map(lambda x: x / 3, params)
  return TrainState(jnp.int32(step), params, ema, {}, {})


def _save(folder, steps, keep=9):
  with Checkpoints(folder, keep_latest=keep) as checkpoints:
    for step in steps:
      checkpoints.save(step, _state(step), {"tokens_seen": step * 1.5})


def test_a_state_comes_back_to_the_bit(folder, mesh):
  _save(folder, (10, 20, 30), keep=2)
  with Checkpoints(folder) as checkpoints:
    assert files.names(folder / "checkpoints") == ["20", "30"]
    assert checkpoints.latest() == 30
    assert checkpoints.progress(30) == {"tokens_seen": 45.0}
    found = checkpoints.restore(30, jax.eval_shape(lambda: _state(30)))
  expected = jax.tree.leaves(_state(30))
  for a, b in zip(jax.tree.leaves(found), expected, strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_changed_byte_is_passed_over_and_set_aside(folder, mesh, capsys):
  _save(folder, (10, 20))
  sizes = files.sizes(folder / "checkpoints" / "20")
  path = folder / "checkpoints" / "20" / max(sizes, key=sizes.get)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 4
  files.write(path, bytes(content))
  with Checkpoints(folder) as checkpoints:
    assert checkpoints.latest() == 10
    checkpoints.set_aside_after(10)
  assert "checkpoint 20 is damaged" in capsys.readouterr().out
  assert files.names(folder / "checkpoints") == ["10"]
  assert files.sizes(folder / "set_aside" / "20") == sizes


def test_nothing_is_left_on_this_machine(folder, mesh, tmp_path, monkeypatch):
  monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
  _save(folder, (10,))
  with Checkpoints(folder) as checkpoints:
    checkpoints.restore(10, jax.eval_shape(lambda: _state(10)))
    on_disk = list(tmp_path.rglob("manifest.ocdbt"))
    assert bool(on_disk) == str(folder).startswith("s3")
  assert list(tmp_path.iterdir()) == []


# MARK: what can't work


def test_several_processes_are_refused_where_orbax_needs_a_disk(monkeypatch):
  monkeypatch.setattr(distributed, "count", lambda: 2)
  with pytest.raises(UserError, match="2 processes can't write .* use a gs://"):
    Staging(epath.Path("s3://bucket/run"))
  Staging(epath.Path("gs://bucket/run"))


def test_a_bucket_that_is_not_there(store):
  path = f"{store[0]}://no-such-bucket/run"
  began = time.monotonic()
  with pytest.raises(StorageError, match="there is no bucket no-such-bucket$"):
    Workdir(path).create()
  assert time.monotonic() - began < 5
  with pytest.raises(UserError, match="no run was started there"):
    Workdir(path).read_config()


def test_a_store_that_does_not_answer_is_no_missing_file(store, tmp_path):
  """A checkpoint that can't be read must not count as damaged."""
  scheme, _ = store
  if scheme == "gs":
    pytest.skip("gcsfs tries for 35 s; tests/remote_run_test.py has it")
  gone = remote_harness.environment(scheme, "http://127.0.0.1:9")
  began = time.monotonic()
  done = command_harness.call(
    *(tmp_path, os.environ | gone, "--mode=report"),
    f"--workdir={scheme}://{remote_harness.BUCKET}/run",
  )
  assert done.returncode == 4, done.stderr
  assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
  assert "can't be reached" in done.stderr
  path = f"{scheme}://{remote_harness.BUCKET}/run/manifest.json"
  done = subprocess.run(
    [sys.executable, "-c", READER, path],
    env=os.environ | gone,
    capture_output=True,
    text=True,
  )
  assert done.stderr.splitlines()[-1].startswith("mdm_jax.core.buckets.Store")
  assert time.monotonic() - began < 60


def test_without_credentials(store, tmp_path):
  scheme, env = store
  if scheme == "gs":
    pytest.skip("the emulator asks for none")
  env = {k: v for k, v in os.environ.items() if "SECRET" not in k}
  env |= {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}
  done = command_harness.call(
    *(tmp_path, env, "--mode=report"),
    f"--workdir={scheme}://{remote_harness.BUCKET}/run",
  )
  assert done.returncode == 4, done.stderr
  assert "credentials" in done.stderr and done.stderr.count("\n") == 1


def test_errors_of_a_block_are_left_as_they_are_on_a_disk(tmp_path):
  with pytest.raises(KeyError), buckets.reaching(tmp_path):
    raise KeyError("x")
