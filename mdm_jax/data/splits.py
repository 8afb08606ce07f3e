"""Which text is trained on, which chooses, and which is measured at the end.

Of many documents whole ones are held out, by a hash of each text: adding others
moves none, and duplicates stay together. Where that would hold out much more or
much less than was asked, or too few documents to say anything, the ends of all
documents are held out instead: train first, then validation, then test.

What this is decided by are sums over documents (`Counts`), so that a corpus may
be counted part by part.
"""

import dataclasses
import hashlib
from collections.abc import Container, Iterable, Sequence
from typing import Any, Literal

from mdm_jax.core.errors import UserError
from mdm_jax.data.config import DataConfig
from mdm_jax.data.text_files import Document

TRAIN, VALIDATION, TEST = "train", "validation", "test"
HELD_OUT = VALIDATION, TEST
SIDES = TRAIN, *HELD_OUT

FEWEST = 4  # different documents that are held out whole
_LEAST = 40  # characters of an end, about half a line
_PLACES = 2**48  # of texts, by their hashes

Way = Literal["documents", "ends"]


@dataclasses.dataclass(frozen=True)
class Sides:
  """Documents on each side, or parts of them, in the order of the corpus."""

  train: list[Document]
  validation: list[Document]
  test: list[Document]

  def __getitem__(self, name: str) -> list[Document]:
    """Returns a side by its name."""
    return getattr(self, name)

  def count(self) -> dict[str, dict[str, int]]:
    """Returns how many documents and characters are on each side."""
    return {
      "documents": {s: len(self[s]) for s in SIDES},
      "characters": {s: sum(len(d.text) for d in self[s]) for s in SIDES},
    }


@dataclasses.dataclass(frozen=True)
class Shares:
  """Shares of the characters to hold out; 0 where text is given for it.

  Attributes:
    validation: what chooses.
    test: what is measured at the end.
    wanted: the sides that come from the corpus.
  """

  validation: float
  test: float
  wanted: tuple[str, ...]

  def of(self, side: str) -> float:
    """Returns the share of a side."""
    return getattr(self, side) if side in self.wanted else 0.0


def shares_of(data: DataConfig) -> Shares:
  """Returns what a config asks to hold out of its corpus."""
  given = {VALIDATION: data.validation_corpus, TEST: data.test_corpus}
  wanted = tuple(side for side in HELD_OUT if not given[side])
  return Shares(data.eval_fraction, data.test_fraction, wanted)


def place(text: str, salt: str = "") -> float:
  """Maps a text to [0, 1), evenly; another salt gives other places."""
  digest = hashlib.sha256((salt + text).encode()).digest()
  return int.from_bytes(digest[:6]) / _PLACES


# MARK: what is counted


@dataclasses.dataclass
class Counts:
  """What the way of splitting follows from, of some documents.

  Attributes:
    documents: how many.
    characters: in them.
    by_hash: characters on each side of those held out, whole documents.
    by_ends: the same, for ends of documents.
    by_any_end: the same, for ends however short.
    lowest: of each side by hash, the lowest different places of texts.
  """

  documents: int
  characters: int
  by_hash: dict[str, int]
  by_ends: dict[str, int]
  by_any_end: dict[str, int]
  lowest: dict[str, list[float]]

  def add(self, other: "Counts") -> None:
    """Adds those of other documents."""
    self.documents += other.documents
    self.characters += other.characters
    for name in ("by_hash", "by_ends", "by_any_end"):
      mine, theirs = getattr(self, name), getattr(other, name)
      setattr(self, name, {s: mine[s] + theirs[s] for s in HELD_OUT})
    self.lowest = {
      s: _lowest([*self.lowest[s], *other.lowest[s]]) for s in SIDES
    }


def count(documents: Iterable[Document], shares: Shares) -> Counts:
  """Counts documents, for each way they could be split."""
  zero = dict.fromkeys(HELD_OUT, 0)
  places: dict[str, set[float]] = {side: set() for side in SIDES}
  found = Counts(0, 0, dict(zero), dict(zero), dict(zero), {})
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
  """How documents are split.

  Attributes:
    way: whole documents by their hashes, or the end of each.
    shares: what is held out.
    bounds: of places: validation is below the first, test below the second.
    least: characters of the shortest end.
  """

  way: Way
  shares: Shares
  bounds: tuple[float, float] = (0.0, 0.0)
  least: int = _LEAST

  def __call__(self, documents: Sequence[Document]) -> Sides:
    """Returns the documents on each side."""
    sides: dict[str, list[Document]] = {side: [] for side in SIDES}
    for document in documents:
      if self.way == "documents":
        side = _side(place(document.text), *self.bounds, self.shares)
        sides[side].append(document)
        continue
      for side, text in _ends(document.text, self.shares, self.least).items():
        if text:
          name = document.name + (f":{side}" if side != TRAIN else "")
          sides[side].append(Document(name, text))
    return Sides(**sides)


def decide(counts: Counts, shares: Shares) -> Split:
  """Returns the way to split documents that were counted.

  Raises:
    UserError: there is too little text to hold out any.
  """
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
  """Whether each side has about what was asked for."""
  asked = {s: shares.of(s) * counts.characters for s in shares.wanted}
  return all(0 < 0.5 * n <= held[s] <= 2 * n for s, n in asked.items())


def _bounds(shares: Shares) -> tuple[float, float]:
  # A text held out for one side stays there when the other's is given.
  return shares.validation, shares.validation + shares.test


def _lifted(counts: Counts, shares: Shares) -> tuple[float, float] | None:
  """Returns bounds that leave no side empty, if there are texts for that."""
  known = sorted(place for side in SIDES for place in counts.lowest[side])
  needed = len(shares.wanted)
  if len(known) <= needed:
    return None
  bounds, last = [], 0.0
  for side, bound in zip(HELD_OUT, _bounds(shares), strict=True):
    bound = max(bound, last)
    inside = [at for at in known if last <= at < bound]
    if side in shares.wanted and not inside:
      after = [at for at in known if at >= bound]
      bound = after[0] + 1 / _PLACES if after else 1.0
    bounds.append(bound)
    last = bound
  if any(at >= last for at in known):
    return bounds[0], bounds[1]
  ends = iter(at + 1 / _PLACES for at in known)
  first = next(ends) if VALIDATION in shares.wanted else 0.0
  return first, next(ends) if TEST in shares.wanted else first


def _side(at: float, first: float, second: float, shares: Shares) -> str:
  side = VALIDATION if at < first else TEST if at < second else TRAIN
  return side if side in shares.wanted else TRAIN


# MARK: ends of documents


def _ends(text: str, shares: Shares, least: int) -> dict[str, str]:
  """Returns the part of a text on each side; all in train if it is short.

  Args:
    text: of a document.
    shares: of its characters.
    least: characters an end has to have.
  """
  size = len(text.rstrip())
  parts, rest = {TRAIN: text, VALIDATION: "", TEST: ""}, text
  for side in (TEST, VALIDATION):
    if side not in shares.wanted:
      continue
    wanted = max(round(shares.of(side) * size), 1)
    cut = _cut(rest, wanted)
    if wanted < least or not rest[:cut].strip() or not rest[cut:].strip():
      return {TRAIN: text, VALIDATION: "", TEST: ""}
    parts[side], rest = rest[cut:], rest[:cut]
  return parts | {TRAIN: rest}


def _cut(text: str, size: int) -> int:
  """Returns where an end begins, at a line or a word if one starts near.

  Args:
    text: to be cut.
    size: characters of the end; one that is not white space is among them.
  """
  end = len(text.rstrip())
  target = max(end - size, 0)
  first = max(0, target - max(40, size // 2))
  for mark in ("\n", " "):
    found = text.rfind(mark, first, target)
    if found >= 0:
      return found + 1
  return target


# MARK: text that is given for a side


def without(
  documents: list[Document], held: Container[float]
) -> list[Document]:
  """Returns the documents whose text is not held out elsewhere already."""
  if not held:
    return documents
  return [d for d in documents if place(d.text) not in held]


def told(
  split: Split, sizes: dict[str, dict[str, int]], repeated: int
) -> dict[str, Any]:
  """Returns what is to be known of a split, as plain values.

  Args:
    split: of the corpus.
    sizes: of the sides that it has led to, as `Sides.count` gives them.
    repeated: documents left out, being held out elsewhere already.
  """
  given = [s for s in HELD_OUT if s not in split.shares.wanted]
  return {"way": split.way, "given": given, **sizes, "repeated": repeated}


_WAYS = {
  "documents": "whole documents, by a hash of each text",
  "ends": "ends of documents, which are too few or too unequal to be apart",
}


def describe(told: dict[str, Any]) -> str:
  """Says how text was split, and how much of it is where."""
  total = max(sum(told["characters"].values()), 1)
  parts = [
    f"{side} {told['documents'][side]:,} documents, {size:,} characters"
    f" ({size / total:.1%})" + (", given" if side in told["given"] else "")
    for side, size in told["characters"].items()
  ]
  way = (
    f"held out: {_WAYS[told['way']]}" if told["given"] != [*HELD_OUT] else ""
  )
  lines = [*([way] if way else []), *parts]
  if told["repeated"]:
    lines.append(
      f"left out: {told['repeated']:,} documents that are in a held-out corpus"
    )
  return "\n".join(lines)
