"""Splits a corpus into train, validation and test text.

With many documents, whole ones are held out by a hash of their text: adding
documents moves none of the others, and duplicates stay on one side. If that
would hold out far more or less than was asked for, or too few documents to say
anything, the end of every document is held out instead: train comes first, then
validation, then test.

The choice depends only on sums over documents (`Counts`), so a corpus can be
counted in parts.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from mdm_jax.core.errors import UserError
from mdm_jax.data import answers
from mdm_jax.data.config import DataConfig
from mdm_jax.data.text_files import Document

TRAIN, VALIDATION, TEST = "train", "validation", "test"
HELD_OUT = VALIDATION, TEST
SIDES = TRAIN, *HELD_OUT

FEWEST = 4  # distinct documents in every split, if whole ones are held out
_LEAST = 40  # characters in an end, about half a line
_PLACES = 2**48  # possible hashes of texts

Way = Literal["documents", "ends"]


# The documents of each split, or parts of them, in the corpus' order.
Sides = dict[str, list[Document]]


def no_documents() -> Sides:
  """Returns empty splits."""
  return {side: [] for side in SIDES}


def sizes(sides: Sides) -> dict[str, dict[str, int]]:
  """Returns the number of documents and characters in each split."""
  return {
    "documents": {s: len(sides[s]) for s in SIDES},
    "characters": {s: sum(len(d.text) for d in sides[s]) for s in SIDES},
  }


@dataclasses.dataclass(frozen=True)
class Shares:
  """Shares of the corpus' characters to hold out.

  Attributes:
    validation: for validation.
    test: for test.
    wanted: splits taken from the corpus; the others have a corpus of their own.
  """

  validation: float
  test: float
  wanted: tuple[str, ...]

  def of(self, side: str) -> float:
    """Returns a split's share; 0 if it has a corpus of its own."""
    return getattr(self, side) if side in self.wanted else 0.0


def shares_of(data: DataConfig) -> Shares:
  """Returns the shares that a config asks to hold out of its corpus."""
  given = {VALIDATION: data.validation_corpus, TEST: data.test_corpus}
  wanted = tuple(side for side in HELD_OUT if not given[side])
  return Shares(data.eval_fraction, data.test_fraction, wanted)


def place(text: str, salt: str = "") -> float:
  """Maps a text to [0, 1) by its hash; each salt gives another mapping."""
  digest = hashlib.sha256((salt + text).encode()).digest()
  # 48 bits, which a float64 holds exactly.
  return int.from_bytes(digest[:6]) / _PLACES


# MARK: counting


def _none_held() -> dict[str, int]:
  return dict.fromkeys(HELD_OUT, 0)


@dataclasses.dataclass
class Counts:
  """Sums over documents from which `decide` chooses how to split.

  Attributes:
    documents: number of documents.
    characters: in all of them.
    by_hash: characters in each held-out split, if whole documents are held out.
    by_ends: the same, if ends of at least `_LEAST` characters are.
    by_any_end: the same, if ends of any length are.
    lowest: the lowest distinct `place`s in each split by hash, `FEWEST` at
      most.
  """

  documents: int = 0
  characters: int = 0
  by_hash: dict[str, int] = dataclasses.field(default_factory=_none_held)
  by_ends: dict[str, int] = dataclasses.field(default_factory=_none_held)
  by_any_end: dict[str, int] = dataclasses.field(default_factory=_none_held)
  lowest: dict[str, list[float]] = dataclasses.field(
    default_factory=lambda: {side: [] for side in SIDES}
  )

  def add(self, other: "Counts") -> None:
    """Adds the counts of other documents."""
    self.documents += other.documents
    self.characters += other.characters
    for side in HELD_OUT:
      self.by_hash[side] += other.by_hash[side]
      self.by_ends[side] += other.by_ends[side]
      self.by_any_end[side] += other.by_any_end[side]
    for side in SIDES:
      self.lowest[side] = _lowest([*self.lowest[side], *other.lowest[side]])


def count(documents: Iterable[Document], shares: Shares) -> Counts:
  """Counts documents for each way in which they could be split."""
  # Sums for every way at once: the choice needs the whole corpus' sums.
  places: dict[str, set[float]] = {side: set() for side in SIDES}
  found = Counts()
  for document in documents:
    text, at = document.text, place(document.text)
    found.documents += 1
    found.characters += len(text)
    side = _side(at, *_bounds(shares), shares)
    places[side].add(at)
    if side != TRAIN:
      found.by_hash[side] += len(text)
    for sums, least in ((found.by_ends, _LEAST), (found.by_any_end, 1)):
      parts = _ends(text, shares, least)
      for name in HELD_OUT:
        sums[name] += len(parts[name])
  found.lowest = {side: _lowest(places[side]) for side in SIDES}
  return found


def _lowest(places: Iterable[float]) -> list[float]:
  return sorted(set(places))[:FEWEST]


# MARK: the decision


@dataclasses.dataclass(frozen=True)
class Split:
  """How documents are split; call it on them.

  Attributes:
    way: "documents" holds out whole ones by hash, "ends" the end of each.
    shares: what is held out.
    bounds: places below the first are validation, below the second test.
    least: characters in the shortest end.
  """

  way: Way
  shares: Shares
  bounds: tuple[float, float] = (0.0, 0.0)
  least: int = _LEAST

  def __call__(self, documents: Sequence[Document]) -> Sides:
    """Returns the documents of each split."""
    sides = no_documents()
    for document in documents:
      if self.way == "documents":
        side = _side(place(document.text), *self.bounds, self.shares)
        sides[side].append(document)
        continue
      for side, text in _ends(document.text, self.shares, self.least).items():
        if text:
          name = document.name + (f":{side}" if side != TRAIN else "")
          sides[side].append(Document(name, text))
    return sides


def decide(counts: Counts, shares: Shares) -> Split:
  """Returns the way to split documents with these counts.

  Raises:
    UserError: there is too little text to hold any out.
  """
  # In order of preference: whole documents by the shares asked for; ends; whole
  # documents by other bounds, so that none is empty; ends however short.
  enough = all(len(counts.lowest[s]) >= FEWEST for s in (TRAIN, *shares.wanted))
  if enough and _near(counts, counts.by_hash, shares):
    return Split("documents", shares, _bounds(shares))
  if _near(counts, counts.by_ends, shares):
    return Split("ends", shares)
  if bounds := _lifted(counts, shares):
    return Split("documents", shares, bounds)
  if all(counts.by_any_end[side] for side in shares.wanted):
    return Split("ends", shares, least=1)
  raise UserError(
    f"{counts.documents:,} documents with {counts.characters:,} characters are"
    f" too short to hold out text for {' and for '.join(shares.wanted)}: give"
    " more text"
  )


def _near(counts: Counts, held: dict[str, int], shares: Shares) -> bool:
  """Whether each split has half to twice the characters asked for."""
  asked = {s: shares.of(s) * counts.characters for s in shares.wanted}
  # 0 <: a share of 0 fails here, so that later ways give it a little text.
  return all(0 < 0.5 * n <= held[s] <= 2 * n for s, n in asked.items())


def _bounds(shares: Shares) -> tuple[float, float]:
  # The test range is the same with and without a validation corpus, so texts
  # held out for test stay there.
  return shares.validation, shares.validation + shares.test


def _lifted(counts: Counts, shares: Shares) -> tuple[float, float] | None:
  """Returns bounds raised until no split is empty; None with too few texts."""
  known = sorted(place for side in SIDES for place in counts.lowest[side])
  needed = len(shares.wanted)
  if len(known) <= needed:
    return None
  bounds, last = [], 0.0
  # Raise the bound of each empty range to take in the next text.
  for side, bound in zip(HELD_OUT, _bounds(shares), strict=True):
    bound = max(bound, last)
    inside = [at for at in known if last <= at < bound]
    if side in shares.wanted and not inside:
      after = [at for at in known if at >= bound]
      # Ranges are half-open: the smallest bound that includes this place.
      bound = after[0] + 1 / _PLACES if after else 1.0
    bounds.append(bound)
    last = bound
  if any(at >= last for at in known):
    return bounds[0], bounds[1]
  # These bounds leave nothing to train on: hold out one text per split.
  ends = iter(at + 1 / _PLACES for at in known)
  first = next(ends) if VALIDATION in shares.wanted else 0.0
  return first, next(ends) if TEST in shares.wanted else first


def _side(at: float, first: float, second: float, shares: Shares) -> str:
  side = VALIDATION if at < first else TEST if at < second else TRAIN
  return side if side in shares.wanted else TRAIN


# MARK: ends of documents


def _ends(text: str, shares: Shares, least: int) -> dict[str, str]:
  """Returns a text's part in each split; all is train if an end is too short.

  Args:
    text: of a document.
    shares: shares of its characters to hold out.
    least: characters that an end must have.
  """
  # White space at the end doesn't count, or an end could be blank.
  size = len(text.rstrip())
  parts, rest = {TRAIN: text, VALIDATION: "", TEST: ""}, text
  if answers.are_in(text):  # an answer without its prompt would say nothing
    return parts
  # From the end of the text forward: test is last, validation before it.
  for side in (TEST, VALIDATION):
    if side not in shares.wanted:
      continue
    wanted = max(round(shares.of(side) * size), 1)
    cut = _cut(rest, wanted)
    # All or nothing: no document gives an end to one split only.
    if wanted < least or not rest[:cut].strip() or not rest[cut:].strip():
      return {TRAIN: text, VALIDATION: "", TEST: ""}
    parts[side], rest = rest[cut:], rest[:cut]
  return parts | {TRAIN: rest}


def _cut(text: str, size: int) -> int:
  """Returns where an end begins: after a line break or space if one is near.

  Args:
    text: what to cut.
    size: characters of the end, not counting trailing white space.
  """
  end = len(text.rstrip())
  target = max(end - size, 0)
  # Look back no further than this, so an end isn't much longer than asked for.
  first = max(0, target - max(40, size // 2))
  for mark in ("\n", " "):
    found = text.rfind(mark, first, target)
    if found >= 0:
      return found + 1
  return target


# MARK: what was done


def summary(
  split: Split, sizes: dict[str, dict[str, int]], repeated: int
) -> dict[str, Any]:
  """Returns the summary of a split for the manifest, as plain values.

  Args:
    split: of the corpus.
    sizes: of the splits, from `sizes`.
    repeated: documents left out because a held-out corpus has them.
  """
  given = [s for s in HELD_OUT if s not in split.shares.wanted]
  return {"way": split.way, "given": given, **sizes, "repeated": repeated}


_DESCRIPTIONS = {
  "documents": "whole documents, by a hash of each text",
  "ends": "the ends of documents: whole ones are too few or too unequal",
}


def describe(summary: dict[str, Any]) -> str:
  """Describes a split and its sizes in lines of text."""
  total = max(sum(summary["characters"].values()), 1)
  lines = []
  if summary["given"] != [*HELD_OUT]:
    lines.append(f"held out: {_DESCRIPTIONS[summary['way']]}")
  for side, size in summary["characters"].items():
    given = ", its own corpus" if side in summary["given"] else ""
    lines.append(
      f"{side} {summary['documents'][side]:,} documents, {size:,} characters"
      f" ({size / total:.1%}){given}"
    )
  if summary["repeated"]:
    lines.append(
      f"left out: {summary['repeated']:,} documents that are in a held-out"
      " corpus"
    )
  return "\n".join(lines)
