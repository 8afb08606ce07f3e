"""The workdir's lock, and the record of how attempts end, by real processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from mdm_jax.core import files
from mdm_jax.core.errors import (
  CrashLoop,
  Exit,
  NumericsError,
  StorageError,
  UserError,
  exit_code,
)
from mdm_jax.runtime import attempt as attempt_lib
from mdm_jax.runtime.attempt import Attempt

HOLDER = """
import sys, time
from etils import epath
from mdm_jax.runtime.attempt import Attempt
with Attempt(epath.Path(sys.argv[1]), "config", 3) as attempt:
  attempt.begin(4)
  attempt.update = 9
  attempt.commit(8)
  print("held", flush=True)
  time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path):
  return epath.Path(tmp_path)


def _attempt(folder, config="config", most=3):
  return Attempt(folder, config, most)


def _exit(folder):
  return files.read_json(folder / "exit.json")


def _die(folder, update=0, committed=0, start=0, code=None, config="config"):
  """Writes down an attempt that ended in some way."""
  line = {"number": 1, "start": start, "update": update, "config": config}
  line |= {"committed": committed, "code": code, "reason": "killed"}
  line |= {"seconds": {}, "started": 0.0, "beat": 0.0, "ended": True}
  files.append_line(folder / "attempts.jsonl", line)


@pytest.fixture
def holder(folder):
  """Another process that has the lock."""
  process = subprocess.Popen(
    [sys.executable, "-c", HOLDER, str(folder)],
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "held\n"
  yield process
  process.kill()
  process.wait()


def test_an_end_is_written_and_the_lock_given_back(folder):
  with _attempt(folder) as attempt:
    attempt.begin(4)
    attempt.update = 7
    attempt.commit(6)
    attempt.commit(5)  # an older one, told later
    assert files.read_json(folder / "lock.json")["pid"] == os.getpid()
  told = _exit(folder)
  assert told["code"] == 0 and told["name"] == "done"
  assert (told["start"], told["update"], told["committed"]) == (4, 7, 6)
  assert not (folder / "lock.json").exists()
  (line,) = files.read_lines(folder / "attempts.jsonl")
  assert line["ended"] and line["pid"] == os.getpid()
  assert sum(line["seconds"].values()) > 0


@pytest.mark.parametrize(
  ("error", "code"),
  [
    (UserError("wrong"), 2),
    (NumericsError("nan"), 3),
    (StorageError("full"), 4),
    (KeyboardInterrupt(), 42),
    (ZeroDivisionError("by zero"), 1),
  ],
)
def test_the_exit_code_is_the_errors(folder, error, code):
  assert exit_code(error) == code
  with pytest.raises(type(error)), _attempt(folder):
    raise error
  told = _exit(folder)
  assert told["code"] == code
  assert told["reason"] == (str(error) or type(error).__name__)
  assert ("ZeroDivisionError" in told.get("traceback", "")) == (code == 1)


def test_an_end_is_not_taken_for_the_next_ones(folder):
  with _attempt(folder):
    pass
  assert _exit(folder)["number"] == 1
  with _attempt(folder):
    assert _exit(folder) is None  # as after a kill
  assert _exit(folder)["number"] == 2


def test_an_end_waits_for_a_beat_that_is_being_written(folder, monkeypatch):
  """It once gave up there: no exit.json, and a lock of nobody."""
  monkeypatch.setattr(attempt_lib, "_BEAT", 0.05)
  began, go_on = threading.Event(), threading.Event()
  attempt = _attempt(folder)
  beat = attempt._beat

  def slow():
    began.set()
    assert go_on.wait(60)
    beat()

  monkeypatch.setattr(attempt, "_beat", slow)
  with attempt:
    assert began.wait(60)
    monkeypatch.setattr(attempt_lib, "_BEAT", 60.0)
    threading.Timer(0.3, go_on.set).start()
  assert _exit(folder)["code"] == 0
  assert not (folder / "lock.json").exists()


def test_attempts_are_numbered(folder):
  for number in (1, 2, 3):
    with _attempt(folder) as attempt:
      assert attempt.number == number
      assert len(attempt.before) == number - 1


def test_fault_23_a_second_run_is_refused_and_a_killed_one_replaced(
  folder, holder
):
  with pytest.raises(UserError) as refused, _attempt(folder):
    pass
  assert f"process {holder.pid} on {socket.gethostname()}" in str(refused.value)
  assert "s ago" in str(refused.value)
  assert not (folder / "exit.json").exists()  # it is the other one's
  assert holder.poll() is None
  holder.send_signal(signal.SIGKILL)
  holder.wait()
  with _attempt(folder) as attempt:
    (killed,) = attempt.before
    assert attempt.number == 2
  assert killed["pid"] == holder.pid
  assert (killed["code"], killed["reason"]) == (None, "killed")
  # Without waiting for a heartbeat, which comes every few seconds.
  assert (killed["start"], killed["update"]) == (4, 9)
  assert killed["committed"] == 8


def test_another_hosts_lock_is_respected_while_it_is_renewed(
  folder, monkeypatch
):
  lock = {"host": "elsewhere", "pid": 1, "born": "1", "beat": time.time()}
  lock |= {"committed": 0, "start": 0, "update": 0, "config": "config"}
  files.write_json(folder / "lock.json", lock)
  with pytest.raises(UserError, match="elsewhere"), _attempt(folder):
    pass
  lock["beat"] -= 61
  files.write_json(folder / "lock.json", lock)
  with _attempt(folder) as attempt:
    assert len(attempt.before) == 1


def test_a_number_given_to_another_process_is_not_its_owner(folder):
  """As in containers, where every first process has the same number."""
  with _attempt(folder):
    lock = files.read_json(folder / "lock.json")
  assert attempt_lib._born(os.getpid()) == lock["born"] is not None
  lock |= {"pid": os.getppid(), "born": "7"}
  files.write_json(folder / "lock.json", lock)
  with _attempt(folder) as attempt:
    assert attempt.before[-1]["code"] is None


def test_a_lock_cut_short_is_no_lock(folder):
  (folder / "lock.json").write_text('{"pid": 1, "ho')
  with _attempt(folder):
    pass
  assert _exit(folder)["code"] == 0


# MARK: crash loops


def test_fault_12_three_deaths_without_anything_new_end_it(folder):
  for _ in range(3):
    _die(folder, update=7)
  with pytest.raises(CrashLoop) as told, _attempt(folder):
    pass
  assert "after update 7" in str(told.value)
  assert "skip_updates=6:8" in str(told.value)
  assert _exit(folder)["code"] == 5
  assert not (folder / "lock.json").exists()
  with pytest.raises(CrashLoop), _attempt(folder):  # and stays so
    pass
  with _attempt(folder, config="another"):
    pass


@pytest.mark.parametrize(
  "between",
  [
    {"update": 9, "committed": 8},  # saved something
    {"config": "another"},  # somebody changed something
  ],
)
def test_what_is_no_crash_loop(folder, between):
  _die(folder)
  _die(folder)
  _die(folder, **between)
  _die(folder)
  with _attempt(folder) as attempt:
    assert attempt.number == 5
  assert _exit(folder)["code"] == 0


def test_a_stop_is_no_death(folder):
  for _ in range(5):
    _die(folder, code=int(Exit.STOPPED))
  with _attempt(folder):
    pass
  _die(folder)
  _die(folder, code=int(Exit.ABORTED))
  _die(folder, code=int(Exit.STOPPED))
  with _attempt(folder):
    pass
  _die(folder, code=int(Exit.BUG))
  with pytest.raises(CrashLoop), _attempt(folder):
    pass


def test_a_full_disk_does_not_change_the_exit_code(folder):
  attempt = _attempt(folder)
  with pytest.raises(NumericsError), attempt:
    os.symlink("/dev/full", folder / "attempts.jsonl")
    raise NumericsError("nan")
  assert not (folder / "lock.json").exists()


def test_only_what_is_whole_is_read(folder):
  with _attempt(folder):
    pass
  path = folder / "attempts.jsonl"
  path.write_text(path.read_text() + '{"number": 2, "ho')
  with _attempt(folder) as attempt:
    assert len(attempt.before) == 1
  assert [a["number"] for a in files.read_lines(path)] == [1, 2]
  assert json.loads(path.read_text().splitlines()[-1])["number"] == 2
