"""Hashes of a text's 8-grams, to measure how much generated text copies.

Of a large text only hashes below a bound are kept. Whether an 8-gram's hash is
below the bound does not depend on whether it is copied, so the share that is
copied among those 8-grams estimates the share among all.
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
  """The 8-grams of some texts.

  Attributes:
    hashes: hash of each distinct 8-gram, sorted.
    share: share of all possible hashes that is kept; 1 keeps every 8-gram.
  """

  hashes: UInt64[np.ndarray, "M"]
  share: float = 1.0

  def holds(self, hashes: UInt64[np.ndarray, "N"]) -> Bool[np.ndarray, "N"]:
    """Returns which of the hashes are among them."""
    first, after = (
      np.searchsorted(self.hashes, hashes, side) for side in ("left", "right")
    )
    return first < after


def of(texts: Sequence[str], share: float = 1.0) -> Ngrams:
  """Returns the 8-grams of texts; none spans two texts.

  Args:
    texts: what to hash.
    share: of the hashes to keep.
  """
  return Ngrams(distinct(hashes(texts, share)), share)


def distinct(hashes: UInt64[np.ndarray, "N"]) -> UInt64[np.ndarray, "M"]:
  """Returns the sorted distinct hashes, ten times as fast as np.unique."""
  rising = np.sort(hashes)
  first = np.ones(len(rising), bool)
  first[1:] = rising[1:] != rising[:-1]
  return rising[first]


def tokens(text: str) -> list[str]:
  """Returns the lower-case words and punctuation marks of a text.

  In scripts without spaces each letter is a word, as in `words.tokens`.
  """
  return words.tokens(text.lower())


def hashes(texts: Sequence[str], share: float = 1.0) -> UInt64[np.ndarray, "N"]:
  """Returns the hash of every 8-gram in order, repeats included.

  Args:
    texts: what to hash.
    share: of all possible hashes; only hashes below this share are returned.
  """
  ids = _Ids()
  found = [
    np.fromiter(map(ids.__getitem__, tokens(text)), np.uint64) for text in texts
  ]
  every = hashes_of_ids(found)
  # A share of 1 would ask for 2**64, which no uint64 holds.
  return every if share >= 1 else every[every < np.uint64(share * 2.0**64)]


class _Ids(dict[str, int]):
  """Maps a token to 64 bits; unlike `hash`, the same way in every process."""

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
  # No 8-gram starts at the last 7 positions of a text.
  last = ends[:, None] - np.arange(1, ORDER)
  inside[last[last >= 0]] = False
  first = np.flatnonzero(inside)
  found = np.zeros(len(first), np.uint64)
  # All 8-grams at once: the loop is over the 8 ids, not over the text.
  for i in range(ORDER):
    found = _mixed(found ^ ids[first + i])
  return found


def _mixed(values: UInt64[np.ndarray, "N"]) -> UInt64[np.ndarray, "N"]:
  """Scatters values over uint64, one to one (the finaliser of SplitMix64)."""
  values = values + np.uint64(0x9E3779B97F4A7C15)
  values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return values ^ (values >> np.uint64(31))
