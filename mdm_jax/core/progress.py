"""Terminal output: the console and a run's progress line."""

import math
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

_PLAIN_SECONDS = 15.0  # between progress lines if stdout is not a terminal
_WIDE = 100  # characters, enough for all of the progress line


class _Console(Console):
  """A console that looks stdout's encoding up every time.

  rich draws lines and bars in ASCII if the encoding can't show more.
  """

  @property
  def encoding(self) -> str:
    return (getattr(self.file, "encoding", None) or "utf-8").lower()

  def print(
    self, *objects: Any, soft_wrap: bool | None = None, **options: Any
  ) -> None:
    """Prints; with `soft_wrap` a long line stays one, except on a terminal.

    A terminal would break it within a word.
    """
    soft_wrap = soft_wrap and not self.is_terminal
    super().print(*objects, soft_wrap=soft_wrap, **options)


# No markup: names, paths and texts may contain [x] or :x:.
console = _Console(highlight=False, markup=False, emoji=False)


def duration(seconds: float) -> str:
  """Returns a duration formatted as 3:05 or 1:02:03."""
  minutes, seconds = divmod(max(int(seconds), 0), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours}:{minutes:02d}:{seconds:02d}"
  return f"{minutes}:{seconds:02d}"


def with_error(
  value: float | None, stderr: float | None, form: str = ".3f"
) -> str:
  """Returns "value ± stderr", without an unknown error; "-" for no value."""
  known = lambda x: x is not None and math.isfinite(x)
  if not known(value):
    return "-"
  return f"{value:{form}}" + (f" ± {stderr:{form}}" if known(stderr) else "")


def progress_bar(text: str) -> Progress:
  """Returns a progress bar, which stays hidden if stdout is not a terminal.

  Args:
    text: what follows the bar, as a format string with fields of rich's `task`.
  """
  return Progress(
    TextColumn("{task.description}", markup=False),
    BarColumn(bar_width=20),
    TextColumn(f"{{task.completed}}/{{task.total}} {text}", markup=False),
    console=console,
    transient=True,
    disable=not console.is_terminal,
  )


class ProgressLine:
  """A live line with stage, update, loss, tokens/s and time left.

  If stdout is not a terminal it prints a plain line now and then instead.
  """

  def __init__(self, updates: int):
    self._updates = updates
    self._last_line = time.monotonic()
    self._live = progress_bar("{task.fields[text]}")
    self._task = self._live.add_task("start", total=updates, text="compiling")

  def __enter__(self) -> "ProgressLine":
    self._live.start()
    return self

  def __exit__(self, *_: Any) -> None:
    self._live.stop()

  def say(self, text: str) -> None:
    """Prints a permanent line above the progress line."""
    console.print(text, soft_wrap=True)

  def update(
    self,
    stage: str,
    update: int,
    loss: float,
    tokens_per_second: float,
    stage_left: float,
    run_left: float,
  ) -> None:
    """Updates the line; `stage_left` and `run_left` are in seconds."""
    speed = f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s "
    left = f" left: stage {duration(stage_left)}, run {duration(run_left)}"
    text = speed + left
    # 80 characters have room for one of the two times.
    wide = console.width >= _WIDE
    shown = text if wide else f"{speed} left: {duration(run_left)}"
    self._live.update(
      self._task, description=stage, completed=update, text=shown
    )
    now = time.monotonic()
    if not console.is_terminal and now - self._last_line > _PLAIN_SECONDS:
      line = f"{stage}  {update}/{self._updates}  {text}"
      console.print(line, soft_wrap=True)
      self._last_line = now
