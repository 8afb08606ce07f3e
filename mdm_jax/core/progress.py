"""What a person sees while a run goes on: one live line, or plain lines."""

import math
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

_PLAIN_SECONDS = 15.0  # between lines where there is no terminal


class _Console(Console):
  """Draws lines and bars with what stdout can show, as it is just now."""

  @property
  def encoding(self) -> str:
    return (getattr(self.file, "encoding", None) or "utf-8").lower()


# Names, paths and texts are printed as they are: [x] and :x: mean nothing.
console = _Console(highlight=False, markup=False, emoji=False)


def duration(seconds: float) -> str:
  """Returns a time as 3:05 or 1:02:03."""
  minutes, seconds = divmod(max(int(seconds), 0), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours}:{minutes:02d}:{seconds:02d}"
  return f"{minutes}:{seconds:02d}"


def with_error(
  value: float | None, stderr: float | None, form: str = ".3f"
) -> str:
  """Returns a number and its standard error, as far as there are any."""
  known = lambda x: x is not None and math.isfinite(x)
  if not known(value):
    return "-"
  return f"{value:{form}}" + (f" ± {stderr:{form}}" if known(stderr) else "")


class ProgressLine:
  """Stage, update, loss, tokens/s, time left for the stage and for the run."""

  def __init__(self, updates: int):
    self._updates = updates
    self._last_line = time.monotonic()
    self._live = Progress(
      TextColumn("{task.description}", markup=False),
      BarColumn(bar_width=20),
      TextColumn(
        "{task.completed}/{task.total} {task.fields[text]}", markup=False
      ),
      console=console,
      transient=True,
      disable=not console.is_terminal,
    )
    self._task = self._live.add_task("start", total=updates, text="compiling")

  def __enter__(self) -> "ProgressLine":
    self._live.start()
    return self

  def __exit__(self, *_: Any) -> None:
    self._live.stop()

  def say(self, text: str) -> None:
    """Prints a line that stays."""
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
    """Shows where the run is; times in seconds."""
    text = (
      f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s "
      f" left: stage {duration(stage_left)}, run {duration(run_left)}"
    )
    self._live.update(
      self._task, description=stage, completed=update, text=text
    )
    now = time.monotonic()
    if not console.is_terminal and now - self._last_line > _PLAIN_SECONDS:
      line = f"{stage}  {update}/{self._updates}  {text}"
      console.print(line, soft_wrap=True)
      self._last_line = now
