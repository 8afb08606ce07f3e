"""Turns a stage's units into packed rows, counts and examples."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mdm_jax.data import answers, held_out, segments
from mdm_jax.data.answers import Encoded
from mdm_jax.data.config import DataConfig, RowsConfig, StageConfig
from mdm_jax.data.held_out import HeldOut
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
    data: how long answers are.
  """
  selected = selection.units if selection else found.units
  if talks := stage.unit == "conversations":
    data = data or DataConfig()
    texts = _conversations(
      *(selected, tokenizer, data.answer_length),
      random=data.answer_fill == "random",
    )
    pieces = [text.ids for text in texts]
  else:
    pieces = _encode(selected, stage, tokenizer)
  fitting = [p for p in pieces if len(p) <= stage.length]
  others = {}
  if talks:
    texts = [text for text in texts if len(text.ids) <= stage.length]
    others["answer"] = [text.answer for text in texts]
  # Of paragraphs every token is kept, so all of them are read.
  read = selected
  if stage.unit != "paragraphs":
    both = zip(selected, pieces, strict=True)
    read = [unit for unit, piece in both if len(piece) <= stage.length]
  rows = pack(fitting, stage.length, tokenizer.vocab, **others)
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
    **(_answers(texts, rows) if talks else {}),
    "difficulty": difficulty,
    "examples": _examples(selection, fitting, tokenizer),
  }
  return rows, counts, read


def make_held_out(
  texts: Sequence[str],
  config: RowsConfig,
  tokenizer: Tokenizer,
  with_answers: bool = False,
) -> tuple[HeldOut, dict[str, Any]]:
  """Returns held-out rows of the whole texts, with their table and counts.

  Args:
    texts: documents of one split.
    config: what rows depend on.
    tokenizer: makes the ids.
    with_answers: whether they are prompts with answers. Then only the answers
      are measured, and texts longer than a row are left out.
  """
  # All of the text, whatever the stages select.
  unit = "conversations" if with_answers else "paragraphs"
  stage = StageConfig(unit=unit, length=config.stages[-1].length)
  units = segments.units(texts, stage, config.data.language)
  others, counts = {}, {}
  if with_answers:
    length = config.data.answer_length
    found = _conversations(units, tokenizer, length)
    both = zip(units, found, strict=True)
    kept = [(u, text) for u, text in both if len(text.ids) <= stage.length]
    pieces = [text.ids for _, text in kept]
    others["answer"] = [text.answer for _, text in kept]
    size = lambda unit: len(answers.plain("".join(unit.parts)).encode())
    lines = [(unit.document, size(unit)) for unit, _ in kept]
  else:
    pieces, lines = _running(units, stage.length, tokenizer)
  rows, places = pack_with_places(
    pieces, stage.length, tokenizer.vocab, **others
  )
  if with_answers:
    counts = _answers([text for _, text in kept], rows)
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
    "texts_too_long": len(units) - len(pieces) if with_answers else 0,
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
  answer_length: int | None,
  random: bool = False,
) -> list[Encoded]:
  found = []
  for group in _groups(units):
    parts = [unit.parts for unit in group]
    found += answers.encode(parts, tokenizer, answer_length, random)
  return found


def _answers(texts: Sequence[Encoded], rows: Rows) -> dict[str, int]:
  """Returns counts of answers, for `coverage.left_out` and a run's start."""
  return {
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
  units: list[Unit], stage: StageConfig, tokenizer: Tokenizer
) -> list[Tokens]:
  """Returns the token sequences of a stage, before they are packed."""
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
        for piece in join_sentences(sentences, stage.length, vocab.end)
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
