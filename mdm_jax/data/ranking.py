"""Percentile ranks and a quantile over more units than fit in memory.

Numbers are replaced by bins, which are counted block by block and added up. A
bin is the leading 20 bits of a float32, reordered so that larger numbers have
larger bins. So bins need no range in advance, their width is at most 1/2048 of
the number, and whole numbers up to 4096 have a bin each. Numbers in the same
bin count as equal.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64, Num

BINS = 2**20
NONE = BINS - 1  # bin of NaN, which has no rank; no number falls into it
_DROPPED = 12  # of the float32's 32 bits


def to_bins(values: Num[np.ndarray, "S N"]) -> Int32[np.ndarray, "S N"]:
  """Returns the bin of each number; bins never decrease as numbers grow."""
  # Adding 0.0 turns -0.0 into 0.0, so that both get the same bin.
  bits = (values + 0.0).astype(np.float32).view(np.uint32)
  # Floats sort as integers once negative ones have all bits flipped and the
  # others have the sign bit set.
  rising = np.where(bits >> 31, ~bits, bits | np.uint32(2**31))
  bins = (rising >> _DROPPED).astype(np.int32)
  return np.where(np.isnan(values), np.int32(NONE), bins)


def count(bins: Int32[np.ndarray, "S N"]) -> Int64[np.ndarray, "S K"]:
  """Returns how many numbers fall into each bin, for each signal."""
  return np.array([np.bincount(row, minlength=BINS) for row in bins], np.int64)


def mean_ranks(
  counts: Int64[np.ndarray, "*S K"],
) -> Float64[np.ndarray, "*S K"]:
  """Returns ranks from 0 to 1 of rising values; equal ones share their mean.

  Args:
    counts: how often each value occurs.
  """
  # The mean of the ranks cumsum - count, ..., cumsum - 1 of equal values.
  ranks = np.cumsum(counts, axis=-1) - (counts + 1) / 2
  return ranks / np.maximum(counts.sum(axis=-1, keepdims=True) - 1, 1)


def ranks(
  counts: Int64[np.ndarray, "S K"],
) -> Float64[np.ndarray, "S K"]:
  """Returns the percentile rank in [0, 1] that the numbers of a bin share."""
  found = np.full(counts.shape, np.nan)
  found[:, :NONE] = mean_ranks(counts[:, :NONE])
  return found


def difficulty(
  bins: Int32[np.ndarray, "S N"], of_bins: Float64[np.ndarray, "S K"]
) -> Float64[np.ndarray, "N"]:
  """Returns each unit's difficulty: the mean of the ranks it has.

  Args:
    bins: of each unit's signals [S, N].
    of_bins: rank of each bin [S, K], as `ranks` returns it.
  """
  rows = zip(of_bins, bins, strict=True)
  return np.nanmean([ranks[row] for ranks, row in rows], axis=0)


def levels(difficulty: Float64[np.ndarray, "N"]) -> Int64[np.ndarray, "N"]:
  """Returns which of `BINS` equal parts of [0, 1] each difficulty is in."""
  return np.minimum((difficulty * BINS).astype(np.int64), BINS - 1)


def kept(
  levels: Int64[np.ndarray, "N"], last: int, quota: int
) -> Bool[np.ndarray, "N"]:
  """Returns which units of a block are kept as easy enough.

  Args:
    levels: of the block's units.
    last: units of all levels below this one are kept.
    quota: of the units in this level, the first `quota` are kept.
  """
  tied = levels == last
  return (levels < last) | (tied & (np.cumsum(tied) <= quota))


def find_level(counts: Int64[np.ndarray, "K"], wanted: int) -> tuple[int, int]:
  """Returns the level of the last unit to keep, and how many of it to keep.

  Args:
    counts: units of all blocks in each level.
    wanted: number of units to keep.
  """
  upto = np.cumsum(counts)
  level = min(int(np.searchsorted(upto, wanted)), BINS - 1)
  return level, wanted - int(upto[level] - counts[level])


def quotas(most: int, tied: Sequence[int]) -> Int64[np.ndarray, "B"]:
  """Returns how many units of the last level each block keeps.

  Args:
    most: units of that level to keep in all blocks; earlier blocks go first.
    tied: number of each block's units in that level.
  """
  upto = np.minimum(np.cumsum(np.array(tied, np.int64)), most)
  return np.diff(upto, prepend=0)
