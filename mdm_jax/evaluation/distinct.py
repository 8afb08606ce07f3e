"""The share of distinct n-grams in a pool of texts, by size of the pool."""

import collections
import dataclasses
import math

import numpy as np
from jaxtyping import Int64

from mdm_jax.core.standard_errors import Clusters, Estimate, grouped, jackknife

Counts = collections.Counter


def share_of_pool(
  grams: list[Counts], documents: Clusters, size: int | None
) -> Estimate:
  """Returns distinct / all n-grams of a pool; the jackknife is over documents.

  Args:
    grams: n-grams of each text.
    documents: document of each text.
    size: texts in the pool, of all that there are (None: all).
  """
  parts = [_Part.of(texts) for texts in grouped(grams, documents)]
  whole = _joined([part.holders for part in parts])
  # Texts by how many of them have an n-gram: numbers of n-grams.
  every = np.bincount([*whole.values(), len(grams)])
  every[len(grams)] -= 1  # it was there to give the array its length
  texts, tokens = len(grams), sum(part.tokens for part in parts)
  values = [_share(every, texts, tokens, size)]
  for part in parts:
    rest = every.copy()
    for gram, own in part.holders.items():
      rest[whole[gram]] -= 1
      rest[whole[gram] - own] += 1
    left = texts - part.texts, tokens - part.tokens
    values.append(_share(rest, *left, size))
  return jackknife(np.array(values), texts)


@dataclasses.dataclass(frozen=True)
class _Part:
  """The n-grams of one document's texts."""

  holders: Counts  # by n-gram, the number of texts that have it
  texts: int
  tokens: int

  @classmethod
  def of(cls, grams: list[Counts]) -> "_Part":
    holders = Counts(gram for counts in grams for gram in counts)
    return cls(holders, len(grams), sum(c.total() for c in grams))


def _share(
  holders: Int64[np.ndarray, "K"], texts: int, tokens: int, size: int | None
) -> float:
  """Returns distinct / all n-grams expected of `size` of the texts; may be NaN.

  Source: rarefaction, Hurlbert 1971, doi:10.2307/1934145. A pool of m of N
  texts, drawn without replacement, lacks an n-gram that is in k of them with
  probability C(N - k, m) / C(N, m).

  Args:
    holders: number of n-grams that are in k texts, by k.
    texts: number of texts.
    tokens: all their n-grams.
    size: texts in the pool; None, or more than there are: all of them.
  """
  if not tokens:
    return math.nan
  size = min(size or texts, texts)
  lacking, found = 1.0, 0.0
  for k, number in enumerate(holders[: texts + 1].tolist()):
    found += number * (1 - lacking)
    # C(N - k - 1, m) / C(N - k, m)
    lacking *= max(texts - k - size, 0) / max(texts - k, 1)
  return found / (tokens * size / texts)


def _joined(parts: list[Counts]) -> Counts:
  pool = Counts()
  for counts in parts:
    pool.update(counts)
  return pool
