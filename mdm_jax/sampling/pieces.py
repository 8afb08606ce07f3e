"""Yields a text in pieces while it is drawn: `Model.generate(stream=True)`.

A piece is what no later step changes. A block diffusion model gives at least a
piece per block, an autoregressive one a piece per token; a masked model, which
may draw the first token last, often the whole text at once.
"""

import os
import queue
import re
import threading
from collections.abc import Callable, Iterator
from typing import SupportsInt

import jax
import numpy as np
from jaxtyping import Array, Int

from mdm_jax.data.tokenizer import Tokenizer
from mdm_jax.objectives.base import Decoding
from mdm_jax.sampling.config import SampleConfig
from mdm_jax.sampling.samples import Samples, until_end


class Pieces:
  """A sampler's `watch`, and the pieces of what it saw.

  One object serves all texts of a sampler, which is compiled with its watch.
  """

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer
    self._lock = threading.Lock()  # held while a text is drawn
    self._seen: queue.SimpleQueue | None = None

  def __call__(
    self, step: SupportsInt, x: Int[Array | np.ndarray, "B L"]
  ) -> None:
    """Receives the ids after a step; see `sampler.make_sampler`."""
    del step  # what is final only grows: the order of the calls is irrelevant
    if self._seen is not None:
      self._seen.put(np.asarray(x)[0])

  def of(
    self, draw: Callable[[], Samples], config: SampleConfig, decoding: Decoding
  ) -> Iterator[str]:
    """Yields the pieces of the first text; together they are the text.

    Args:
      draw: draws it, with a sampler that this object watches. It runs in a
        thread of its own, to its end also if the caller stops listening.
      config: the sampler's settings.
      decoding: the model's blocks, if it has any.

    Raises:
      Exception: what `draw` raises.
    """
    seen: queue.SimpleQueue = queue.SimpleQueue()

    def work():
      with self._lock:
        self._seen = seen
        try:
          found = draw()
          jax.effects_barrier()  # the last steps may still be on their way
        except Exception as error:  # raised again by the caller's thread
          found = error
        self._seen = None
        seen.put(found)

    threading.Thread(target=work, daemon=True).start()
    # With remasking, a token is final when its block is.
    final = 1 if config.remasking == "none" else decoding.block
    sent = ""
    while not isinstance(item := seen.get(), Samples):
      if isinstance(item, Exception):
        raise item
      text = self._settled(item, final or len(item))
      if len(text) > len(sent) and text.startswith(sent):
        yield text[len(sent) :]
        sent = text
    text = item.texts[0]
    if rest := text[len(os.path.commonprefix([sent, text])) :]:
      yield rest

  def _settled(self, row: Int[np.ndarray, "L"], final: int) -> str:
    """Returns the text of the tokens that no later step changes."""
    vocab = self._tokenizer.vocab
    masked = np.flatnonzero(row == vocab.mask)
    count = masked[0] // final * final if len(masked) else len(row)
    row = until_end(row[:count], vocab)
    # A character has up to four bytes, and the last may be in the next token.
    return re.sub("\ufffd{1,3}$", "", self._tokenizer.decode(row))
