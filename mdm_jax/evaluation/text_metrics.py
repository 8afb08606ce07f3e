"""What texts show by themselves: repetition, diversity, grade, copying.

Texts are measured as they are: none is dropped or repaired, and an empty one
counts. Standard errors are over texts, or over the documents that the texts are
from (`standard_errors.py`). Those of averages take these as independent draws;
for self-BLEU that is a simplification, its terms share their references. Those
of ratios over the whole pool are by the jackknife, from counts. Most of these
numbers change with length: compare only texts that are cut to the same one.
"""

import collections
import math
from collections.abc import Sequence

import numpy as np

from mdm_jax.core.standard_errors import (
  Clusters,
  Estimate,
  grouped,
  jackknife,
  mean,
  pooled_ratio,
  summed,
  without_each,
)
from mdm_jax.data import ngrams, readability, segments
from mdm_jax.data import words as words_lib
from mdm_jax.data.ngrams import Ngrams, tokens

Counts = collections.Counter

_BLEU_ORDERS = (1, 2, 3, 4)
_NO_MATCH = 0.1  # what method 1 of Chen and Cherry counts for no match at all
_FEWEST_SENTENCES = 3  # for a grade


def measure(
  texts: Sequence[str], language: str = "en", documents: Clusters = None
) -> dict[str, Estimate]:
  """Measures the repetition, the diversity and the grade of texts.

  Without any text every value is nan.

  Args:
    texts: to be measured.
    language: that they are in.
    documents: that each is from (None: each is a draw of its own).

  Returns:
    In this order:
    seq_rep_1 to seq_rep_4: 1 - distinct / all n-grams of a text, averaged;
      0 for a text without any (Welleck et al. 2019, arXiv 1908.04319).
    distinct_1, distinct_2: distinct / all n-grams of the pool of texts, nan
      without any (Li et al. 2016, arXiv 1510.03055).
    self_bleu_4: BLEU-4 of a text against all others, averaged; nan for a
      single text (Zhu et al. 2018, arXiv 1802.01886). Smoothed as there, by
      method 1 of Chen and Cherry (2014): 0.1 matches where there is none.
    unigram_entropy: of the tokens of a text, in nats, averaged.
    unique_starts@1, unique_starts@5: distinct first k words / texts; of a text
      with fewer, all of them.
    grade: Flesch and Kincaid's, of the pool; nan below 3 sentences, and with a
      reason for other languages and scripts than English and Latin.
  """
  found = [tokens(text) for text in texts]
  grams = [[_ngrams(t, n) for t in found] for n in _BLEU_ORDERS]
  measured = {
    f"seq_rep_{n}": mean([_repetition(c) for c in counts], documents)
    for n, counts in zip(_BLEU_ORDERS, grams, strict=True)
  }
  measured |= {
    f"distinct_{n}": _distinct(grams[n - 1], documents) for n in (1, 2)
  }
  measured["self_bleu_4"] = mean(_self_bleu(grams), documents)
  entropies = [_entropy(c) for c in grams[0]]
  measured["unigram_entropy"] = mean(entropies, documents)
  words = [words_lib.words(text.lower()) for text in texts]
  for k in (1, 5):
    measured[f"unique_starts@{k}"] = _starts(words, k, documents)
  return measured | {"grade": _grade(texts, words, language, documents)}


# MARK: n-grams


def _ngrams(of_text: list[str], n: int) -> Counts:
  return Counts(zip(*(of_text[i:] for i in range(n)), strict=False))


def _repetition(counts: Counts) -> float:
  return 1 - len(counts) / counts.total() if counts else 0.0


def _entropy(counts: Counts) -> float:
  found, total = np.array(list(counts.values())), counts.total()
  return float((found * np.log(total / found)).sum() / max(total, 1))


def _distinct(grams: list[Counts], documents: Clusters) -> Estimate:
  counts = [_joined(part) for part in grouped(grams, documents)]
  pool = _joined(counts)
  own = [sum(pool[g] == k for g, k in c.items()) for c in counts]
  sizes = [c.total() for c in counts]
  return pooled_ratio(len(pool), own, sizes, len(grams))


def _joined(parts: list[Counts]) -> Counts:
  pool = Counts()
  for counts in parts:
    pool.update(counts)
  return pool


def _starts(words: list[list[str]], k: int, documents: Clusters) -> Estimate:
  return _distinct([Counts([tuple(w[:k])]) for w in words], documents)


# MARK: self-BLEU


def _self_bleu(grams: list[list[Counts]]) -> list[float]:
  """Returns BLEU of each text against all others (Papineni et al. 2002)."""
  lengths = [counts.total() for counts in grams[0]]
  if len(lengths) == 1:
    return [math.nan]
  matches = zip(*map(_matches, grams), strict=True)
  return [
    _bleu(of_text, length, _closest(length, lengths[:i] + lengths[i + 1 :]))
    for i, (of_text, length) in enumerate(zip(matches, lengths, strict=True))
  ]


def _matches(grams: list[Counts]) -> list[int]:
  """Returns how many n-grams of each text the others have too.

  An n-gram counts at most as often as in the other text with most of it.
  """
  first, second = Counts(), Counts()  # the highest counts in any two texts
  for counts in grams:
    for gram, count in counts.items():
      if count > first[gram]:
        first[gram], second[gram] = count, first[gram]
      elif count > second[gram]:
        second[gram] = count
  # The text with the highest count is clipped by the second highest.
  return [
    sum(second[g] if k == first[g] else k for g, k in counts.items())
    for counts in grams
  ]


def _closest(length: int, others: list[int]) -> int:
  return min(others, key=lambda other: (abs(other - length), other))


def _bleu(matches: tuple[int, ...], length: int, reference: int) -> float:
  if not matches[0]:
    return 0.0
  logs = [
    math.log((found or _NO_MATCH) / max(length - n + 1, 1))
    for n, found in zip(_BLEU_ORDERS, matches, strict=True)
  ]
  brevity = min(1 - reference / length, 0)
  return math.exp(brevity + sum(logs) / len(logs))


# MARK: grade


def _grade(
  texts: Sequence[str],
  words: list[list[str]],
  language: str,
  documents: Clusters,
) -> Estimate:
  """Measures the pool's grade; blank sentences don't count."""
  if not readability.applies("".join(texts), language):
    reason = "the grade is of English text in Latin letters"
    return Estimate(math.nan, math.nan, len(texts), reason)
  counts = [
    (
      len(of_text),
      sum(not s.isspace() for s in segments.sentences(text)),
      sum(map(readability.syllables, of_text)),
    )
    for text, of_text in zip(texts, words, strict=True)
  ]
  own = summed(np.array(counts, np.int64).reshape(-1, 3), documents)
  pools = without_each(own.sum(axis=0), own)
  defined = (pools[:, 0] > 0) & (pools[:, 1] >= _FEWEST_SENTENCES)
  # Ones where it isn't defined: no division by zero.
  grades = readability.grade(*np.where(defined[:, None], pools, 1).T)
  return jackknife(np.where(defined, grades, np.nan), len(texts))


# MARK: copying


class CopyIndex:
  """The 8-grams of `tokens` of a training text, to see what texts copy."""

  def __init__(self, training: Ngrams | Sequence[str]):
    """Indexes a training text, or takes what was indexed before."""
    is_made = isinstance(training, Ngrams)
    self._ngrams = training if is_made else ngrams.of(training)

  def share(self, texts: Sequence[str], documents: Clusters = None) -> Estimate:
    """Measures the share of the texts' 8-grams that the training text has.

    Pooled over the texts; those shorter than 8 tokens have none, and without
    any the share is nan. If a share of the training text's is indexed, as many
    of the texts' are looked at.
    """
    looked = [ngrams.hashes([text], self._ngrams.share) for text in texts]
    counts = [(int(self._ngrams.holds(h).sum()), len(h)) for h in looked]
    own = summed(np.array(counts, np.int64).reshape(-1, 2), documents)
    copied, sizes = own.T.tolist()
    return pooled_ratio(sum(copied), copied, sizes, len(texts))
