"""A request to stop: the first signal asks, a second SIGINT insists.

The program polls where it can save. Where it can't poll, inside a compilation
or a long evaluation, a thread ends the process for it as soon as nothing would
be lost: the interpreter runs a signal's handler only between two of its own
instructions, but the system writes the signal's number into a pipe at once.
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

_PATIENCE = 2.0  # seconds in which a program that can save comes to a poll
_TICK = 0.1


class _Owner:
  """Hears some signals, in a thread and in the interpreter.

  Attributes:
    leave: ends the process, given the signal's name.
  """

  signals: tuple[int, ...]

  def __init__(self):
    self.leave: Callable[[str], Any] = _leave
    self._previous: dict[int, Any] = {}

  def __enter__(self):
    # Elsewhere, as in a notebook's thread, the program's own handlers stay.
    if threading.current_thread() is threading.main_thread():
      for number in self.signals:
        self._previous[number] = signal.signal(number, self._handle)
      read, self._write = os.pipe()
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
    """Stops right here, where nothing is unsaved.

    Raises:
      Stopped: a signal came.
    """
    if self.poll():
      raise Stopped(f"{self.name}: nothing was lost; the same command resumes")

  def _listen(self, read: int) -> None:
    """Answers every signal, in a thread of its own."""
    heard: list[int] = []
    while number := os.read(read, 1):
      if number[0] not in self.signals:
        continue
      if heard and number[0] == signal.SIGINT:
        self.leave(f"{signal.SIGINT.name} twice")
      heard.append(number[0])
      if len(heard) == 1:
        self._answer(number[0])
    os.close(read)


class StopRequest(_Owner):
  """The owner of SIGINT and SIGTERM in a program of one process.

  Attributes:
    unsaved: returns whether leaving now would lose work; with the default,
      nothing is ever lost.
    leave: ends the process, given the signal's name.
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
    """The signal that came, or None."""
    return signal.Signals(self._signal).name if self._signal else None

  def poll(self) -> bool:
    """Whether to stop; from then on the caller sees to it that it happens."""
    if self._signal is None:
      return False
    self._answered.set()
    return True

  def _handle(self, number: int, _: Any) -> None:
    self._signal = self._signal or number

  def _answer(self, number: int) -> None:
    self._signal = self._signal or number
    threading.Thread(target=self._wait, daemon=True).start()

  def _wait(self) -> None:
    """Leaves in the main thread's place, if that does not come to a poll."""
    self._answered.wait(_PATIENCE)
    while not self._answered.is_set():
      if not self.unsaved():
        self.leave(self.name)
      time.sleep(_TICK)


class SharedStopRequest(_Owner):
  """A signal to any of several processes stops all of them, at the same poll.

  SIGTERM belongs to JAX here, which tells the other processes: nothing may
  install a handler of its own for it, or no process would ever be told. SIGINT
  becomes a SIGTERM; a second one ends this process at once, and with it the
  others.

  Attributes:
    leave: ends the process, given the signal's name.
  """

  signals = (signal.SIGINT,)

  def __init__(self):
    super().__init__()
    self._polls = itertools.count()
    self._stopping = False

  @property
  def name(self) -> str | None:
    """What came, or None until all processes know."""
    return signal.SIGTERM.name if self._stopping else None

  def poll(self) -> bool:
    """Whether to stop: the same answer in all processes.

    They all have to poll equally often, so never by the clock. An answer takes
    effect at the poll after the one that the fastest process is at.
    """
    number = next(self._polls)
    if not self._stopping:
      self._stopping = multihost_utils.reached_preemption_sync_point(number)
    return self._stopping

  def _handle(self, *_: Any) -> None:
    """The thread answers: the main one may be waiting in a collective."""

  def _answer(self, _: int) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def stop_request() -> StopRequest | SharedStopRequest:
  """Returns the one owner of signals that this program has.

  Never both: each would take SIGTERM from the other.
  """
  return StopRequest() if distributed.count() == 1 else SharedStopRequest()


def _leave(name: str) -> None:
  """Ends the process at once; `SystemExit` would only end a thread."""
  print(f"{name}: process {distributed.index()} leaves as it is", flush=True)
  os._exit(Exit.STOPPED)
