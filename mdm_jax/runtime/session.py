"""What surrounds a run while it goes on: signals, lock, ledger, watchdog."""

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

ROLL_SECONDS = 5.0  # that other processes have to say that they are there


class Session:
  """An attempt, the signals it answers to and the watchdog over it.

  Attributes:
    attempt: the lock, the ledger and how it ends.
    stop: the owner of SIGINT and SIGTERM.
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
      # A signal between the lock and its owner's handler would leave it.
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
    """Tells the watchdog that all is well; returns whether to stop."""
    self._watchdog.progress()
    return self.stop.poll()

  def check(self) -> None:
    """Polls where nothing is unsaved; raises Stopped if a signal came."""
    self._watchdog.progress()
    self.stop.check()

  def _describe(self) -> str:
    told = f"the last update done was {self.attempt.update}"
    missing = distributed.missing_peers(ROLL_SECONDS)
    return f"{told}; {missing}" if missing else told

  def _leave(self, name: str) -> None:
    reason = f"{name}: stopped at once; the same command resumes"
    console.print(reason, soft_wrap=True)
    self._end(Exit.STOPPED, reason)

  def _end(self, code: Exit, reason: str) -> None:
    """Ends the process from another thread than the main one."""
    self.attempt.finish(code, reason)
    console.show_cursor(True)  # a live line may have hidden it
    console.file.flush()
    os._exit(code)
