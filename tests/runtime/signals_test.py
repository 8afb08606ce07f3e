"""Signals at every place a program can be in: real processes, real signals."""

import signal
import subprocess
import sys
import time

import pytest

from mdm_jax.runtime.signals import StopRequest

LOOP = """
from mdm_jax.runtime.signals import StopRequest
import time
with StopRequest() as stop:
  stop.unsaved = lambda: True
  print("ready", flush=True)
  for _ in range(600):
    if stop.poll():
      time.sleep(1.0)  # saves
      print("saved after", stop.name, flush=True)
      raise SystemExit(42)
    time.sleep(0.05)
"""
# The main thread hears the signal, but comes to no poll.
BUSY = """
from mdm_jax.runtime.signals import StopRequest
import time
with StopRequest() as stop:
  stop.unsaved = lambda: {unsaved}
  print("ready", flush=True)
  time.sleep(600)
"""
COMPILING = """
import jax, jax.numpy as jnp
from mdm_jax.runtime.signals import StopRequest

@jax.jit
def slow(x):
  for i in range(1500):
    x = jnp.sin(x @ x + i)
  return x

with StopRequest() as stop:
  lowered = slow.lower(jnp.ones((8, 8)))
  print("ready", flush=True)
  while True:
    lowered.compile(compiler_options={"xla_backend_optimization_level": "3"})
"""


@pytest.fixture
def start():
  started = []

  def start(source):
    process = subprocess.Popen(
      [sys.executable, "-c", source],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    started.append(process)
    assert process.stdout.readline() == "ready\n"
    return process

  yield start
  for process in started:
    process.kill()
    process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_loop_saves_and_leaves(start, number):
  process = start(LOOP)
  process.send_signal(number)
  out, err = process.communicate(timeout=20)
  assert process.returncode == 42, err
  assert out == f"saved after {number.name}\n"


def test_fault_04_a_second_sigterm_does_not_disturb_the_save(start):
  process = start(LOOP)
  process.send_signal(signal.SIGTERM)
  time.sleep(0.2)
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=20)
  assert process.returncode == 42, err
  assert out == "saved after SIGTERM\n"


def test_fault_05_a_second_sigint_leaves_at_once(start):
  process = start(LOOP)
  process.send_signal(signal.SIGINT)
  time.sleep(0.3)
  process.send_signal(signal.SIGINT)
  out, err = process.communicate(timeout=20)
  assert process.returncode == 42, err
  assert "SIGINT twice" in out and "saved" not in out


def test_where_nothing_is_unsaved_it_leaves_without_a_poll(start):
  process = start(BUSY.format(unsaved=False))
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=20)
  assert process.returncode == 42, err
  assert "SIGTERM" in out


def test_where_something_is_unsaved_it_waits_for_the_poll(start):
  process = start(BUSY.format(unsaved=True))
  process.send_signal(signal.SIGTERM)
  with pytest.raises(subprocess.TimeoutExpired):
    process.wait(timeout=5)


def test_fault_03_it_leaves_inside_a_compilation(start):
  process = start(COMPILING)
  time.sleep(0.5)
  began = time.monotonic()
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=60)
  assert process.returncode == 42, err
  assert time.monotonic() - began < 15


def test_handlers_are_put_back():
  before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
  for _ in range(3):
    with StopRequest() as outer, StopRequest() as inner:
      signal.raise_signal(signal.SIGTERM)
      assert inner.poll() and inner.name == "SIGTERM"
      assert not outer.poll()
  now = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
  assert now == before
  assert signal.set_wakeup_fd(-1) == -1
