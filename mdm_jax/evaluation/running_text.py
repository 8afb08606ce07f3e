"""Cuts held-out text into texts of a fixed length, as references for samples.

The pieces of text in rows can't serve: they end with a sentence, 6 to 17 %
before the row does, and shorter texts have lower entropy and repeat less.
"""

import dataclasses

import numpy as np
from jaxtyping import Int64, Integer

from mdm_jax.data.held_out import DOCUMENT, PIECE, ROW, SEGMENT, HeldOut
from mdm_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class RunningTexts:
  """Held-out texts of equal length.

  Attributes:
    texts: texts, each of the same number of tokens.
    documents: document in which each text begins.
    description: how many texts of how many documents, in one line.
  """

  texts: list[str]
  documents: list[int]
  description: str


def running_texts(
  held: HeldOut, tokenizer: Tokenizer, count: int, length: int
) -> RunningTexts:
  """Returns texts of `length` tokens, each starting at the start of a piece.

  Texts don't overlap, and are spread evenly over the held-out text. If
  documents are too short to hold enough texts, they are joined.

  Args:
    held: held-out rows, with the document and position of each piece.
    tokenizer: tokenizer of the rows.
    count: number of texts; if there is too little text, fewer are returned.
    length: tokens per text.
  """
  table, sizes = _pieces(held)
  starts, joined = _windows(sizes, table[:, DOCUMENT], length), False
  if len(starts) < count:
    # Zeros: as if all pieces were of one document.
    across = _windows(sizes, np.zeros_like(sizes), length)
    joined = len(across) > len(starts)
    starts = across if joined else starts
  picked = np.linspace(0, len(starts) - 1, min(count, len(starts)))
  chosen = [starts[int(i)] for i in picked.round()]
  texts = [_text(held, tokenizer, table[at:], length) for at in chosen]
  documents = table[chosen, DOCUMENT].tolist()
  description = f"{len(texts)} texts of {length} tokens from"
  description += f" {len(set(documents))} documents"
  description += ", joined because they are short" if joined else ""
  if len(texts) < count:
    description += f"; not enough text for {count}"
  return RunningTexts(texts, documents, description)


def count_within_documents(held: HeldOut, length: int) -> int:
  """Returns how many texts there are without documents being joined.

  Args:
    held: as in `running_texts`.
    length: tokens per text.
  """
  table, sizes = _pieces(held)
  return len(_windows(sizes, table[:, DOCUMENT], length))


def _pieces(
  held: HeldOut,
) -> tuple[Int64[np.ndarray, "M 5"], Int64[np.ndarray, "M"]]:
  """Returns the pieces in reading order, and their tokens."""
  table = in_reading_order(held)
  return table, held.segment_sizes()[table[:, ROW], table[:, SEGMENT]]


def in_reading_order(held: HeldOut) -> Int64[np.ndarray, "M 5"]:
  """Returns `held.texts` by document, then by the piece's number within it."""
  # lexsort sorts by its last key first.
  order = np.lexsort((held.texts[:, PIECE], held.texts[:, DOCUMENT]))
  return held.texts[order]


def piece(held: HeldOut, row: int, segment: int) -> Integer[np.ndarray, "N"]:
  """Returns the ids of one piece of text."""
  tokens = np.asarray(held.rows.tokens[row])
  return tokens[np.asarray(held.rows.segments[row]) == segment]


def _windows(
  sizes: Int64[np.ndarray, "M"], documents: Int64[np.ndarray, "M"], length: int
) -> list[int]:
  """Returns the indices of pieces at which non-overlapping texts can start.

  Args:
    sizes: tokens of each piece, in reading order.
    documents: document of each piece, sorted; texts stay within a document.
    length: tokens per text.
  """
  ends = np.cumsum(sizes)
  # Index of the last piece of each piece's document.
  last = np.searchsorted(documents, documents, side="right") - 1
  room = ends[last] - (ends - sizes)
  found, free = [], 0
  for at in np.flatnonzero(room >= length).tolist():
    start = int(ends[at] - sizes[at])
    if start >= free:
      found.append(at)
      free = start + length
  return found


def _text(
  held: HeldOut,
  tokenizer: Tokenizer,
  table: Int64[np.ndarray, "M 5"],
  length: int,
) -> str:
  """Decodes the first `length` tokens of some pieces.

  Documents are separated by a newline.
  """
  parts, document = [], None
  for row, segment, of, *_ in table.tolist():
    if of != document:
      parts.append([])
      document = of
    ids = piece(held, row, segment)[:length]
    parts[-1].append(ids)
    length -= len(ids)
    if not length:
      break
  return "\n".join(tokenizer.decode(np.concatenate(part)) for part in parts)
