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


def difficulty(units: Sequence[Unit]) -> Float64[np.ndarray, "N"]:
  """Returns how difficult each unit is among these, from 0 to 1.

  It is the mean of four percentile ranks, of signals that serve a curriculum
  (Zhang et al. 2025, arXiv 2506.11300): rarity of the words (their mean inverse
  document frequency, a unit being a document), Flesch's reading ease, size
  after compression by zlib over size before, and number of words.
  """
  texts = ["\n".join(unit.parts) for unit in units]
  raw = [text.encode() for text in texts]
  packed = [len(zlib.compress(r)) / max(len(r), 1) for r in raw]
  words = [readability.words(text) for text in texts]
  counts = np.array([len(w) for w in words], np.int64)
  sentences = np.array([len(unit.parts) for unit in units], np.int64)
  rarity, syllables = _rarity_and_syllables(words, counts)
  some = np.maximum(counts, 1)
  signals = [
    rarity / some,
    -readability.reading_ease(some, sentences, syllables),
    np.array(packed, np.float64),
    counts,
  ]
  return np.mean([_percentile_ranks(s) for s in signals], axis=0)


def _rarity_and_syllables(
  words: list[list[str]], counts: Int64[np.ndarray, "N"]
) -> tuple[Num[np.ndarray, "N"], ...]:
  """Returns the sums of inverse document frequencies and of syllables."""
  index: dict[str, int] = {}
  flat = [index.setdefault(w, len(index)) for ws in words for w in ws]
  ids = np.array(flat, np.int64)
  owner = np.repeat(np.arange(len(words)), counts)
  pairs = np.unique(owner * max(len(index), 1) + ids)
  frequency = np.bincount(pairs % max(len(index), 1), minlength=len(index))
  idf = np.log(len(words) / np.maximum(frequency, 1))
  syllables = np.array([readability.syllables(w) for w in index], np.float64)
  return tuple(
    np.bincount(owner, of_word[ids], minlength=len(words))
    for of_word in (idf, syllables)
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
  # The small amount undoes rounding: 1/3 of 3 is 1.
  count = math.ceil(fraction * len(units) - 1e-9)
  scores = difficulty(units)
  kept = np.sort(np.argsort(scores, kind="stable")[:count])
  return Selection([units[i] for i in kept], scores[kept], scores)
