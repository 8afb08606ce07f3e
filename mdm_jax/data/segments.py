"""Text units for the stages of the curriculum, and how difficult they are."""

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence

import numpy as np
import sentencex
from jaxtyping import Float64, Int64, Num

from mdm_jax.data import pieces, readability
from mdm_jax.data import words as words_lib
from mdm_jax.data.config import StageConfig

# The splitter fails on some texts that hold these.
_ODD_SPACE = re.compile(r"[^\S\x00-\x7f]")


@dataclasses.dataclass(frozen=True)
class Unit:
  """A piece of text that a stage trains on.

  Attributes:
    document: index of the document it comes from.
    parts: one stripped sentence or line for "sentences" and "lines"; two for
      "pairs", between which the separator id goes; every sentence of the
      document, verbatim, for "paragraphs", so that joining them gives the
      document back.
    starts: where each part begins in the document; none for "paragraphs".
  """

  document: int
  parts: tuple[str, ...]
  starts: tuple[int, ...] = dataclasses.field(default=(), compare=False)


def sentences(text: str, language: str = "en") -> list[str]:
  """Returns the sentences of a text; joined, they are the text.

  The space before a sentence belongs to it, as SentencePiece has it too, so
  that sentences apart get the ids they have in their text; cut after the space,
  they are 2 % more tokens. Other white space belongs to the sentence before it.
  """
  found = sentencex.get_sentence_boundaries(language, _ODD_SPACE.sub(" ", text))
  starts = [b["start_index"] for b in found if not b["text"].isspace()]
  cuts = [start - (text[start - 1] == " ") for start in starts[1:]]
  return [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)]) if b]


@dataclasses.dataclass
class Found:
  """The units of a stage in some documents, and what is none.

  Attributes:
    units: within the limits of the stage, in the order of the text.
    too_short: others, with fewer words than the stage takes.
    too_long: others, with more.
    documents: looked into.
    without_sentences: documents that were divided into lines and parts of
      lines, because they have no sentences.
    characters: of the text that units are looked for in, white space around
      them left out.
  """

  units: list[Unit] = dataclasses.field(default_factory=list)
  too_short: int = 0
  too_long: int = 0
  documents: int = 0
  without_sentences: int = 0
  characters: int = 0


def find(
  texts: Sequence[str], stage: StageConfig, language: str = "en"
) -> Found:
  """Returns the units of a stage.

  Word limits apply to a sentence, a line, or a pair's total, not to paragraphs.
  Nothing may be left; what that means is for the caller to say.
  """
  found = Found(documents=len(texts))
  for i, text in enumerate(texts):
    if stage.unit == "lines":
      _add(found, i, _counted(text.splitlines(keepends=True)), stage)
      continue
    verbatim = sentences(text, language)
    if stage.unit == "paragraphs":
      found.units.append(Unit(i, tuple(verbatim)))
      found.characters += len(text)
      continue
    parts = _counted(verbatim)
    if not pieces.has_sentences([count for *_, count in parts]):
      parts = _pieces(text, verbatim, stage)
      found.without_sentences += 1
    _add(found, i, parts, stage)
  return found


def units(
  texts: Sequence[str], stage: StageConfig, language: str = "en"
) -> list[Unit]:
  """Returns the units of a stage alone."""
  return find(texts, stage, language).units


# A stripped part of a text, where it starts, and its words.
_Part = tuple[str, int, int]


def _counted(verbatim: Sequence[str]) -> list[_Part]:
  """Returns parts of a text, which joined are the text, without blank ones."""
  parts, at = [], 0
  for part in verbatim:
    if stripped := part.strip():
      start = at + part.index(stripped[0])
      parts.append((stripped, start, words_lib.count(stripped)))
    at += len(part)
  return parts


def _pieces(text: str, verbatim: list[str], stage: StageConfig) -> list[_Part]:
  each = 2 if stage.unit == "pairs" else 1
  # A word is a token and more, mostly.
  most = min(stage.max_words or stage.length // 2, stage.length)
  found = pieces.divide(
    text,
    verbatim,
    least=max(math.ceil(stage.min_words / each), 1),
    most=max(most // each, 1),
  )
  parts = []
  for start, end, count in found:
    piece = text[start:end]
    stripped = piece.strip()
    parts.append((stripped, start + piece.index(stripped[0]), count))
  return parts


def _add(
  found: Found, document: int, parts: list[_Part], stage: StageConfig
) -> None:
  """Adds a document's units that are within the limits, and counts the rest."""
  found.characters += sum(len(part) for part, *_ in parts)
  most = math.inf if stage.max_words is None else stage.max_words
  together = (
    zip(parts[::2], parts[1::2], strict=False)
    if stage.unit == "pairs"
    else zip(parts, strict=True)
  )
  for unit in together:
    of_parts, starts, counts = zip(*unit, strict=True)
    count = sum(counts)
    if count < stage.min_words:
      found.too_short += 1
    elif count > most:
      found.too_long += 1
    else:
      found.units.append(Unit(document, of_parts, starts))


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


def difficulty(
  units: Sequence[Unit], language: str = "en"
) -> Float64[np.ndarray, "N"]:
  """Returns how difficult each unit is among these, from 0 to 1.

  It is the mean of the percentile ranks of signals that serve a curriculum
  (Zhang et al. 2025, arXiv 2506.11300): rarity of the words (their mean inverse
  document frequency, a unit being a document), number of words, and, in English
  and Latin letters, Flesch's reading ease. Their compression ratio is left out:
  of a single sentence it is hardly more than the inverse of its length.
  """
  words = unit_words(units)
  found = signals(units, words, rarity(words.frequency(), len(units)), language)
  return np.nanmean([_percentile_ranks(signal) for signal in found], axis=0)


def rarity(
  frequency: Int64[np.ndarray, "W"], units: int
) -> Float64[np.ndarray, "W"]:
  """Returns inverse document frequencies, of words that some units hold."""
  return np.log(units / np.maximum(frequency, 1))


def signals(
  units: Sequence[Unit],
  words: UnitWords,
  rarity: Float64[np.ndarray, "W"],
  language: str = "en",
) -> Float64[np.ndarray, "3 N"]:
  """Returns what difficulty is a mean of, before it is ranked.

  Args:
    units: to be measured.
    words: of these units.
    rarity: of each distinct word.
    language: of the text.

  Returns:
    `SIGNALS` rows; nan where a unit has no such signal.
  """
  sentences = np.array([len(unit.parts) for unit in units], np.int64)
  spoken = [readability.syllables(w) for w in words.distinct]
  some = np.maximum(words.counts, 1)
  ease = readability.reading_ease(
    some, sentences, words.sums(np.array(spoken, np.float64))
  )
  readable = [
    readability.applies("".join(unit.parts), language) for unit in units
  ]
  return np.array(
    [
      words.sums(rarity) / some,
      np.where(readable, -ease, np.nan),
      words.counts,
    ],
    np.float64,
  )


SIGNALS = 3


def _percentile_ranks(
  values: Num[np.ndarray, "N"],
) -> Float64[np.ndarray, "N"]:
  """Ranks from 0 to 1; equal values share the mean of theirs, nan has none."""
  ranks = np.full(len(values), np.nan)
  some = ~np.isnan(values)
  _, inverse, counts = np.unique(
    values[some], return_inverse=True, return_counts=True
  )
  rank = np.cumsum(counts) - (counts + 1) / 2
  ranks[some] = rank[inverse] / max(int(some.sum()) - 1, 1)
  return ranks


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


def easiest(
  units: Sequence[Unit], fraction: float, language: str = "en"
) -> Selection:
  """Selects the least difficult share of the units.

  It rounds up, and of equally difficult units the earlier ones are kept.
  Documents are not comparable in this way, only their parts.
  """
  count = share(fraction, len(units))
  scores = difficulty(units, language)
  kept = np.sort(np.argsort(scores, kind="stable")[:count])
  return Selection([units[i] for i in kept], scores[kept], scores)


def share(fraction: float, count: int) -> int:
  """Returns a share of so many units, rounded up."""
  # The small amount undoes rounding: 1/3 of 3 is 1.
  return math.ceil(fraction * count - 1e-9)
