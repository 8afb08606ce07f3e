"""Handling of SIGINT and SIGTERM: stop after saving; a second SIGINT exits.

The program polls at points where it can save. During a compilation or a long
evaluation it can't poll; then a thread exits the process as soon as nothing is
unsaved. The thread reads the pipe of `signal.set_wakeup_fd`: Python runs signal
handlers only between bytecode instructions of the main thread, but the signal's
number is written to the pipe at once.
"""

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from jax.experimental import multihost_utils

from mdm_jax.core import distributed
from mdm_jax.core.errors import Exit, Stopped

_PATIENCE = 2.0  # seconds to wait for a poll before exiting from the thread
_TICK = 0.1


class _Owner:
  """Handles some signals, in Python's handlers and in a thread.

  Attributes:
    signals: the signals that it handles.
    leave: exits the process; takes the signal's name.
  """

  signals: tuple[int, ...]

  def __init__(self):
    self.leave: Callable[[str], Any] = _leave
    self._previous: dict[int, Any] = {}

  def __enter__(self):
    # Python allows handlers only in the main thread. In any other, such as a
    # notebook's, the program's own handlers stay.
    if threading.current_thread() is threading.main_thread():
      for number in self.signals:
        self._previous[number] = signal.signal(number, self._handle)
      read, self._write = os.pipe()
      # `set_wakeup_fd` requires it.
      os.set_blocking(self._write, False)
      self._previous_fd = signal.set_wakeup_fd(
        self._write, warn_on_full_buffer=False
      )
      threading.Thread(
        target=self._listen, args=(read,), name="signals", daemon=True
      ).start()
    return self

  def __exit__(self, *_: Any) -> None:
    if not self._previous:
      return
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    self._previous = {}
    signal.set_wakeup_fd(self._previous_fd)
    os.close(self._write)  # ends the thread

  def check(self) -> None:
    """Polls where nothing is unsaved.

    Raises:
      Stopped: a signal came.
    """
    if self.poll():
      raise Stopped(f"{self.name}: nothing was lost; the same command resumes")

  def _listen(self, read: int) -> None:
    """Reads signals from the pipe, in a thread."""
    received: list[int] = []
    # The read returns no bytes once `__exit__` has closed the other end.
    while number := os.read(read, 1):
      if number[0] not in self.signals:
        continue
      if received and number[0] == signal.SIGINT:
        self.leave(f"{signal.SIGINT.name} twice")
      received.append(number[0])
      if len(received) == 1:
        self._answer(number[0])
    os.close(read)


class StopRequest(_Owner):
  """Handles SIGINT and SIGTERM in a single-process program.

  Attributes:
    unsaved: returns whether exiting now would lose work; never, by default.
    leave: exits the process; takes the signal's name.
  """

  signals = signal.SIGINT, signal.SIGTERM

  def __init__(self):
    super().__init__()
    self.unsaved: Callable[[], bool] = lambda: False
    self._signal: int | None = None
    self._answered = threading.Event()

  def __exit__(self, *error: Any) -> None:
    self._answered.set()
    super().__exit__(*error)

  @property
  def name(self) -> str | None:
    """Name of the signal that came, or None."""
    return signal.Signals(self._signal).name if self._signal else None

  def poll(self) -> bool:
    """Returns whether to stop. After True, the caller must exit itself."""
    if self._signal is None:
      return False
    # The thread no longer exits for us.
    self._answered.set()
    return True

  # Python's handler and the thread both record the signal: either may be first.
  def _handle(self, number: int, _: Any) -> None:
    self._signal = self._signal or number

  def _answer(self, number: int) -> None:
    self._signal = self._signal or number
    threading.Thread(target=self._wait, daemon=True).start()

  def _wait(self) -> None:
    """Exits the process if the main thread doesn't poll in time."""
    self._answered.wait(_PATIENCE)
    while not self._answered.is_set():
      if not self.unsaved():
        self.leave(self.name)
      time.sleep(_TICK)


class SharedStopRequest(_Owner):
  """Stops all processes at the same poll if any of them gets a signal.

  JAX's preemption service handles SIGTERM and notifies the other processes.
  Installing another handler for SIGTERM would disable it. SIGINT is turned into
  SIGTERM; a second SIGINT exits this process at once, which ends the others
  too.

  Attributes:
    leave: exits the process; takes the signal's name.
  """

  signals = (signal.SIGINT,)

  def __init__(self):
    super().__init__()
    self._polls = itertools.count()
    self._stopping = False

  @property
  def name(self) -> str | None:
    """SIGTERM's name once all processes have agreed to stop, else None."""
    return signal.SIGTERM.name if self._stopping else None

  def poll(self) -> bool:
    """Returns whether to stop, with the same answer in all processes.

    All processes must poll equally often, never depending on a clock. They stop
    at the poll after the one that the fastest process has reached.
    """
    number = next(self._polls)
    if not self._stopping:
      self._stopping = multihost_utils.reached_preemption_sync_point(number)
    return self._stopping

  def _handle(self, *_: Any) -> None:
    """Does nothing; the thread answers. The main one may be in a collective."""

  def _answer(self, _: int) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def stop_request() -> StopRequest | SharedStopRequest:
  """Returns the signal handler for this number of processes.

  Never use both kinds: each would take SIGTERM from the other.
  """
  return StopRequest() if distributed.count() == 1 else SharedStopRequest()


def _leave(name: str) -> None:
  """Exits the process at once; `SystemExit` would only end the thread."""
  print(f"{name}: process {distributed.index()} exits at once", flush=True)
  os._exit(Exit.STOPPED)
