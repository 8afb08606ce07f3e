"""The 8-grams of a training text as hashes, to see what other texts copy.

Of a large text only those hashes are kept that lie below a bound: whether an
8-gram is among them has nothing to do with whether it is copied, so the share
that is copied, among 8-grams below the bound, is that of all.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, UInt64

from mdm_jax.data import words

ORDER = 8
_NO_IDS = np.zeros(0, np.uint64)


@dataclasses.dataclass(frozen=True)
class Ngrams:
  """What `of` has found.

  Attributes:
    hashes: of each distinct 8-gram, rising.
    share: of all hashes that there are, those that are kept.
  """

  hashes: UInt64[np.ndarray, "M"]
  share: float = 1.0

  def holds(self, hashes: UInt64[np.ndarray, "N"]) -> Bool[np.ndarray, "N"]:
    """Returns which hashes are among them."""
    first, after = (
      np.searchsorted(self.hashes, hashes, side) for side in ("left", "right")
    )
    return first < after


def of(texts: Sequence[str], share: float = 1.0) -> Ngrams:
  """Returns the 8-grams of some texts, none of them across two texts.

  Args:
    texts: to look at.
    share: of the hashes to keep.
  """
  return Ngrams(distinct(hashes(texts, share)), share)


def distinct(hashes: UInt64[np.ndarray, "N"]) -> UInt64[np.ndarray, "M"]:
  """Returns each hash once, rising; NumPy's own takes ten times as long."""
  rising = np.sort(hashes)
  first = np.ones(len(rising), bool)
  first[1:] = rising[1:] != rising[:-1]
  return rising[first]


def tokens(text: str) -> list[str]:
  """Returns the tokens of a text in lower case: words and punctuation marks.

  They are those of `words.tokens`: without spaces, each letter is a word.
  """
  return words.tokens(text.lower())


def hashes(texts: Sequence[str], share: float = 1.0) -> UInt64[np.ndarray, "N"]:
  """Returns the hash of every 8-gram, in order; of a share of them, if less."""
  ids = _Ids()
  found = [
    np.fromiter(map(ids.__getitem__, tokens(text)), np.uint64) for text in texts
  ]
  every = hashes_of_ids(found)
  # A float64 has no 2**64 - 1.
  return every if share >= 1 else every[every < np.uint64(share * 2.0**64)]


class _Ids(dict[str, int]):
  """A number for each token, the same in every process."""

  def __missing__(self, token: str) -> int:
    digest = hashlib.blake2b(token.encode(), digest_size=8).digest()
    self[token] = int.from_bytes(digest)
    return self[token]


def hashes_of_ids(
  texts: list[UInt64[np.ndarray, "_"]],
) -> UInt64[np.ndarray, "N"]:
  """Returns the hashes of all runs of 8 ids that stay inside their text."""
  ids = np.concatenate([_NO_IDS, *texts])
  ends = np.cumsum([len(t) for t in texts], dtype=np.int64)
  inside = np.ones(len(ids), bool)
  last = ends[:, None] - np.arange(1, ORDER)
  inside[last[last >= 0]] = False
  first = np.flatnonzero(inside)
  found = np.zeros(len(first), np.uint64)
  for i in range(ORDER):
    found = _mixed(found ^ ids[first + i])
  return found


def _mixed(values: UInt64[np.ndarray, "N"]) -> UInt64[np.ndarray, "N"]:
  """Scatters values over all of uint64, one to one (SplitMix64)."""
  values = values + np.uint64(0x9E3779B97F4A7C15)
  values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return values ^ (values >> np.uint64(31))
