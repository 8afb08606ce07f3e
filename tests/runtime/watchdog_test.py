"""Watchdog: a process that hangs says where and ends; others are left alone."""

import json
import subprocess
import sys
import time

PROGRAM = """
import sys, threading, time
from etils import epath
from mdm_jax.runtime.session import Session

def stuck_here():
  {stuck}

with Session(epath.Path(sys.argv[1]), watchdog_seconds=2.0) as session:
  session.attempt.update = 17
  for _ in range(40):  # twice the limit, with progress
    session.check()
    time.sleep(0.1)
  print("worked", flush=True)
  {then}
"""


def _run(folder, stuck="time.sleep(600)", then="stuck_here()"):
  program = PROGRAM.format(stuck=stuck, then=then)
  began = time.monotonic()
  done = subprocess.run(
    [sys.executable, "-c", program, str(folder)],
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert "worked" in done.stdout, done.stderr
  return done, time.monotonic() - began


def _exit(folder):
  return json.loads((folder / "exit.json").read_text())


def test_fault_09_a_hang_is_reported_with_all_stacks(tmp_path):
  done, seconds = _run(tmp_path)
  assert done.returncode == 134
  assert seconds < 40
  assert "stuck_here" in done.stderr  # the stack
  assert "no progress for" in done.stderr
  assert "the last completed update was 17" in done.stderr
  told = _exit(tmp_path)
  assert (told["code"], told["name"]) == (134, "aborted")
  assert told["update"] == 17 and "no progress" in told["reason"]
  assert not (tmp_path / "lock.json").exists()


def test_a_run_that_progresses_is_left_alone(tmp_path):
  done, _ = _run(tmp_path, then="pass")
  assert done.returncode == 0, done.stderr
  assert _exit(tmp_path)["code"] == 0
