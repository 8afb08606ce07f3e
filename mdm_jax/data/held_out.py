"""Held-out rows, with a table of the text that each segment stands for."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from mdm_jax.data.packing import Tokens
from mdm_jax.data.rows import Rows

# Columns of `HeldOut.texts`.
ROW, SEGMENT, DOCUMENT, BYTES, PIECE = range(5)


@dataclasses.dataclass(frozen=True)
class HeldOut:
  """Packed rows of held-out text.

  Attributes:
    rows: the text in pieces of at most a row, packed.
    texts: one line per segment, sorted by row, then segment. Its columns are
      the row, the segment in it (from 1), the document, the UTF-8 bytes of
      original text that the segment stands for, and the segment's number within
      its document (from 0). Bytes add up to the size of the documents for every
      tokenizer.
  """

  rows: Rows
  texts: Int64[np.ndarray, "M 5"]

  def __len__(self) -> int:
    return len(self.rows)

  @property
  def num_bytes(self) -> int:
    """UTF-8 bytes of the original text."""
    return int(self.texts[:, BYTES].sum())

  @property
  def documents(self) -> int:
    """Number of documents with at least one segment in the rows."""
    return len(np.unique(self.texts[:, DOCUMENT]))

  def segment_sizes(self) -> Int64[np.ndarray, "N S"]:
    """Returns the tokens of each row's segments; column 0 counts padding."""
    segments = np.asarray(self.rows.segments[:], np.int64)
    most = int(segments.max(initial=0)) + 1
    # One bincount over all (row, segment) cells; no loop over rows.
    cells = segments + most * np.arange(len(segments))[:, None]
    sizes = np.bincount(cells.reshape(-1), minlength=most * len(segments))
    return sizes.reshape(len(segments), most)

  def subset(self, count: int | None) -> "HeldOut":
    """Returns `count` rows spread evenly over all of them (None: all)."""
    if count is None or count >= len(self):
      return self
    picked = np.linspace(0, len(self) - 1, count).round().astype(np.int64)
    rows = self.rows.take(picked)
    # Renumber the rows in the table, and drop the lines of rows not picked.
    new = np.searchsorted(picked, self.texts[:, ROW])
    # `new` is out of bounds for rows after the last one picked.
    kept = picked[np.minimum(new, count - 1)] == self.texts[:, ROW]
    texts = self.texts[kept]
    texts[:, ROW] = new[kept]
    return HeldOut(rows, texts)


def original_bytes(
  texts: Sequence[str],
  encoded: Sequence[Tokens],
  pieces: Sequence[Tokens],
  widths: Int64[np.ndarray, "V"],
) -> list[int]:
  """Returns the bytes of a document's original text that each piece stands for.

  The numbers add up to the document's UTF-8 bytes. A tokenizer that normalises
  text has ids that spell other bytes; each sentence's original bytes are then
  divided among its ids in proportion to theirs.

  Args:
    texts: consecutive sentences that make up the document.
    encoded: the ids of each sentence.
    pieces: the same ids, divided differently; the last piece may also have ids
      that stand for no text.
    widths: bytes that each id spells [V].
  """
  sizes, owed = [np.zeros(0, np.int64)], 0
  for text, ids in zip(texts, encoded, strict=True):
    owed += len(text.encode())
    ends = np.cumsum(widths[ids])
    if len(ends) and ends[-1]:
      sizes.append(np.diff(ends * owed // ends[-1], prepend=0))
      owed = 0
    else:  # no ids are left: the next sentence gets its bytes too
      sizes.append(np.zeros(len(ids), np.int64))
  ends = np.cumsum(np.concatenate(sizes))
  last = np.cumsum([len(piece) for piece in pieces])
  # The end-of-text id is in no sentence, so it adds no bytes.
  upto = np.concatenate([[0], ends])[np.minimum(last, len(ends))]
  # Trailing text that normalisation removed belongs to the last piece.
  upto[-1] += owed
  return np.diff(upto, prepend=0).tolist()
