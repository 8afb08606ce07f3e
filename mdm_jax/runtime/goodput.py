"""Goodput accounting: the seconds of a run by cause.

Every second has exactly one cause, so the causes add up to the time since the
run's first start.
"""

import contextlib
import enum
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any


class Cause(enum.StrEnum):
  """What time was spent on."""

  INIT = "init"  # preparing rows, mesh and state: all that is none of the below
  COMPILE = "compile"  # compiling the updates and trying them out
  RESTORE = "restore"  # reading and verifying a checkpoint
  DATA = "data"  # waiting for rows
  TRAIN = "train"  # updates
  EVAL = "eval"  # held-out likelihood and samples
  SAVE = "save"  # the blocking part of a checkpoint's save
  WASTED = "wasted"  # updates that a kill lost, to be repeated
  DOWN = "down"  # between two attempts


class Ledger:
  """Accumulates seconds by cause, from its creation on.

  Args:
    clock: a monotonic clock, in seconds.

  Example:

    with ledger.spend(Cause.EVAL):
      evaluate()
    ledger.seconds()["eval"]
  """

  def __init__(self, clock: Callable[[], float] = time.monotonic):
    self._clock, self._lock = clock, threading.Lock()
    self._seconds = dict.fromkeys(Cause, 0.0)
    self._cause, self._since = Cause.INIT, clock()

  @contextlib.contextmanager
  def spend(self, cause: Cause) -> Iterator[None]:
    """Counts the block's time for a cause, except for nested blocks."""
    before = self._switch(cause)
    try:
      yield
    finally:
      self._switch(before)

  def seconds(self) -> dict[str, float]:
    """Returns the seconds by cause up to now. Thread-safe."""
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
  """Returns a run's seconds by cause, including downtime and lost work.

  Args:
    attempts: the records of the attempts, in order: `seconds` by cause,
      `started` and `beat` (its first and last sign of life, in seconds since
      the epoch), `start` and `update` (updates done at its start and end), and
      `committed` (updates saved).
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
  """Returns the share of time spent on updates that weren't lost."""
  return seconds[Cause.TRAIN] / max(sum(seconds.values()), 1e-9)


def _lost(attempt: Mapping[str, Any]) -> float:
  """Returns the seconds of updates after the last save, all taken as equal."""
  made = attempt["update"] - attempt["start"]
  lost = attempt["update"] - max(attempt["committed"], attempt["start"])
  if not attempt.get("ended") or made <= 0 or lost <= 0:
    return 0.0
  return attempt["seconds"].get(Cause.TRAIN, 0.0) * lost / made
