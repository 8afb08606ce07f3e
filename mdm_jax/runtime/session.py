"""A training session: the run's lock, signals, goodput ledger and watchdog."""

import contextlib
import os
from typing import Any

from etils import epath

from mdm_jax.core import distributed
from mdm_jax.core.errors import Exit
from mdm_jax.core.progress import console
from mdm_jax.runtime.attempt import Attempt
from mdm_jax.runtime.signals import StopRequest, stop_request
from mdm_jax.runtime.watchdog import Watchdog

PEER_SECONDS = 5.0  # how long other processes have to respond


class Session:
  """Context manager around a run's attempt, signal handling and watchdog.

  Attributes:
    attempt: the lock, the ledger and the record of how the run ends.
    stop: the handler of SIGINT and SIGTERM.
  """

  def __init__(
    self,
    folder: epath.Path,
    config_sha256: str = "",
    max_attempts: int = 3,
    watchdog_seconds: float = 0.0,
  ):
    distributed.agree("the config", config_sha256)
    self.attempt = Attempt(
      folder, config_sha256, max_attempts, distributed.index()
    )
    self.stop = stop_request()
    self._watchdog = Watchdog(watchdog_seconds, self._describe, self._end)
    self._stack = contextlib.ExitStack()

  def __enter__(self) -> "Session":
    with contextlib.ExitStack() as stack:
      # Handle signals first: one right after taking the lock would leave it.
      stack.enter_context(self.stop)
      distributed.first_alone(lambda: stack.enter_context(self.attempt))
      stack.enter_context(self._watchdog)
      if isinstance(self.stop, StopRequest):
        self.stop.unsaved = lambda: self.attempt.update > self.attempt.committed
      self.stop.leave = self._leave
      self._stack = stack.pop_all()
    return self

  def __exit__(self, *error: Any) -> None:
    self._stack.__exit__(*error)

  def poll(self) -> bool:
    """Resets the watchdog; returns whether a signal asks to stop."""
    self._watchdog.progress()
    return self.stop.poll()

  def check(self) -> None:
    """Resets the watchdog; raises Stopped if a signal came.

    Only call it where nothing is unsaved.
    """
    self._watchdog.progress()
    self.stop.check()

  def _describe(self) -> str:
    status = f"the last completed update was {self.attempt.update}"
    missing = distributed.missing_peers(PEER_SECONDS)
    return f"{status}; {missing}" if missing else status

  def _leave(self, name: str) -> None:
    reason = f"{name}: stopped immediately; the same command resumes"
    console.print(reason, soft_wrap=True)
    self._end(Exit.STOPPED, reason)

  def _end(self, code: Exit, reason: str) -> None:
    """Exits the process from a thread, where `sys.exit` wouldn't."""
    self.attempt.finish(code, reason)
    console.show_cursor(True)  # the progress line may have hidden it
    console.file.flush()
    os._exit(code)
