"""A request to stop: the first signal asks, a second one insists."""

import signal
import threading
from typing import Any


class StopRequest:
  """Turns SIGINT and SIGTERM into a flag the loop reads between updates."""

  def __init__(self):
    self._signal: int | None = None
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> "StopRequest":
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGINT, signal.SIGTERM):
        self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_: Any) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  @property
  def name(self) -> str | None:
    """The signal that came, or None."""
    return signal.Signals(self._signal).name if self._signal else None

  def _handle(self, number: int, _: Any) -> None:
    if self._signal is not None and number == signal.SIGINT:
      raise KeyboardInterrupt
    self._signal = number
