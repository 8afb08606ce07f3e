"""Text units for the stages of the curriculum, and how difficult they are."""

import dataclasses
import itertools
import math
import re
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import sentencex
from jaxtyping import Float64, Int64, Num

from mdm_jax.core.config import StageConfig
from mdm_jax.data import readability
from mdm_jax.data import words as words_lib

# The splitter fails on some texts that hold these.
_ODD_SPACE = re.compile(r"[^\S\x00-\x7f]")


@dataclasses.dataclass(frozen=True)
class Unit:
  """A piece of text that a stage trains on.

  Attributes:
    document: index of the document it comes from.
    parts: one stripped sentence for "sentences"; two for "pairs", between which
      the separator id goes; every sentence of the document, verbatim, for
      "paragraphs", so that joining them gives the document back.
  """

  document: int
  parts: tuple[str, ...]

  @property
  def num_words(self) -> int:
    """Words between white space, the ones that a stage limits."""
    return sum(len(part.split()) for part in self.parts)


def sentences(text: str) -> list[str]:
  """Returns the sentences of an English text; joined, they are the text.

  The space before a sentence belongs to it, as SentencePiece has it too, so
  that sentences apart get the ids they have in their text; cut after the space,
  they are 2 % more tokens. Other white space belongs to the sentence before it.
  """
  found = sentencex.get_sentence_boundaries("en", _ODD_SPACE.sub(" ", text))
  starts = [b["start_index"] for b in found if not b["text"].isspace()]
  cuts = [start - (text[start - 1] == " ") for start in starts[1:]]
  return [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)]) if b]


def units(texts: Sequence[str], stage: StageConfig) -> list[Unit]:
  """Returns the units of a stage, in the order of the text.

  Word limits apply to a sentence or to a pair's total, not to paragraphs.
  Nothing may be left; what that means is for the caller to say.
  """
  found = [
    Unit(i, parts)
    for i, text in enumerate(texts)
    for parts in _parts(sentences(text), stage.unit)
  ]
  if stage.unit == "paragraphs":
    return found
  most = math.inf if stage.max_words is None else stage.max_words
  return [u for u in found if stage.min_words <= u.num_words <= most]


def _parts(verbatim: list[str], unit: str) -> Iterator[tuple[str, ...]]:
  if unit == "paragraphs":
    return iter([tuple(verbatim)])
  stripped = [s.strip() for s in verbatim if not s.isspace()]
  if unit == "sentences":
    return ((s,) for s in stripped)
  return zip(stripped[::2], stripped[1::2], strict=False)


@dataclasses.dataclass(frozen=True)
class UnitWords:
  """The words of some units, each distinct one once.

  Attributes:
    distinct: words, in the order they are first met.
    ids: of every word in the text, its index in `distinct`.
    owner: of every word in the text, the index of its unit.
    counts: words of each unit.
  """

  distinct: list[str]
  ids: Int64[np.ndarray, "T"]
  owner: Int64[np.ndarray, "T"]
  counts: Int64[np.ndarray, "N"]

  def frequency(self) -> Int64[np.ndarray, "W"]:
    """Returns how many of the units hold each distinct word."""
    size = max(len(self.distinct), 1)
    pairs = np.unique(self.owner * size + self.ids)
    return np.bincount(pairs % size, minlength=len(self.distinct))

  def sums(self, of_word: Num[np.ndarray, "W"]) -> Num[np.ndarray, "N"]:
    """Returns each unit's sum of a number that every word has."""
    return np.bincount(
      self.owner, of_word[self.ids], minlength=len(self.counts)
    )


def unit_words(units: Sequence[Unit]) -> UnitWords:
  """Returns the words of some units, in lower case."""
  texts = ("\n".join(unit.parts) for unit in units)
  words = [words_lib.words(text.lower()) for text in texts]
  counts = np.array([len(w) for w in words], np.int64)
  index: dict[str, int] = {}
  flat = [index.setdefault(w, len(index)) for ws in words for w in ws]
  owner = np.repeat(np.arange(len(words)), counts)
  return UnitWords(list(index), np.array(flat, np.int64), owner, counts)


def difficulty(units: Sequence[Unit]) -> Float64[np.ndarray, "N"]:
  """Returns how difficult each unit is among these, from 0 to 1.

  It is the mean of four percentile ranks, of signals that serve a curriculum
  (Zhang et al. 2025, arXiv 2506.11300): rarity of the words (their mean inverse
  document frequency, a unit being a document), Flesch's reading ease, size
  after compression by zlib over size before, and number of words.
  """
  words = unit_words(units)
  found = signals(units, words, rarity(words.frequency(), len(units)))
  return np.mean([_percentile_ranks(signal) for signal in found], axis=0)


def rarity(
  frequency: Int64[np.ndarray, "W"], units: int
) -> Float64[np.ndarray, "W"]:
  """Returns inverse document frequencies, of words that some units hold."""
  return np.log(units / np.maximum(frequency, 1))


def signals(
  units: Sequence[Unit], words: UnitWords, rarity: Float64[np.ndarray, "W"]
) -> Float64[np.ndarray, "4 N"]:
  """Returns what difficulty is a mean of, before it is ranked.

  Args:
    units: to be measured.
    words: of these units.
    rarity: of each distinct word.
  """
  raw = ["\n".join(unit.parts).encode() for unit in units]
  packed = [len(zlib.compress(r)) / max(len(r), 1) for r in raw]
  sentences = np.array([len(unit.parts) for unit in units], np.int64)
  spoken = [readability.syllables(w) for w in words.distinct]
  some = np.maximum(words.counts, 1)
  ease = readability.reading_ease(
    some, sentences, words.sums(np.array(spoken, np.float64))
  )
  return np.array(
    [words.sums(rarity) / some, -ease, packed, words.counts], np.float64
  )


def _percentile_ranks(
  values: Num[np.ndarray, "N"],
) -> Float64[np.ndarray, "N"]:
  """Ranks from 0 to 1; equal values share the mean of theirs."""
  _, inverse, counts = np.unique(
    values, return_inverse=True, return_counts=True
  )
  rank = np.cumsum(counts) - (counts + 1) / 2
  return rank[inverse] / max(len(values) - 1, 1)


@dataclasses.dataclass(frozen=True)
class Selection:
  """The least difficult share of some units.

  Attributes:
    units: those kept, in their own order.
    kept: their difficulty.
    difficulty: of all units, the ones left out too.
  """

  units: list[Unit]
  kept: Float64[np.ndarray, "K"]
  difficulty: Float64[np.ndarray, "N"]

  @property
  def cut(self) -> float:
    """The highest difficulty that is kept."""
    return float(self.kept.max(initial=0))

  def histogram(self, bins: int) -> list[int]:
    """Returns how many units fall in each of equal parts of [0, 1]."""
    return np.histogram(self.difficulty, bins, (0, 1))[0].tolist()


def easiest(units: Sequence[Unit], fraction: float) -> Selection:
  """Selects the least difficult share of the units.

  It rounds up, and of equally difficult units the earlier ones are kept. Only
  sentences and pairs are comparable in this way.
  """
  count = share(fraction, len(units))
  scores = difficulty(units)
  kept = np.sort(np.argsort(scores, kind="stable")[:count])
  return Selection([units[i] for i in kept], scores[kept], scores)


def share(fraction: float, count: int) -> int:
  """Returns a share of so many units, rounded up."""
  # The small amount undoes rounding: 1/3 of 3 is 1.
  return math.ceil(fraction * count - 1e-9)
