"""Token sequences into rows of one length, several texts a row if they fit."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int64, Integer

from mdm_jax.data.shards import Shards

Tokens = Integer[np.ndarray, "_"]


@dataclasses.dataclass(frozen=True)
class Rows:
  """Packed rows.

  Attributes:
    tokens: token ids, padded with the pad id.
    segments: 1, 2, ... for the texts of a row, 0 at padding.
  """

  tokens: Integer[np.ndarray, "N L"] | Shards
  segments: Integer[np.ndarray, "N L"] | Shards

  def __len__(self) -> int:
    return len(self.tokens)

  @property
  def length(self) -> int:
    """Tokens a row."""
    return self.tokens.shape[1]


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


def pack(texts: Sequence[Tokens], length: int, pad: int) -> Rows:
  """Packs texts of at most `length` tokens into rows, longest first, best fit.

  Args:
    texts: token sequences; longer ones are an error.
    length: tokens a row.
    pad: the id that fills a row up.
  """
  return pack_and_tell(texts, length, pad)[0]


def pack_and_tell(
  texts: Sequence[Tokens], length: int, pad: int
) -> tuple[Rows, Int64[np.ndarray, "N 2"]]:
  """Returns what `pack` does, and the row and segment of each text."""
  bins = _best_fit([len(text) for text in texts], length)
  small = pad < 2**16
  tokens = np.full((len(bins), length), pad, np.uint16 if small else np.int32)
  segments = np.zeros((len(bins), length), np.uint16)
  places = np.zeros((len(texts), 2), np.int64)
  for row, members in enumerate(bins):
    start = 0
    for segment, index in enumerate(members, start=1):
      end = start + len(texts[index])
      tokens[row, start:end] = texts[index]
      segments[row, start:end] = segment
      places[index] = row, segment
      start = end
  return Rows(tokens, segments), places


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
