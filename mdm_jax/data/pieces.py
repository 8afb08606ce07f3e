"""Divides text without sentences: lists, code, scripts without full stops.

A document counts as having sentences if at least a tenth of its words are in
sentences of 3 to 60 words; in ordinary prose, half of them and more are. Other
documents are divided into pieces: whole lines, as many as the word limits ask
for, and parts of longer lines, cut where a word begins.
"""

import bisect
import itertools
import math
import unicodedata
from collections.abc import Iterator, Sequence

from mdm_jax.data import words

_SENTENCE = 3, 60  # words of a usual sentence, at least and at most
_SHARE = 0.1  # of the words, in usual sentences
_FEW = 10  # least words of a part of a line, where the stage asks for fewer

# (start, end) in the text, number of words.
Piece = tuple[int, int, int]


def has_sentences(counts: Sequence[int]) -> bool:
  """Whether a text has sentences, by the number of words in each."""
  least, most = _SENTENCE
  within = sum(n for n in counts if least <= n <= most)
  return within >= _SHARE * sum(counts)


def divide(
  text: str, sentences: Sequence[str], least: int, most: int
) -> Iterator[Piece]:
  """Yields consecutive pieces that together cover the whole text.

  Args:
    text: a document without sentences of usual length.
    sentences: what the sentence splitter found in it; they join to the text.
    least: words per piece; fewer only at the end, or where more would not fit.
    most: words per piece at most.
  """
  start, end, total = 0, 0, 0
  for _, upto, count in _atoms(text, sentences, least, most):
    # End the piece here if the next part would make it too long.
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
  """Yields the smallest parts: sentences, else lines, else parts of lines."""
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
  """Yields parts of a line, cut after spaces or punctuation if possible."""
  starts = words.starts(line)
  good = [i for i, at in enumerate(starts) if _is_gap(line[at - 1])]
  first = 0
  while first < len(starts):
    next_ = bisect.bisect_left(good, first + least)
    found = good[next_] if next_ < len(good) else len(starts)
    # No gap within `most` words: divide evenly instead of leaving a short rest.
    parts = math.ceil((found - first) / most)
    last = first + math.ceil((found - first) / parts)
    start = starts[first] if first else 0
    end = starts[last] if last < len(starts) else len(line)
    yield offset + start, offset + end, last - first
    first = last


def _is_gap(character: str) -> bool:
  return unicodedata.category(character)[0] in "ZPSC"
