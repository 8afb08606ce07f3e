"""Where the time goes: every second of a run has exactly one cause."""

import contextlib
import enum
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any


class Cause(enum.StrEnum):
  """What a second was spent on."""

  INIT = "init"  # rows, mesh, restoring nothing
  COMPILE = "compile"  # compiling and trying the updates out
  RESTORE = "restore"  # reading and verifying a checkpoint
  DATA = "data"  # waiting for rows
  TRAIN = "train"  # updates
  EVAL = "eval"  # likelihoods and samples
  SAVE = "save"  # what a checkpoint blocks
  WASTED = "wasted"  # updates that were lost, and made again
  DOWN = "down"  # between two attempts


class Ledger:
  """Counts seconds by cause; they add up to the time since it was made.

  Args:
    clock: seconds, monotonic.
  """

  def __init__(self, clock: Callable[[], float] = time.monotonic):
    self._clock, self._lock = clock, threading.Lock()
    self._seconds = dict.fromkeys(Cause, 0.0)
    self._cause, self._since = Cause.INIT, clock()

  @contextlib.contextmanager
  def spend(self, cause: Cause) -> Iterator[None]:
    """Counts the block's seconds for one cause, but for inner blocks'."""
    before = self._switch(cause)
    try:
      yield
    finally:
      self._switch(before)

  def seconds(self) -> dict[str, float]:
    """Returns the seconds of every cause up to now; any thread may ask."""
    with self._lock:
      self._settle()
      return {str(cause): value for cause, value in self._seconds.items()}

  def _switch(self, cause: Cause) -> Cause:
    with self._lock:
      self._settle()
      before, self._cause = self._cause, cause
      return before

  def _settle(self) -> None:
    now = self._clock()
    self._seconds[self._cause] += now - self._since
    self._since = now


def total(attempts: Iterable[Mapping[str, Any]]) -> dict[str, float]:
  """Adds up a run's attempts, with the time between and the work lost.

  Args:
    attempts: in order, each with `seconds` by cause, `started` and `beat`
      (times of day), `start` and `update` (its first and last update), and
      `committed` (the last one saved).
  """
  seconds, ended = dict.fromkeys(map(str, Cause), 0.0), None
  for attempt in attempts:
    for cause, value in attempt["seconds"].items():
      seconds[cause] = seconds.get(cause, 0.0) + value
    lost = _lost(attempt)
    seconds[Cause.TRAIN] -= lost
    seconds[Cause.WASTED] += lost
    if ended is not None:
      seconds[Cause.DOWN] += max(attempt["started"] - ended, 0.0)
    ended = attempt["beat"]
  return seconds


def goodput(seconds: Mapping[str, float]) -> float:
  """Returns the share of the time in which updates were made that count."""
  return seconds[Cause.TRAIN] / max(sum(seconds.values()), 1e-9)


def _lost(attempt: Mapping[str, Any]) -> float:
  """Seconds of the updates after the last saved one, were they all alike."""
  made = attempt["update"] - attempt["start"]
  lost = attempt["update"] - max(attempt["committed"], attempt["start"])
  if not attempt.get("ended") or made <= 0 or lost <= 0:
    return 0.0
  return attempt["seconds"].get(Cause.TRAIN, 0.0) * lost / made
