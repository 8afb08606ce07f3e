"""A watchdog: if a run hangs, prints all stacks and exits."""

import faulthandler
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from mdm_jax.core.errors import Exit

_TICKS = 20  # checks per limit, or more if that is over 10 seconds apart
# If some thread never releases the interpreter's lock, the watchdog's thread
# can't run either. Then faulthandler's, written in C, exits the process with
# code 1 after this many more seconds.
_GRACE = 60.0


class Watchdog:
  """Exits the process if `progress` isn't called for a while.

  Args:
    seconds: time limit without progress; 0 turns the watchdog off.
    describe: returns a description to print with the stacks; must not block.
    end: exits the process; takes an exit code and a reason.
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
    """Resets the time limit."""
    self._last = time.monotonic()

  def _watch(self) -> None:
    tick = min(self._seconds / _TICKS, 10.0)
    while not self._over.wait(tick):
      # Postpones faulthandler's exit, so it only happens if we stop running.
      faulthandler.dump_traceback_later(self._seconds + _GRACE, exit=True)
      idle = time.monotonic() - self._last
      if idle > self._seconds:
        faulthandler.cancel_dump_traceback_later()
        self._report(idle)
        return

  def _report(self, idle: float) -> None:
    reason = f"no progress for {idle:.0f} seconds"
    print(f"watchdog: {reason}; all stacks:", file=sys.stderr, flush=True)
    # The stacks first: describing may ask other processes, which takes seconds.
    faulthandler.dump_traceback(all_threads=True)
    reason = f"{reason}; {self._describe()}"
    print(f"error: watchdog: {reason}", file=sys.stderr, flush=True)
    self._end(Exit.ABORTED, reason)
