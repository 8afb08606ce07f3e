"""Turns a stage's units into packed rows, counts and examples."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mdm_jax.data import answers, corpora, held_out, segments
from mdm_jax.data.config import DataConfig, RowsConfig, StageConfig
from mdm_jax.data.corpora import Asked
from mdm_jax.data.held_out import HeldOut
from mdm_jax.data.holes import Encoded, Holes
from mdm_jax.data.packing import Tokens, join_sentences, pack, pack_with_places
from mdm_jax.data.rows import Rows
from mdm_jax.data.segments import Found, Selection, Unit
from mdm_jax.data.splits import HELD_OUT
from mdm_jax.data.tokenizer import Tokenizer

_BINS = 20  # in the histogram of difficulty
_EXAMPLES = 5
# Characters encoded at once. The tokenizer returns lists of Python integers,
# which take several times the memory of arrays.
_GROUP = 2**21


def stage_name(index: int) -> str:
  """Returns the name of a stage's rows on disk."""
  return f"stage_{index + 1}"


def row_lengths(config: RowsConfig) -> dict[str, int]:
  """Returns {name of the rows on disk: tokens per row}."""
  stages = enumerate(config.stages)
  lengths = {stage_name(i): stage.length for i, stage in stages}
  return lengths | dict.fromkeys(HELD_OUT, config.stages[-1].length)


def make_rows(
  found: Found,
  selection: Selection | None,
  stage: StageConfig,
  tokenizer: Tokenizer,
  data: DataConfig | None = None,
) -> tuple[Rows, dict[str, Any], list[Unit]]:
  """Returns a stage's packed rows, their counts and examples, and their units.

  Args:
    found: the stage's units, and counts of those outside its limits.
    selection: units to keep (None: all).
    stage: how units become token sequences.
    tokenizer: makes the ids.
    data: how long answers are, and what is hidden.
  """
  selected = selection.units if selection else found.units
  data, room, texts, others = data or DataConfig(), stage.length, None, {}
  if stage.unit == "conversations":
    is_random = data.answer_fill == "random"
    texts = _conversations(selected, tokenizer, data, is_random)
    pieces = [text.ids for text in texts]
  else:
    holes = Holes.of(data) if corpora.asked(data) == "holes" else None
    room -= holes.growth if holes else 0
    pieces = _encode(selected, stage, room, tokenizer)
    if holes:
      texts = [holes.hide(p, tokenizer.vocab) for p in pieces if len(p) <= room]
  fitting = [p for p in pieces if len(p) <= room]
  if texts is not None:
    texts = [text for text in texts if text and len(text.ids) <= stage.length]
    others["answer"] = [text.answer for text in texts]
  shown = fitting if texts is None else [text.ids for text in texts]
  # Of paragraphs every token is kept, so all of them are read.
  read = selected
  if stage.unit != "paragraphs":
    both = zip(selected, pieces, strict=True)
    read = [unit for unit, piece in both if len(piece) <= room]
  rows = pack(shown, stage.length, tokenizer.vocab, **others)
  difficulty = None
  if selection:
    bars = selection.histogram(_BINS)
    difficulty = {"histogram": bars, "cut": selection.cut}
  counts = {
    "units_found": len(found.units),
    "units_selected": len(selected),
    "units_too_short": found.too_short,
    "units_too_long": found.too_long,
    "texts_too_long": len(pieces) - len(fitting),
    "documents": found.documents,
    "without_sentences": found.without_sentences,
    "characters": found.characters,
    "characters_read": sum(len(part) for unit in read for part in unit.parts),
    **_sizes(rows),
    **({} if texts is None else _answers(texts, len(fitting), rows)),
    "difficulty": difficulty,
    "examples": _examples(selection, shown, tokenizer),
  }
  return rows, counts, read


def make_held_out(
  texts: Sequence[str],
  config: RowsConfig,
  tokenizer: Tokenizer,
  asked: Asked = "all",
) -> tuple[HeldOut, dict[str, Any]]:
  """Returns held-out rows of the whole texts, with their table and counts.

  Args:
    texts: documents of one split.
    config: what rows depend on.
    tokenizer: makes the ids.
    asked: what of them is measured. Texts with answers are left out if they are
      longer than a row, and those with holes if they are too short for these.
  """
  # All of the text, whatever the stages select.
  unit = "conversations" if asked == "answers" else "paragraphs"
  stage = StageConfig(unit=unit, length=config.stages[-1].length)
  units = segments.units(texts, stage, config.data.language)
  others, counts, texts_too_long = {}, {}, 0
  if asked == "answers":
    found = _conversations(units, tokenizer, config.data)
    size = lambda unit: len(answers.plain("".join(unit.parts)).encode())
    lines = [(unit.document, size(unit)) for unit in units]
    pieces = [text.ids for text in found]
  else:
    holes = Holes.of(config.data) if asked == "holes" else None
    room = stage.length - (holes.growth if holes else 0)
    pieces, lines = _running(units, room, tokenizer)
    if holes:
      found = [holes.hide(piece, tokenizer.vocab) for piece in pieces]
  if asked != "all":
    both = zip(lines, found, strict=True)
    kept = [(l, t) for l, t in both if t and len(t.ids) <= stage.length]
    texts_too_long = len(found) - len(kept) if asked == "answers" else 0
    fitting = len(pieces) - texts_too_long
    lines, pieces = [line for line, _ in kept], [text.ids for _, text in kept]
    others["answer"] = [text.answer for _, text in kept]
  rows, places = pack_with_places(
    pieces, stage.length, tokenizer.vocab, **others
  )
  if asked != "all":
    counts = _answers([text for _, text in kept], fitting, rows)
  table = np.array(lines, np.int64).reshape(-1, 2)
  # Number each document's pieces from 0: subtract its first line's index.
  _, first, of = np.unique(table[:, 0], return_index=True, return_inverse=True)
  number = np.arange(len(table)) - first[of]
  table = np.hstack([places, table, number[:, None]])
  # By row, then segment: what `HeldOut` promises and `row_checks` verifies.
  table = table[np.lexsort((table[:, 1], table[:, 0]))]
  return HeldOut(rows, table), {
    "units_found": len(units),
    "units_selected": len(units),
    "texts_too_long": texts_too_long,
    **_sizes(rows),
    **counts,
    "difficulty": None,
    "examples": _examples(None, pieces, tokenizer),
  }


def _running(
  units: Sequence[Unit], length: int, tokenizer: Tokenizer
) -> tuple[list[Tokens], list[tuple[int, int]]]:
  """Returns pieces of running text; of each its document and its bytes."""
  widths = np.array([len(piece) for piece in tokenizer.pieces], np.int64)
  pieces, lines = [], []
  for unit, encoded in _encoded(units, tokenizer):
    found = join_sentences(encoded, length, tokenizer.vocab.end)
    sizes = held_out.original_bytes(unit.parts, encoded, found, widths)
    pieces += found
    lines += [(unit.document, size) for size in sizes]
  return pieces, lines


def _conversations(
  units: Sequence[Unit],
  tokenizer: Tokenizer,
  data: DataConfig,
  random: bool = False,
) -> list[Encoded]:
  found, holes = [], Holes.of(data)
  for group in _groups(units):
    parts = [unit.parts for unit in group]
    found += answers.encode(parts, tokenizer, data.answer_length, random, holes)
  return found


def _answers(
  texts: Sequence[Encoded], fitting: int, rows: Rows
) -> dict[str, int]:
  """Returns counts of answers, for `coverage.left_out` and a run's start.

  Args:
    texts: those that were kept.
    fitting: number of those that are no longer than a row.
    rows: the kept ones.
  """
  return {
    "texts_without_room": fitting - len(texts),
    "answer_tokens": int(rows.answer.sum()),
    "answers_too_long": sum(not text.fits for text in texts),
  }


def _sizes(rows: Rows) -> dict[str, int]:
  sizes = {
    "rows": len(rows),
    "tokens": int((rows.segments > 0).sum()),
    "capacity": int(rows.tokens.size),
    "most_segments": int(rows.segments.max(initial=0)),
  }
  if "answer" in rows.fields:
    # Rows without the field may have any of their tokens masked.
    sizes["most_asked"] = int(rows.answer.sum(axis=1).max(initial=0))
  return sizes


def _examples(
  selection: Selection | None, pieces: list[Tokens], tokenizer: Tokenizer
) -> list[str]:
  """Returns a few texts, from easy to difficult, or in order if unranked."""
  if selection is None:
    return [tokenizer.decode(piece) for piece in spread(pieces)]
  rising = np.argsort(selection.kept, kind="stable").tolist()
  return ["\n".join(selection.units[i].parts) for i in spread(rising)]


def spread(values: Sequence[Any]) -> list[Any]:
  """Returns up to five values, evenly spaced from the first to the last."""
  at = np.linspace(0, len(values) - 1, min(_EXAMPLES, len(values)))
  return [values[int(i)] for i in at]


def _encode(
  units: list[Unit], stage: StageConfig, room: int, tokenizer: Tokenizer
) -> list[Tokens]:
  """Returns the token sequences of a stage, before they are packed.

  Running text is cut into pieces of up to `room` tokens.
  """
  vocab = tokenizer.vocab
  parts = (encoded for _, encoded in _encoded(units, tokenizer))
  match stage.unit:
    case "sentences" | "lines":
      return [sentence for (sentence,) in parts]
    case "pairs":
      between = np.array([vocab.need("separator")], np.int32)
      return [np.concatenate([a, between, b]) for a, b in parts]
    case "paragraphs":
      return [
        piece
        for sentences in parts
        for piece in join_sentences(sentences, room, vocab.end)
      ]


def _encoded(
  units: list[Unit], tokenizer: Tokenizer
) -> Iterator[tuple[Unit, list[Tokens]]]:
  """Yields each unit with the ids of its parts."""
  for group in _groups(units):
    parts = [part for unit in group for part in unit.parts]
    encoded = iter(tokenizer.encode_batch(parts))
    for unit in group:
      yield unit, list(itertools.islice(encoded, len(unit.parts)))


def _groups(units: Sequence[Unit]) -> Iterator[list[Unit]]:
  """Yields consecutive units, about `_GROUP` characters at once."""
  sizes = itertools.accumulate(sum(map(len, u.parts)) for u in units)
  groups = zip(units, (size // _GROUP for size in sizes), strict=True)
  for _, pairs in itertools.groupby(groups, key=lambda pair: pair[1]):
    yield [unit for unit, _ in pairs]
