"""Text without sentences: lists, code, scripts without marks, one long line.

A document has sentences if a tenth of its words stand in sentences of 3 to 60
words; ordinary prose has half and more there. The others are divided into
pieces: whole lines, as many as the limits ask for, and of a longer line parts
of it, cut where a word begins.
"""

import bisect
import itertools
import math
import unicodedata
from collections.abc import Iterator, Sequence

from mdm_jax.data import words

_SENTENCE = 3, 60  # words
_SHARE = 0.1
_FEW = 10  # words of a part of a line, where the limits ask for fewer

# Where a piece starts and ends in its text, and its words.
Piece = tuple[int, int, int]


def has_sentences(counts: Sequence[int]) -> bool:
  """Whether a text is divided into sentences, by the words of each."""
  least, most = _SENTENCE
  within = sum(n for n in counts if least <= n <= most)
  return within >= _SHARE * sum(counts)


def divide(
  text: str, sentences: Sequence[str], least: int, most: int
) -> Iterator[Piece]:
  """Yields consecutive pieces of a text; together they hold all of it.

  Args:
    text: without sentences of a usual length.
    sentences: what it was divided into all the same; joined, they are the text.
    least: words a piece should have; only what is left at an end has fewer.
    most: words that it may have.
  """
  start, end, total = 0, 0, 0
  for _, upto, count in _atoms(text, sentences, least, most):
    if total and total + count > most:
      yield start, end, total
      start, total = end, 0
    end, total = upto, total + count
    if total >= least:
      yield start, end, total
      start, total = end, 0
  if total:
    yield start, end, total


def _atoms(
  text: str, sentences: Sequence[str], least: int, most: int
) -> Iterator[Piece]:
  """Yields what is not divided: sentences, else lines, else parts of those."""
  for start, sentence in _placed(0, sentences):
    count = words.count(sentence)
    if count <= min(most, _SENTENCE[1]):
      yield start, start + len(sentence), count
      continue
    for at, line in _placed(start, sentence.splitlines(keepends=True)):
      count = words.count(line)
      if count <= most:
        yield at, at + len(line), count
      else:
        yield from _parts(line, at, max(least, min(_FEW, most)), most)


def _placed(start: int, parts: Sequence[str]) -> Iterator[tuple[int, str]]:
  ends = itertools.accumulate(map(len, parts), initial=start)
  return zip(ends, parts, strict=False)


def _parts(line: str, offset: int, least: int, most: int) -> Iterator[Piece]:
  """Yields parts of a line, if possible up to a space or a mark."""
  starts = words.starts(line)
  good = [i for i, at in enumerate(starts) if _is_gap(line[at - 1])]
  first = 0
  while first < len(starts):
    next_ = bisect.bisect_left(good, first + least)
    found = good[next_] if next_ < len(good) else len(starts)
    parts = math.ceil((found - first) / most)
    last = first + math.ceil((found - first) / parts)
    start = starts[first] if first else 0
    end = starts[last] if last < len(starts) else len(line)
    yield offset + start, offset + end, last - first
    first = last


def _is_gap(character: str) -> bool:
  return unicodedata.category(character)[0] in "ZPSC"
