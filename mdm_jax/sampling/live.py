"""Shows samples on the terminal while they are drawn."""

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

_NEW = "#1a1d29 on #ffd24a"  # the colours of the HTML pages


class LiveView:
  """Shows the first texts of a batch, live on a terminal, else a line per step.

  Inside its `with` block, `show` may be called from any thread and in any
  order; steps that arrive after a later one are dropped. A block is for one
  batch: later batches count from 0 again, and so are dropped.

  Example:
    view = LiveView(tokenizer, config.num_steps)
    sampler = TextSampler(denoiser, tokenizer, mesh, length, watch=view.show)
    with view:
      samples = sampler(params, prompts, config)
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
    self._step, self._caption = -1, Text()
    self._x: Int[np.ndarray, "R L"] | None = None
    self._live = Live(console=self._console, refresh_per_second=12)
    if self._is_live:
      self._live.start()
    self._open = True
    return self

  def __exit__(self, *_: Any) -> None:
    # Wait for callbacks of the last steps. If the sampler failed they may not
    # come, and the barrier raises: the sampler's own error is the one to show.
    with contextlib.suppress(Exception):
      jax.effects_barrier()
    with self._lock:
      self._open = False
      if self._x is not None:
        # No token differs from itself, so the final text has no highlights.
        self._draw(self._x, self._x)
      if self._is_live:
        self._live.stop()

  def show(self, step: SupportsInt, x: Int[Array | np.ndarray, "B L"]) -> None:
    """Shows the ids x after a number of steps; 0 is the canvas."""
    number, now = int(step), np.asarray(x)[: self._rows]
    with self._lock:
      # jax.debug.callback may deliver steps out of order, or after the block.
      if not self._open or number <= self._step:
        return
      before = now if self._x is None else self._x
      self._x, self._step = now, number
      self._caption = self._line(before, now)
      if self._is_live:
        self._draw(before, now)
      else:
        self._console.print(self._caption, soft_wrap=True)

  def _draw(
    self, before: Int[np.ndarray, "R L"], now: Int[np.ndarray, "R L"]
  ) -> None:
    """Prints the texts `now`, and highlights tokens that differ from before."""
    drawing = Text("\n\n").join(map(self._row, before, now))
    if self._is_live:
      self._live.update(Text("\n").join([self._caption, drawing]))
    else:
      self._console.print(drawing, soft_wrap=True)

  def _line(
    self, before: Int[np.ndarray, "R L"], now: Int[np.ndarray, "R L"]
  ) -> Text:
    vocab = self._tokenizer.vocab
    known = (now != vocab.mask) & (now != vocab.pad)
    counts = {
      "new": np.sum(known & (now != before)),
      "remasked": np.sum((now == vocab.mask) & (before != vocab.mask)),
    }
    parts = [f"{n} {name}" for name, n in counts.items() if n]
    total = np.sum(now != vocab.pad)
    parts.append(f"{known.sum()} of {total} tokens")
    return Text(f"step {self._step}/{self._num_steps}: {', '.join(parts)}")

  def _row(
    self, before: Int[np.ndarray, "L"], now: Int[np.ndarray, "L"]
  ) -> Text:
    # Tokens of these contain their space; a space in front of a masked one
    # lets lines break there, too.
    words = self._tokenizer.kind in ("sentencepiece", "gpt2")
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
