"""No hang is silent: without progress, all stacks are told and the run ends."""

import faulthandler
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from mdm_jax.core.errors import Exit

_TICKS = 20  # looks at the clock a limit, at most
# A thread that holds the interpreter's lock for ever stops Python's own
# threads too; then faulthandler's, which is C, ends the process (with 1).
_GRACE = 60.0


class Watchdog:
  """Ends a process that is not told of progress for a while.

  Args:
    seconds: that may pass without progress; 0 turns it off.
    describe: returns what is to be told beside the stacks; it must not block.
    end: ends the process, given an exit code and a reason.
  """

  def __init__(
    self,
    seconds: float,
    describe: Callable[[], str],
    end: Callable[[Exit, str], Any],
  ):
    self._seconds, self._describe, self._end = seconds, describe, end
    self._last = time.monotonic()
    self._over = threading.Event()

  def __enter__(self) -> "Watchdog":
    if self._seconds:
      threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
    return self

  def __exit__(self, *_: Any) -> None:
    self._over.set()
    if self._seconds:
      faulthandler.cancel_dump_traceback_later()

  def progress(self) -> None:
    """Tells that something was done."""
    self._last = time.monotonic()

  def _watch(self) -> None:
    tick = min(self._seconds / _TICKS, 10.0)
    while not self._over.wait(tick):
      faulthandler.dump_traceback_later(self._seconds + _GRACE, exit=True)
      idle = time.monotonic() - self._last
      if idle > self._seconds:
        faulthandler.cancel_dump_traceback_later()
        self._bark(idle)
        return

  def _bark(self, idle: float) -> None:
    reason = f"no progress for {idle:.0f} seconds"
    print(f"watchdog: {reason}; all stacks:", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(all_threads=True)
    reason = f"{reason}; {self._describe()}"
    print(f"error: watchdog: {reason}", file=sys.stderr, flush=True)
    self._end(Exit.ABORTED, reason)
