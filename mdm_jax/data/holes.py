"""Holes in texts: hidden spans, with text on both sides, that a model fills.

A hole is of one of two kinds. In a told one, the hidden tokens alone are masked
and predicted: their number is known. An untold one has always `length` places,
which the hidden tokens begin and an id without text, the blank, fills up; all
of these are masked and predicted, so a model learns how long such a hole is. A
further blank stands behind them and is always visible: it tells the two kinds
apart when some of the places are filled. `sampling/hole_lengths.py` asks a
model with the second kind for the length of a hole, and its tokens are then
drawn as in the first kind.

The blank is the separator id: it may be predicted, and no running text has it.
"""

import dataclasses
import zlib

import numpy as np
from jaxtyping import Bool, Int32, Integer

from mdm_jax.core.errors import UserError
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data.config import DataConfig

_SHARES = 2**20


@dataclasses.dataclass(frozen=True)
class Encoded:
  """The ids of a document.

  Attributes:
    ids: of prompts and answers, or of a text with holes.
    answer: which of them may be masked and predicted.
    fits: False if an answer is longer than what it would be filled up to.
  """

  ids: Int32[np.ndarray, "N"]
  answer: Bool[np.ndarray, "N"]
  fits: bool = True


@dataclasses.dataclass(frozen=True)
class Holes:
  """Which spans of a text are hidden.

  Attributes:
    most: most holes of a text.
    length: most tokens of a hole.
    untold: share of the holes that are untold.
  """

  most: int = 1
  length: int = 8
  untold: float = 0.5

  @classmethod
  def of(cls, data: DataConfig) -> "Holes":
    """Returns those of a config."""
    return cls(data.holes, data.hole_length, data.untold_holes)

  @property
  def growth(self) -> int:
    """Most tokens that holes add to a text."""
    # A hidden token and `length` of the blank, which is given behind them.
    return self.most * self.length if self.untold else 0

  def is_untold(self, place: int) -> bool:
    """Returns whether the hole of a document is untold, by its hash."""
    return place % _SHARES < self.untold * _SHARES

  def filled(
    self, hidden: Integer[np.ndarray, "K"], vocab: Vocabulary
  ) -> tuple[Integer[np.ndarray, "N"], Bool[np.ndarray, "N"]]:
    """Returns the tokens of an untold hole, and which of them are asked for.

    One that is longer than `length` gets no blanks but the one behind it.
    """
    blanks = max(self.length - len(hidden), 0) + 1
    ids = np.append(hidden, np.full(blanks, blank(vocab), np.int32))
    return ids, np.arange(len(ids)) < len(ids) - 1

  def hide(
    self, ids: Integer[np.ndarray, "N"], vocab: Vocabulary
  ) -> Encoded | None:
    """Hides 1 to `most` spans of 1 to `length` tokens of a text.

    All numbers and lengths are equally likely, and then all places with given
    tokens before, between and behind the holes. They depend on the text alone.
    Each hole is told or untold by itself, so that a model knows texts in which
    only some lengths are known.

    Returns:
      None if the holes that were drawn don't fit into the text.
    """
    ids = ids.astype(np.int32)  # one type, on which the hash depends
    draw = np.random.default_rng(zlib.crc32(ids.tobytes()))
    count = int(draw.integers(1, self.most + 1))
    sizes = draw.integers(1, self.length + 1, count)
    given = len(ids) - int(sizes.sum())
    if given <= count:
      return None
    # Each hole is in front of a given token that isn't the first.
    front = np.sort(draw.choice(given - 1, count, replace=False)) + 1
    starts = front + np.cumsum(sizes) - sizes
    untold, parts, asked, at = draw.random(count) < self.untold, [], [], 0
    for start, size, fill in zip(starts, sizes, untold, strict=True):
      parts.append(ids[at:start])
      asked.append(np.zeros(start - at, bool))
      at = start + size
      hidden, known = ids[start:at], np.ones(size, bool)
      if fill:
        hidden, known = self.filled(hidden, vocab)
      parts.append(hidden)
      asked.append(known)
    parts.append(ids[at:])
    asked.append(np.zeros(len(ids) - at, bool))
    return Encoded(np.concatenate(parts), np.concatenate(asked))


def blank(vocab: Vocabulary) -> int:
  """Returns the id that fills up holes.

  Raises:
    UserError: the tokenizer has no such id.
  """
  found = vocab.need("separator")
  if found == vocab.end or not vocab.is_predictable(np.array(found)):
    raise UserError(
      "the tokenizer's separator id can't fill up holes: it ends texts or is"
      " never predicted; set data.untold_holes=0"
    )
  return found
