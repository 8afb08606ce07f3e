"""Texts on the terminal while they are drawn."""

import contextlib
import threading
from typing import Any, SupportsInt

import jax
import numpy as np
from jaxtyping import Array, Int
from rich.console import Console
from rich.live import Live
from rich.text import Text

from mdm_jax.core import progress
from mdm_jax.data.tokenizer import Tokenizer
from mdm_jax.sampling.trace import spell, visible

_NEW = "#1a1d29 on #ffd24a"  # as on the page


class LiveView:
  """Shows the first texts of a batch: live, or a line a step without terminal.

  Inside its `with` block, `show` may be called from any thread and in any
  order; a step that is not later than the last one shown is left out. One block
  is for one batch: of further ones, which begin again, nothing is shown.
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    num_steps: int,
    rows: int = 1,
    console: Console = progress.console,
  ):
    self._tokenizer, self._num_steps, self._rows = tokenizer, num_steps, rows
    self._console = console
    self._is_live = console.is_terminal and not console.is_dumb_terminal
    self._lock = threading.Lock()
    self._open = False

  def __enter__(self) -> "LiveView":
    self._step, self._told = -1, Text()
    self._x: Int[np.ndarray, "R L"] | None = None
    self._live = Live(console=self._console, refresh_per_second=12)
    if self._is_live:
      self._live.start()
    self._open = True
    return self

  def __exit__(self, *_: Any) -> None:
    # The last steps may still be on their way here, and after an error may not
    # come; that error is what is to be told.
    with contextlib.suppress(Exception):
      jax.effects_barrier()
    with self._lock:
      self._open = False
      if self._x is not None:
        self._draw(self._x, self._x)
      if self._is_live:
        self._live.stop()

  def show(self, step: SupportsInt, x: Int[Array | np.ndarray, "B L"]) -> None:
    """Shows the texts after so many steps; 0 is what was given."""
    number, now = int(step), np.asarray(x)[: self._rows]
    with self._lock:
      if not self._open or number <= self._step:
        return
      before = now if self._x is None else self._x
      self._x, self._step = now, number
      self._told = self._line(before, now)
      if self._is_live:
        self._draw(before, now)
      else:
        self._console.print(self._told, soft_wrap=True)

  def _draw(
    self, before: Int[np.ndarray, "R L"], now: Int[np.ndarray, "R L"]
  ) -> None:
    """Shows the texts, and marks where they differ."""
    drawing = Text("\n\n").join(map(self._row, before, now))
    if self._is_live:
      self._live.update(Text("\n").join([self._told, drawing]))
    else:
      self._console.print(drawing, soft_wrap=True)

  def _line(
    self, before: Int[np.ndarray, "R L"], now: Int[np.ndarray, "R L"]
  ) -> Text:
    vocab = self._tokenizer.vocab
    known = (now != vocab.mask) & (now != vocab.pad)
    counts = {
      "new": np.sum(known & (now != before)),
      "put back": np.sum((now == vocab.mask) & (before != vocab.mask)),
    }
    told = [f"{n} {name}" for name, n in counts.items() if n]
    total = np.sum(now != vocab.pad)
    told.append(f"{known.sum()} of {total} tokens")
    return Text(f"step {self._step}/{self._num_steps}: {', '.join(told)}")

  def _row(
    self, before: Int[np.ndarray, "L"], now: Int[np.ndarray, "L"]
  ) -> Text:
    # A piece of a word begins with its space, so a line may break there.
    words = self._tokenizer.kind == "sentencepiece"
    drawn, vocab = Text(), self._tokenizer.vocab
    for text, old, i in zip(
      spell(now.tolist(), self._tokenizer), before, now, strict=True
    ):
      if text is None:
        drawn.append(" \u2591\u2591\u2591" if words else "\u2591", "dim")
      else:
        drawn.append(visible(text), _NEW if i != old else "")
      if vocab.is_end(i):
        break
    return drawn
