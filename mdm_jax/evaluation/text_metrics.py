"""Text metrics: repetition, diversity, reading grade, copying, likelihood.

Texts are measured as they are: none is dropped or repaired, and empty ones
count. Standard errors are over texts, or over the documents that the texts are
from (`core/standard_errors.py`). Averages treat these as independent draws,
which is a simplification for self-BLEU, whose terms share references. Ratios
over the pool of all texts use the jackknife. Most metrics depend on the length
of the texts: only compare texts of the same length.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mdm_jax.core.registry import Registry
from mdm_jax.core.standard_errors import (
  Clusters,
  Estimate,
  jackknife,
  mean,
  pooled_ratio,
  summed,
  without_each,
)
from mdm_jax.data import ngrams, readability, segments
from mdm_jax.data import words as words_lib
from mdm_jax.data.ngrams import Ngrams, tokens
from mdm_jax.evaluation import distinct
from mdm_jax.evaluation.judge import Judge, nll_per_byte

Counts = collections.Counter

_BLEU_ORDERS = (1, 2, 3, 4)
_NO_MATCH = 0.1  # matches if there is none: method 1 of Chen and Cherry 2014
_FEWEST_SENTENCES = 3  # that a grade is defined for


@dataclasses.dataclass(frozen=True)
class Texts(Sequence[str]):
  """The input of a metric: texts, with everything needed to measure them.

  Attributes:
    texts: texts to measure.
    documents: document that each text is from, for standard errors; None if
      texts are independent, as samples are.
    language: ISO 639-1 code of the texts.
    judge: language model that scores texts, if any.
    copies: 8-grams of the training text, if known.
  """

  texts: Sequence[str]
  documents: Clusters = None
  language: str = "en"
  judge: Judge | None = None
  copies: Ngrams | None = None

  def __len__(self) -> int:
    return len(self.texts)

  def __getitem__(self, index: Any) -> Any:
    return self.texts[index]

  @functools.cached_property
  def words(self) -> list[list[str]]:
    """The lower-case words of each text."""
    return [words_lib.words(text.lower()) for text in self.texts]

  @functools.cached_property
  def grams(self) -> dict[int, list[Counts]]:
    """Counts of each text's n-grams of `tokens`, by n."""
    found = [tokens(text) for text in self.texts]
    return {n: [_ngrams(t, n) for t in found] for n in _BLEU_ORDERS}


# A function with the attribute `heading`: its title and unit, for tables. It
# returns None if it needs something that is not given.
Metric = Callable[[Texts], Estimate | None]
METRICS: Registry[Metric] = Registry("text metric", "text_metrics")
# Metrics of the pool of all texts: they fall as there are more texts.
_POOLED: dict[str, Callable[..., Estimate]] = {}


def metric(name: str, title: str, unit: str = "") -> Callable[..., Any]:
  """Registers a function of `Texts` as a metric.

  It is then computed for samples and for held-out text, and appears in
  results.json, the tables and the report.

  Example:
    @metric("mean_words", "words of a text", "words")
    def mean_words(texts: Texts) -> Estimate:
      return mean([len(text.split()) for text in texts], texts.documents)

  Args:
    name: key in results.json.
    title: name in tables and reports.
    unit: unit in words.
  """

  def register(of: Metric) -> Metric:
    of.heading = f"{title}, {unit}" if unit else title
    return METRICS.register(name, of)

  return register


def measure(
  texts: Sequence[str], documents: Clusters = None, **given: Any
) -> dict[str, Estimate]:
  """Returns every metric of some texts, by name.

  Metrics that lack a judge or an index are left out. Without texts every value
  is NaN.

  Args:
    texts: texts to measure.
    documents: document that each text is from; None if they are independent.
    **given: language, judge and copies, as in `Texts`.
  """
  of = Texts(texts, documents, **given)
  found = {name: METRICS[name](of) for name in METRICS}
  return {name: m for name, m in found.items() if m is not None}


def of_pools(
  size: int, texts: Sequence[str], documents: Clusters = None
) -> dict[str, Estimate]:
  """Returns the pooled metrics that `size` of the texts are expected to have.

  distinct-n and the share of unique starts fall as there are more texts, so
  they are compared for equally many. From more texts than that they are known
  better: this is their mean over all choices of `size` texts.

  Args:
    size: number of texts that they are compared with.
    texts: texts, as many as there are; of fewer than `size`, all count.
    documents: document that each text is from; None if they are independent.
  """
  of = Texts(texts, documents)
  return {name: metric_of(of, size=size) for name, metric_of in _POOLED.items()}


def as_json(measured: dict[str, Estimate]) -> dict[str, dict[str, Any]]:
  """Returns metrics as plain values, with their titles."""
  return {
    name: {"title": METRICS[name].heading, "value": m.value}
    | {"stderr": m.stderr, "n": m.n}
    | ({"reason": m.reason} if m.reason else {})
    for name, m in measured.items()
  }


# MARK: n-grams


def _ngrams(of_text: list[str], n: int) -> Counts:
  return Counts(zip(*(of_text[i:] for i in range(n)), strict=False))


def _seq_rep(n: int, texts: Texts) -> Estimate:
  """Returns the mean over texts of 1 - distinct / all n-grams.

  It is 0 for a text without n-grams. Source: seq-rep-n, Welleck et al. 2019,
  arXiv 1908.04319.
  """
  return mean([_repetition(c) for c in texts.grams[n]], texts.documents)


def _repetition(counts: Counts) -> float:
  return 1 - len(counts) / counts.total() if counts else 0.0


def _unigram_entropy(texts: Texts) -> Estimate:
  """Returns the mean over texts of the entropy of their tokens, in nats."""
  return mean([_entropy(c) for c in texts.grams[1]], texts.documents)


def _entropy(counts: Counts) -> float:
  # An empty text has an entropy of 0.
  found, total = np.array(list(counts.values())), counts.total()
  return float((found * np.log(total / found)).sum() / max(total, 1))


def _pool(n: int, texts: Texts, size: int | None = None) -> Estimate:
  """Returns distinct / all n-grams of all texts together; NaN without any.

  Source: distinct-n, Li et al. 2016, arXiv 1510.03055.
  """
  return distinct.share_of_pool(texts.grams[n], texts.documents, size)


def _starts(k: int, texts: Texts, size: int | None = None) -> Estimate:
  """Returns distinct first k words / texts; shorter texts count whole."""
  # As if a text had one n-gram: its first k words.
  starts = [Counts([tuple(words[:k])]) for words in texts.words]
  return distinct.share_of_pool(starts, texts.documents, size)


# MARK: self-BLEU


def _self_bleu_4(texts: Texts) -> Estimate:
  """Returns the mean BLEU-4 of each text against all others.

  It is NaN for a single text. Source: Texygen, Zhu et al. 2018, arXiv
  1802.01886, with its smoothing: method 1 of Chen and Cherry 2014.
  """
  return mean(_self_bleu(list(texts.grams.values())), texts.documents)


def _self_bleu(grams: list[list[Counts]]) -> list[float]:
  """Returns BLEU of each text against all others (Papineni et al. 2002).

  Args:
    grams: counts of n-grams by n, then by text.
  """
  lengths = [counts.total() for counts in grams[0]]
  if len(lengths) == 1:
    return [math.nan]
  matches = zip(*map(_matches, grams), strict=True)
  return [
    _bleu(of_text, length, _closest(length, lengths[:i] + lengths[i + 1 :]))
    for i, (of_text, length) in enumerate(zip(matches, lengths, strict=True))
  ]


def _matches(grams: list[Counts]) -> list[int]:
  """Returns the number of each text's n-grams that occur in the others.

  Counts are clipped by the highest count in any single other text.
  """
  first, second = Counts(), Counts()  # the highest counts in any two texts
  for counts in grams:
    for gram, count in counts.items():
      if count > first[gram]:
        first[gram], second[gram] = count, first[gram]
      elif count > second[gram]:
        second[gram] = count
  # The text with the highest count is clipped by the second highest. So two
  # passes suffice, instead of a comparison of all pairs of texts.
  return [
    sum(second[g] if k == first[g] else k for g, k in counts.items())
    for counts in grams
  ]


def _closest(length: int, others: list[int]) -> int:
  # BLEU's reference length; of two equally close ones the shorter.
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


def _grade(texts: Texts) -> Estimate:
  """Returns the Flesch-Kincaid grade of all texts together.

  Blank sentences don't count. It is NaN for fewer than 3 sentences, and, with a
  reason, for text that is not English in Latin letters.
  """
  if not readability.applies("".join(texts), texts.language):
    reason = "the grade is of English text in Latin letters"
    return Estimate(math.nan, math.nan, len(texts), reason)
  counts = [
    (
      len(of_text),
      sum(not s.isspace() for s in segments.sentences(text)),
      sum(map(readability.syllables, of_text)),
    )
    for text, of_text in zip(texts, texts.words, strict=True)
  ]
  own = summed(np.array(counts, np.int64).reshape(-1, 3), texts.documents)
  pools = without_each(own.sum(axis=0), own)
  defined = (pools[:, 0] > 0) & (pools[:, 1] >= _FEWEST_SENTENCES)
  # Counts of one keep undefined grades, replaced below, from dividing by zero.
  grades = readability.grade(*np.where(defined[:, None], pools, 1).T)
  return jackknife(np.where(defined, grades, np.nan), len(texts))


# MARK: copying


def copied_share(
  training: Ngrams, texts: Sequence[str], documents: Clusters = None
) -> Estimate:
  """Returns the fraction of the texts' 8-grams that are in the training text.

  Pooled over all texts; NaN if none has 8 tokens. If only a sample of the
  training text's 8-grams is given, the texts' are sampled alike, by hash.

  Args:
    training: 8-grams of `tokens` of the training text.
    texts: texts to look up.
    documents: document that each text is from; None if they are independent.
  """
  looked = [ngrams.hashes([text], training.share) for text in texts]
  counts = [(int(training.holds(h).sum()), len(h)) for h in looked]
  own = summed(np.array(counts, np.int64).reshape(-1, 2), documents)
  copied, sizes = own.T.tolist()
  return pooled_ratio(sum(copied), copied, sizes, len(texts))


# None without the 8-grams (or judge, below): `measure` leaves the metric out.
def _copied(texts: Texts) -> Estimate | None:
  return texts.copies and copied_share(texts.copies, texts, texts.documents)


def _judged(texts: Texts) -> Estimate | None:
  return texts.judge and nll_per_byte(texts.judge, texts, texts.documents)


# MARK: registration, in the order of the tables

for _n in _BLEU_ORDERS:
  _of = functools.partial(_seq_rep, _n)
  metric(f"seq_rep_{_n}", f"repeated {_n}-grams")(_of)
for _n in (1, 2):
  _POOLED[f"distinct_{_n}"] = _of = functools.partial(_pool, _n)
  metric(f"distinct_{_n}", f"distinct {_n}-grams")(_of)
metric("self_bleu_4", "self-BLEU-4")(_self_bleu_4)
metric("unigram_entropy", "unigram entropy", "nats")(_unigram_entropy)
for _k, _words in {1: "first word", 5: "first 5 words"}.items():
  _POOLED[f"unique_starts@{_k}"] = _of = functools.partial(_starts, _k)
  metric(f"unique_starts@{_k}", f"unique {_words}")(_of)
metric("grade", "reading grade")(_grade)
metric("copied_8gram", "copied 8-grams")(_copied)
metric("judge_nll", "judge", "nats per byte")(_judged)
