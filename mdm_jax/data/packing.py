"""Token sequences into rows of one length, several texts a row if they fit."""

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int64, Integer

from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data import rows
from mdm_jax.data.rows import Rows

Tokens = Integer[np.ndarray, "_"]
Values = Sequence[np.ndarray]  # of each text, one a token


def join_sentences(
  sentences: Iterable[Tokens], length: int, last: int | None
) -> list[Tokens]:
  """Joins consecutive sentences of a document into pieces of up to `length`.

  A piece starts at a sentence's start, unless that sentence alone is longer
  than a row and had to be cut. Nothing is lost.

  Args:
    sentences: a document's sentences, in order.
    length: the longest piece.
    last: the id that ends the document, if there is one.
  """
  pieces, current = [], []

  def flush():
    if current:
      pieces.append(np.concatenate(current))
      current.clear()

  room = length
  ending = [] if last is None else [np.array([last])]
  for sentence in [*sentences, *ending]:
    if len(sentence) > room:
      flush()
      room = length
    while len(sentence) > length:
      pieces.append(sentence[:length])
      sentence = sentence[length:]
    current.append(sentence)
    room -= len(sentence)
  flush()
  return pieces


def pack(
  texts: Sequence[Tokens], length: int, vocab: Vocabulary, **others: Values
) -> Rows:
  """Packs texts of at most `length` tokens into rows, longest first, best fit.

  Args:
    texts: token sequences; longer ones are an error.
    length: tokens a row.
    vocab: of the ids, of which one fills rows up.
    **others: further fields of `rows.FIELDS`: of each text, a value a token.
  """
  return pack_and_tell(texts, length, vocab, **others)[0]


def pack_and_tell(
  texts: Sequence[Tokens], length: int, vocab: Vocabulary, **others: Values
) -> tuple[Rows, Int64[np.ndarray, "N 2"]]:
  """Returns what `pack` does, and the row and segment of each text."""
  bins = _best_fit([len(text) for text in texts], length)
  empty = lambda name: _empty(name, (len(bins), length), vocab)
  given = {"tokens": texts} | others
  fields = {name: empty(name) for name in given}
  segments = empty("segments")
  places = np.zeros((len(texts), 2), np.int64)
  for row, members in enumerate(bins):
    start = 0
    for segment, index in enumerate(members, start=1):
      end = start + len(texts[index])
      for name, values in given.items():
        fields[name][row, start:end] = values[index]
      segments[row, start:end] = segment
      places[index] = row, segment
      start = end
  return Rows(segments=segments, **fields), places


def _empty(name: str, shape: tuple[int, int], vocab: Vocabulary) -> np.ndarray:
  """Returns rows of padding."""
  field = rows.field(name)
  return np.full(shape, field.filler(vocab), field.dtype(vocab))


def _best_fit(sizes: Sequence[int], length: int) -> list[list[int]]:
  """Best-fit decreasing: which texts share a row."""
  bins: list[list[int]] = []
  by_room: list[list[int]] = [[] for _ in range(length + 1)]
  for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
    size = sizes[index]
    if not 0 < size <= length:
      raise ValueError(f"a text of {size} tokens in rows of {length}")
    room = next((r for r in range(size, length) if by_room[r]), length)
    if room == length:
      bins.append([])
      target = len(bins) - 1
    else:
      target = by_room[room].pop()
    bins[target].append(index)
    by_room[room - size].append(target)
  return bins
