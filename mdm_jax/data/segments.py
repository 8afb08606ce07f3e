"""Divides documents into a stage's text units and rates their difficulty."""

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence

import numpy as np
import sentencex
from jaxtyping import Float64, Int64, Num

from mdm_jax.data import answers, pieces, ranking, readability
from mdm_jax.data import words as words_lib
from mdm_jax.data.config import StageConfig

# White space outside ASCII, with which sentencex fails on some texts.
_ODD_SPACE = re.compile(r"[^\S\x00-\x7f]")


@dataclasses.dataclass(frozen=True)
class Unit:
  """A piece of text that a stage trains on.

  Attributes:
    document: index of its document.
    parts: for "sentences" and "lines" one stripped sentence or line; for
      "pairs" two, to be joined by the separator id; for "paragraphs" all
      sentences of the document, verbatim, so that they join to the document;
      for "conversations" its prompts and answers, as from `answers.parts`.
    starts: where each part begins in the document; empty for whole documents.
  """

  document: int
  parts: tuple[str, ...]
  starts: tuple[int, ...] = dataclasses.field(default=(), compare=False)


def sentences(text: str, language: str = "en") -> list[str]:
  """Divides a text into sentences that join to the text.

  A space before a sentence belongs to that sentence, as in SentencePiece, so a
  sentence has the same ids alone as in its text; with the space at the end of
  the sentence before, text takes 2 % more tokens. Other white space belongs to
  the sentence before it.

  Args:
    text: any text.
    language: ISO 639-1 code; it decides which abbreviations end no sentence.

  Example:
    >>> sentences("One. Two.")
    ['One.', ' Two.']
  """
  # Each odd space becomes one plain space, so offsets stay valid. Only starts
  # are used: sentencex leaves out some white space between sentences.
  found = sentencex.get_sentence_boundaries(language, _ODD_SPACE.sub(" ", text))
  starts = [b["start_index"] for b in found if not b["text"].isspace()]
  cuts = [start - (text[start - 1] == " ") for start in starts[1:]]
  return [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)]) if b]


@dataclasses.dataclass
class Found:
  """The units of a stage in some documents, and counts of what is left out.

  Attributes:
    units: units within the stage's word limits, in the order of the text.
    too_short: number of units with fewer words than `min_words`.
    too_long: number of units with more words than `max_words`.
    documents: number of documents searched.
    without_sentences: documents that have no sentences and were divided into
      lines and parts of lines instead.
    characters: in all units and those left out, without surrounding space.
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
  """Returns the units of a stage, and counts of those outside its limits.

  Word limits apply to a sentence, a line, or both parts of a pair together;
  whole documents have none. The result may be empty.
  """
  found = Found(documents=len(texts))
  for i, text in enumerate(texts):
    if stage.unit == "conversations":
      parts = answers.parts(text)
      found.units.append(Unit(i, parts))
      found.characters += sum(map(len, parts))
      continue
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
  """Returns the units of a stage, without counts."""
  return find(texts, stage, language).units


# (stripped text, start in the document, number of words).
_Part = tuple[str, int, int]


def _counted(verbatim: Sequence[str]) -> list[_Part]:
  """Returns the parts of a document, stripped, without blank ones.

  Args:
    verbatim: parts that join to the document.
  """
  parts, at = [], 0
  for part in verbatim:
    if stripped := part.strip():
      # `strip` removed only white space, so the first character found is its
      # start.
      start = at + part.index(stripped[0])
      parts.append((stripped, start, words_lib.count(stripped)))
    at += len(part)
  return parts


def _pieces(text: str, verbatim: list[str], stage: StageConfig) -> list[_Part]:
  each = 2 if stage.unit == "pairs" else 1
  # Without `max_words`, allow half a row: most words take more than a token.
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
  """Adds a document's units that are within the limits; counts the others."""
  found.characters += sum(len(part) for part, *_ in parts)
  most = math.inf if stage.max_words is None else stage.max_words
  together = (
    # Consecutive pairs that don't overlap; an odd last part has no partner.
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
  """The words of some units, in a form for vectorised sums.

  Attributes:
    distinct: each distinct word once, in order of appearance.
    ids: index in `distinct` of every word of the text.
    owner: index of the unit of every word of the text.
    counts: number of words in each unit.
  """

  distinct: list[str]
  ids: Int64[np.ndarray, "T"]
  owner: Int64[np.ndarray, "T"]
  counts: Int64[np.ndarray, "N"]

  def frequency(self) -> Int64[np.ndarray, "W"]:
    """Returns the number of units that contain each distinct word."""
    size = max(len(self.distinct), 1)
    # Each (unit, word) once, however often the word is in the unit.
    pairs = np.unique(self.owner * size + self.ids)
    return np.bincount(pairs % size, minlength=len(self.distinct))

  def sums(self, of_word: Num[np.ndarray, "W"]) -> Num[np.ndarray, "N"]:
    """Sums a value per distinct word over the words of each unit."""
    return np.bincount(
      self.owner, of_word[self.ids], minlength=len(self.counts)
    )


def unit_words(units: Sequence[Unit]) -> UnitWords:
  """Returns the lower-case words of units."""
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
  """Returns each unit's difficulty among these units, in [0, 1].

  It is the mean of the percentile ranks of up to three signals that serve a
  curriculum (Zhang et al. 2025, arXiv 2506.11300): word rarity (mean inverse
  document frequency, a unit being a document), number of words, and, for
  English in Latin letters, Flesch's reading ease. Their compression ratio is
  left out: for single sentences it is little more than the inverse of the
  length, so the two would cancel.
  """
  words = unit_words(units)
  found = signals(units, words, rarity(words.frequency(), len(units)), language)
  # Without a reading ease, a unit's other two signals decide.
  return np.nanmean([_percentile_ranks(signal) for signal in found], axis=0)


def rarity(
  frequency: Int64[np.ndarray, "W"], units: int
) -> Float64[np.ndarray, "W"]:
  """Returns the inverse document frequency of words.

  Args:
    frequency: number of units that contain each word.
    units: number of units.
  """
  # Over several blocks, bins that no word falls into have frequency 0.
  return np.log(units / np.maximum(frequency, 1))


def signals(
  units: Sequence[Unit],
  words: UnitWords,
  rarity: Float64[np.ndarray, "W"],
  language: str = "en",
) -> Float64[np.ndarray, "3 N"]:
  """Returns the signals whose ranks difficulty is the mean of.

  Args:
    units: units to measure.
    words: words of these units.
    rarity: inverse document frequency of each distinct word.
    language: ISO 639-1 code.

  Returns:
    `SIGNALS` rows (rarity, reading ease with its sign reversed, number of
    words); more is more difficult, NaN where a signal does not apply.
  """
  sentences = np.array([len(unit.parts) for unit in units], np.int64)
  spoken = [readability.syllables(w) for w in words.distinct]
  # A unit may have no words at all, only punctuation.
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
  """Returns ranks from 0 to 1; ties share their mean rank, NaN stays NaN."""
  ranks = np.full(len(values), np.nan)
  some = ~np.isnan(values)
  _, inverse, counts = np.unique(
    values[some], return_inverse=True, return_counts=True
  )
  ranks[some] = ranking.mean_ranks(counts)[inverse]
  return ranks


@dataclasses.dataclass(frozen=True)
class Selection:
  """The least difficult share of some units.

  Attributes:
    units: the units kept, in their original order.
    kept: their difficulty.
    difficulty: of all units, kept or not.
  """

  units: list[Unit]
  kept: Float64[np.ndarray, "K"]
  difficulty: Float64[np.ndarray, "N"]

  @property
  def cut(self) -> float:
    """The highest difficulty that was kept."""
    return float(self.kept.max(initial=0))

  def histogram(self, bins: int) -> list[int]:
    """Returns the number of units in each of `bins` equal parts of [0, 1]."""
    return np.histogram(self.difficulty, bins, (0, 1))[0].tolist()


def easiest(
  units: Sequence[Unit], fraction: float, language: str = "en"
) -> Selection:
  """Returns the least difficult share of the units, rounded up.

  Of equally difficult units the earlier ones are kept. Only parts of documents
  can be compared in this way, not whole documents.
  """
  count = share(fraction, len(units))
  scores = difficulty(units, language)
  # Stable, so ties go to the earlier unit; sorted, to keep the text's order.
  kept = np.sort(np.argsort(scores, kind="stable")[:count])
  return Selection([units[i] for i in kept], scores[kept], scores)


def share(fraction: float, count: int) -> int:
  """Returns a share of `count`, rounded up."""
  # 1e-9 undoes floating-point error: 1/3 of 3 must be 1, not 2.
  return math.ceil(fraction * count - 1e-9)
