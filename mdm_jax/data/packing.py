"""Packs token sequences into rows of a fixed length, several per row."""

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int64, Integer

from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data import rows
from mdm_jax.data.rows import Rows

Tokens = Integer[np.ndarray, "_"]
Values = Sequence[np.ndarray]  # per text, one value a token


def join_sentences(
  sentences: Iterable[Tokens], length: int, last: int | None
) -> list[Tokens]:
  """Joins consecutive sentences of a document into pieces of up to `length`.

  A piece starts where a sentence starts, unless the sentence is longer than a
  row and had to be cut. No token is lost.

  Args:
    sentences: ids of the document's sentences, in order.
    length: most tokens in a piece.
    last: id that ends the document (None: no such id).

  Returns:
    The pieces, in order; none is empty.

  Example:
    >>> join_sentences([np.array([1, 2]), np.array([3, 4])], 3, last=9)
    [array([1, 2]), array([3, 4, 9])]
  """
  pieces, current = [], []

  def flush():
    if current:
      pieces.append(np.concatenate(current))
      current.clear()

  room = length
  ending = [] if last is None else [np.array([last])]
  for sentence in [*sentences, *ending]:
    # Start a new piece rather than divide a sentence that fits in one.
    if len(sentence) > room:
      flush()
      room = length
    # Longer than a row, so it must be cut; `current` is empty here.
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
  """Packs texts into rows by best-fit decreasing: longest first.

  Each text becomes a segment of a row, numbered from 1; padding is 0.

  Args:
    texts: token sequences of 1 to `length` tokens.
    length: tokens per row.
    vocab: the ids' vocabulary, which has the padding id.
    **others: further fields of `rows.FIELDS`; of each text, a value per token.

  Raises:
    ValueError: a text is empty or longer than a row.

  Example:
    >>> rows = pack([np.array([5]), np.array([1, 2, 3])], 4, vocab)
    >>> rows.tokens, rows.segments
    (array([[1, 2, 3, 5]], dtype=uint16), array([[1, 1, 1, 2]], dtype=uint16))
  """
  return pack_with_places(texts, length, vocab, **others)[0]


def pack_with_places(
  texts: Sequence[Tokens], length: int, vocab: Vocabulary, **others: Values
) -> tuple[Rows, Int64[np.ndarray, "N 2"]]:
  """Returns what `pack` does, and the (row, segment) of each text."""
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
  """Returns the indices of the texts in each row, by best-fit decreasing."""
  bins: list[list[int]] = []
  # by_room[r] lists the rows with room for r more tokens. That makes the search
  # O(length) per text, however many rows there are.
  by_room: list[list[int]] = [[] for _ in range(length + 1)]
  # Ties go by index, so the same texts always give the same rows.
  for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
    size = sizes[index]
    if not 0 < size <= length:
      raise ValueError(f"a text of {size} tokens in rows of {length}")
    # A row with room for all `length` tokens is a new one: none is kept empty.
    room = next((r for r in range(size, length) if by_room[r]), length)
    if room == length:
      bins.append([])
      target = len(bins) - 1
    else:
      target = by_room[room].pop()
    bins[target].append(index)
    by_room[room - size].append(target)
  return bins
