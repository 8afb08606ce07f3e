"""Percentile ranks and a cut over more units than fit in memory.

A number becomes the number of a bin, bins are counted block by block, and the
counts are added up. Bins are the leading bits of a float32, in the order of
the numbers: they need no range, are at most 1/2048 of their number wide, and
whole numbers up to 4096 have one each. What falls into one bin counts as equal.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64, Num

BINS = 2**20
NONE = BINS - 1  # of nan: no number has this bin, and it has no rank
_DROPPED = 12  # bits of the 32


def to_bins(values: Num[np.ndarray, "S N"]) -> Int32[np.ndarray, "S N"]:
  """Returns the bins of numbers; a larger number never has a lower one."""
  # Adding zero makes -0 the same as 0.
  bits = (values + 0.0).astype(np.float32).view(np.uint32)
  rising = np.where(bits >> 31, ~bits, bits | np.uint32(2**31))
  bins = (rising >> _DROPPED).astype(np.int32)
  return np.where(np.isnan(values), np.int32(NONE), bins)


def count(bins: Int32[np.ndarray, "S N"]) -> Int64[np.ndarray, "S K"]:
  """Returns how many numbers each bin holds."""
  return np.array([np.bincount(row, minlength=BINS) for row in bins], np.int64)


def ranks(
  counts: Int64[np.ndarray, "S K"],
) -> Float64[np.ndarray, "S K"]:
  """Returns the percentile rank that the numbers of each bin share."""
  numbers = counts.sum(axis=1, keepdims=True) - counts[:, NONE, None]
  found = np.cumsum(counts, axis=1) - (counts + 1) / 2
  found /= np.maximum(numbers - 1, 1)
  found[:, NONE] = np.nan
  return found


def difficulty(
  bins: Int32[np.ndarray, "S N"], of_bins: Float64[np.ndarray, "S K"]
) -> Float64[np.ndarray, "N"]:
  """Returns the mean of the ranks that each unit has: its difficulty."""
  rows = zip(of_bins, bins, strict=True)
  return np.nanmean([ranks[row] for ranks, row in rows], axis=0)


def levels(difficulty: Float64[np.ndarray, "N"]) -> Int64[np.ndarray, "N"]:
  """Returns in which of equal parts of [0, 1] each difficulty falls."""
  return np.minimum((difficulty * BINS).astype(np.int64), BINS - 1)


@dataclasses.dataclass(frozen=True)
class Cut:
  """Which units are easy enough.

  Attributes:
    level: all those below it are.
    quota: of a block's units in this level, so many are: the first ones.
  """

  level: int
  quota: int

  def keeps(self, level: Int64[np.ndarray, "N"]) -> Bool[np.ndarray, "N"]:
    """Tells which units of a block are kept."""
    tied = level == self.level
    return (level < self.level) | (tied & (np.cumsum(tied) <= self.quota))


def find_level(counts: Int64[np.ndarray, "K"], wanted: int) -> tuple[int, int]:
  """Returns the level that the last wanted unit is in, and how many of it.

  Args:
    counts: units of all blocks in each level.
    wanted: units to keep.
  """
  upto = np.cumsum(counts)
  level = min(int(np.searchsorted(upto, wanted)), BINS - 1)
  return level, wanted - int(upto[level] - counts[level])


def quotas(most: int, tied: Sequence[int]) -> Int64[np.ndarray, "B"]:
  """Returns how many units of the last level each block keeps.

  Args:
    most: of all blocks together; earlier blocks come first.
    tied: units that each block has in this level.
  """
  upto = np.minimum(np.cumsum(np.array(tied, np.int64)), most)
  return np.diff(upto, prepend=0)
