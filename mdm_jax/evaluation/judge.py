"""Judges: the likelihood of samples under another language model.

A low judge NLL does not make a text good: the most likely texts repeat
themselves. Read it together with the entropy and the repetition of the texts.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from absl import logging
from jaxtyping import Float64, Int64, UInt8, UInt64

from mdm_jax.core.sharding import MeshConfig
from mdm_jax.core.standard_errors import Clusters, Estimate, ratio
from mdm_jax.evaluation.huggingface_judge import HuggingFaceJudge

_MAX_BYTES = 64 * 2**20  # of training text that the n-gram judge counts
_BYTE = np.uint64(8)  # bits, in the dtype of packed n-grams
_NONE = np.zeros(0, np.uint64)
_FALLBACK = (0.5, 1.0, 1.5)  # discounts if counts of counts give none


@runtime_checkable  # the tests check types as they run
class Judge(Protocol):
  """A language model that assigns a likelihood to any text."""

  name: str

  def nats_of(self, texts: Sequence[str]) -> Float64[np.ndarray, "N"]:
    """Returns the total negative log-likelihood of each text, in nats."""
    ...


def make_judge(
  source: str, train_texts: Sequence[str], mesh: MeshConfig | None = None
) -> Judge:
  """Returns an imported judge, or an n-gram model of the training text.

  Args:
    source: hf:FOLDER of a causal model; "" for the n-gram model.
    train_texts: text to fit the n-gram model to.
    mesh: sizes of the mesh axes that an imported judge is split over.

  Raises:
    UserError: the folder holds no such model, or a package is missing.
  """
  return HuggingFaceJudge(source, mesh) if source else NgramJudge(train_texts)


def nll_per_byte(
  judge: Judge, texts: Sequence[str], documents: Clusters = None
) -> Estimate:
  """Returns the judge's NLL per UTF-8 byte over all texts, in nats.

  Args:
    judge: language model that scores the texts.
    texts: texts, scored independently of each other.
    documents: document that each text is from; None if they are independent.

  Returns:
    The ratio with its standard error; NaN if all texts are empty.
  """
  nats = judge.nats_of(texts)
  return ratio(nats, [len(text.encode()) for text in texts], documents)


# MARK: n-grams


@dataclasses.dataclass(frozen=True)
class _Level:
  """The n-grams of one length n, as sorted integers of n packed bytes.

  Attributes:
    grams: all n-grams that occur.
    own: discounted probability of each n-gram given its context.
    contexts: all contexts, i.e. the first n - 1 bytes of the n-grams.
    shared: probability mass of each context that is left for level n - 1.
  """

  grams: UInt64[np.ndarray, "G"]
  own: Float64[np.ndarray, "G"]
  contexts: UInt64[np.ndarray, "C"]
  shared: Float64[np.ndarray, "C"]


class NgramJudge:
  """An n-gram model of bytes with interpolated modified Kneser-Ney smoothing.

  The discounted probability of a byte given the `order - 1` bytes before it is
  interpolated with that given one byte less, and so on down to a uniform 1/256.
  Below the full order, an n-gram's count is the number of distinct bytes that
  precede it, where the start of a text counts as one. A text starts without
  context. Source: Chen and Goodman 1999, An empirical study of smoothing
  techniques for language modeling.
  """

  def __init__(self, texts: Sequence[str], order: int = 8):
    """Counts n-grams of the first 64 MiB of a text; warns if it is longer.

    Args:
      texts: training texts; n-grams do not cross from one to the next.
      order: length of the n-grams in bytes, 1 to 8, which fit a uint64. Orders
        4, 6 and 8 have 2.02, 1.52 and 1.42 bits per byte on held-out `sotu`.

    Raises:
      ValueError: the order is not from 1 to 8.
    """
    if not 1 <= order <= 8:
      raise ValueError(f"order {order} is not from 1 to 8")
    self.name = f"{order}-gram model of bytes (Kneser-Ney)"
    self._levels = _levels(_first([text.encode() for text in texts]), order)

  def nats_of(self, texts: Sequence[str]) -> Float64[np.ndarray, "N"]:
    """Returns the total negative log-likelihood of each text, in nats."""
    return np.array([self.nats(text) for text in texts], np.float64)

  def nats(self, text: str) -> float:
    """Returns the total negative log-likelihood of a text, in nats."""
    return float(-np.log(self.probabilities(text.encode())).sum())

  def probabilities(self, text: bytes) -> Float64[np.ndarray, "N"]:
    """Returns the probability of each byte given the bytes before it."""
    data = np.frombuffer(text, np.uint8)
    found = np.full(len(data), 1 / 256)
    for n, level in enumerate(self._levels, start=1):
      grams = _packed(data, n)
      own = _look_up(level.grams, level.own, grams, 0.0)
      shared = _look_up(level.contexts, level.shared, grams >> _BYTE, 1.0)
      # An unknown context leaves everything to the level below (shared = 1).
      # The first n - 1 bytes have no context this long, and keep their value.
      found[n - 1 :] = own + shared * found[n - 1 :]
    return found


def _first(texts: list[bytes]) -> list[bytes]:
  """Returns the first `_MAX_BYTES` of the texts, with a warning."""
  total = sum(map(len, texts))
  if total <= _MAX_BYTES:
    return texts
  logging.warning(
    "The n-gram judge counts only the first %d of %d bytes of training text.",
    _MAX_BYTES,
    total,
  )
  starts = np.cumsum([0, *map(len, texts)])
  return [
    text[: max(_MAX_BYTES - start, 0)]
    for text, start in zip(texts, starts.tolist(), strict=False)
  ]


def _levels(texts: list[bytes], order: int) -> list[_Level]:
  """Returns the levels for n = 1 .. order, as far as n-grams occur."""
  packed = (_packed(np.frombuffer(text, np.uint8), order) for text in texts)
  grams, counts = _count(np.concatenate([_NONE, *packed]))
  levels = [_level(grams, counts)]
  for n in range(order - 1, 0, -1):
    # Distinct longer n-grams that end in the same n bytes differ in the byte
    # before these. The start of a text is one more possible predecessor.
    starts = {int.from_bytes(text[:n]) for text in texts if len(text) >= n}
    shorter = grams & np.uint64(256**n - 1)
    grams, counts = _count(
      np.concatenate([shorter, np.fromiter(starts, np.uint64)])
    )
    levels.append(_level(grams, counts))
  return [level for level in reversed(levels) if len(level.grams)]


def _packed(data: UInt8[np.ndarray, "N"], n: int) -> UInt64[np.ndarray, "M"]:
  """Returns every n consecutive bytes as a big-endian integer."""
  count = max(len(data) - n + 1, 0)
  packed = np.zeros(count, np.uint64)
  for i in range(n):
    packed = (packed << _BYTE) | data[i : i + count]
  return packed


def _count(
  grams: UInt64[np.ndarray, "N"],
) -> tuple[UInt64[np.ndarray, "G"], Int64[np.ndarray, "G"]]:
  """Returns the distinct n-grams and their counts; sorts its input in place."""
  # In place, unlike np.unique: there may be 64 Mi n-grams of 8 bytes each.
  grams.sort()
  new = np.ones(len(grams), bool)
  new[1:] = grams[1:] != grams[:-1]
  first = np.flatnonzero(new)
  return grams[first], np.diff(first, append=len(grams))


def _level(
  grams: UInt64[np.ndarray, "G"], counts: Int64[np.ndarray, "G"]
) -> _Level:
  # Grams are sorted, so those of a context are neighbours, from `first` on.
  contexts, sizes = _count(grams >> _BYTE)
  first = np.cumsum(sizes) - sizes
  taken = np.array([0, *_discounts(counts)])[np.minimum(counts, 3)]
  totals = np.add.reduceat(counts, first)
  return _Level(
    grams=grams,
    own=(counts - taken) / np.repeat(totals, sizes),
    contexts=contexts,
    shared=np.add.reduceat(taken, first) / totals,
  )


def _discounts(counts: Int64[np.ndarray, "G"]) -> tuple[float, ...]:
  """Returns the discounts of counts 1, 2 and 3 or more.

  D_k = k - (k + 1) Y n_(k+1) / n_k with Y = n_1 / (n_1 + 2 n_2), where n_k is
  the number of n-grams with count k.
  """
  ones, *more = np.bincount(np.minimum(counts, 5), minlength=6)[1:5].tolist()
  if not (ones and all(more)):
    return _FALLBACK
  base = ones / (ones + 2 * more[0])
  pairs = itertools.pairwise([ones, *more])
  found = tuple(
    k - (k + 1) * base * b / a for k, (a, b) in enumerate(pairs, start=1)
  )
  return found if min(found) > 0 else _FALLBACK


def _look_up(
  keys: UInt64[np.ndarray, "K"],
  values: Float64[np.ndarray, "K"],
  wanted: UInt64[np.ndarray, "N"],
  missing: float,
) -> Float64[np.ndarray, "N"]:
  """Returns the values of the wanted keys; `keys` has to be sorted."""
  place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
  return np.where(keys[place] == wanted, values[place], missing)
