"""Held-out text as rows, and which document each part of a row is from."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from mdm_jax.data.packing import Tokens
from mdm_jax.data.rows import Rows

# Columns of the table of texts.
ROW, SEGMENT, DOCUMENT, BYTES, PIECE = range(5)


@dataclasses.dataclass(frozen=True)
class HeldOut:
  """Rows to measure on.

  Attributes:
    rows: all of the text, packed.
    texts: a line a packed text, by row, then segment: its row, its segment
      (1, 2, ...), the number of its document, the UTF-8 bytes of the original
      text that it stands for, which add up to the documents' bytes whatever the
      tokenizer makes of them, and its number in the document, from 0.
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
    """Documents that some of the text is from."""
    return len(np.unique(self.texts[:, DOCUMENT]))

  def segment_sizes(self) -> Int64[np.ndarray, "N S"]:
    """Returns the tokens of each segment of each row; segment 0 is padding."""
    segments = np.asarray(self.rows.segments[:], np.int64)
    most = int(segments.max(initial=0)) + 1
    cells = segments + most * np.arange(len(segments))[:, None]
    sizes = np.bincount(cells.reshape(-1), minlength=most * len(segments))
    return sizes.reshape(len(segments), most)

  def subset(self, count: int | None) -> "HeldOut":
    """Returns `count` rows spread evenly over all of them (None: all)."""
    if count is None or count >= len(self):
      return self
    picked = np.linspace(0, len(self) - 1, count).round().astype(np.int64)
    rows = self.rows.take(picked)
    new = np.searchsorted(picked, self.texts[:, ROW])
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
  """Returns the bytes of a document's text that each piece stands for.

  They add up to the document's. A tokenizer that changes text gives ids of
  other bytes: those of a sentence then share the original's in proportion.

  Args:
    texts: of a document, one after the other.
    encoded: their ids.
    pieces: the same ids cut anew, and others that stand for no text.
    widths: bytes of each id.
  """
  sizes, owed = [np.zeros(0, np.int64)], 0
  for text, ids in zip(texts, encoded, strict=True):
    owed += len(text.encode())
    ends = np.cumsum(widths[ids])
    if len(ends) and ends[-1]:
      sizes.append(np.diff(ends * owed // ends[-1], prepend=0))
      owed = 0
    else:  # nothing is left of it: what comes next has its bytes
      sizes.append(np.zeros(len(ids), np.int64))
  ends = np.cumsum(np.concatenate(sizes))
  last = np.cumsum([len(piece) for piece in pieces])
  # What ends the document stands for no text.
  upto = np.concatenate([[0], ends])[np.minimum(last, len(ends))]
  upto[-1] += owed
  return np.diff(upto, prepend=0).tolist()
