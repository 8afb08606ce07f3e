"""From the units of a stage to its rows, and what is to be known of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mdm_jax.core.config import Config, StageConfig
from mdm_jax.data.packing import Rows, Tokens, join_sentences, pack
from mdm_jax.data.segments import Selection, Unit
from mdm_jax.data.tokenizer import Tokenizer

HELD_OUT = "held_out"
_BINS = 20  # of the histogram of difficulty
_EXAMPLES = 5
_GROUP = 2**21  # characters tokenised at once: ids are Python's for a moment


def stage_name(index: int) -> str:
  """Returns what the rows of a stage are called on disk."""
  return f"stage_{index + 1}"


def held_out_stage(config: Config) -> StageConfig:
  """Returns the stage that held-out text is written as: all of it."""
  return StageConfig(unit="paragraphs", length=config.stages[-1].length)


def row_lengths(config: Config) -> dict[str, int]:
  """Returns tokens a row, by the name of the rows on disk."""
  stages = enumerate(config.stages)
  lengths = {stage_name(i): stage.length for i, stage in stages}
  return lengths | {HELD_OUT: config.stages[-1].length}


def make_rows(
  units: list[Unit],
  selection: Selection | None,
  stage: StageConfig,
  tokenizer: Tokenizer,
) -> tuple[Rows, dict[str, Any]]:
  """Returns packed rows, and counts and examples of them.

  Args:
    units: all that were found.
    selection: those of them to train on (None: all).
    stage: how they are written.
    tokenizer: of the ids.
  """
  selected = selection.units if selection else units
  pieces = _encode(selected, stage, tokenizer)
  fitting = [p for p in pieces if len(p) <= stage.length]
  rows = pack(fitting, stage.length, tokenizer.vocab.pad)
  return rows, {
    "units_found": len(units),
    "units_selected": len(selected),
    "texts_too_long": len(pieces) - len(fitting),
    "rows": len(rows),
    "tokens": int((rows.segments > 0).sum()),
    "capacity": int(rows.tokens.size),
    "difficulty": _difficulty(selection),
    "examples": _examples(selection, fitting, tokenizer),
  }


def _difficulty(selection: Selection | None) -> dict[str, Any] | None:
  if selection is None:
    return None
  return {"histogram": selection.histogram(_BINS), "cut": selection.cut}


def _examples(
  selection: Selection | None, pieces: list[Tokens], tokenizer: Tokenizer
) -> list[str]:
  """A few texts, from easy to difficult, or else from first to last."""
  if selection is None:
    return [tokenizer.decode(piece) for piece in spread(pieces)]
  rising = np.argsort(selection.kept, kind="stable").tolist()
  return ["\n".join(selection.units[i].parts) for i in spread(rising)]


def spread(values: Sequence[Any]) -> list[Any]:
  """Returns a few values, from the first to the last."""
  at = np.linspace(0, len(values) - 1, min(_EXAMPLES, len(values)))
  return [values[int(i)] for i in at]


def _encode(
  units: list[Unit], stage: StageConfig, tokenizer: Tokenizer
) -> list[Tokens]:
  """Returns the token sequences of a stage, before packing."""
  pieces, group, size = [], [], 0
  for unit in units:
    group.append(unit)
    size += sum(map(len, unit.parts))
    if size >= _GROUP:
      pieces += _encode_group(group, stage, tokenizer)
      group, size = [], 0
  return pieces + _encode_group(group, stage, tokenizer)


def _encode_group(
  units: list[Unit], stage: StageConfig, tokenizer: Tokenizer
) -> list[Tokens]:
  vocab = tokenizer.vocab
  encoded = tokenizer.encode_batch([p for unit in units for p in unit.parts])
  parts, at = [], 0
  for unit in units:
    parts.append(encoded[at : at + len(unit.parts)])
    at += len(unit.parts)
  match stage.unit:
    case "sentences":
      return [sentence for (sentence,) in parts]
    case "pairs":
      between = np.array([vocab.separator], np.int32)
      return [np.concatenate([a, between, b]) for a, b in parts]
    case "paragraphs":
      return [
        piece
        for sentences in parts
        for piece in join_sentences(sentences, stage.length, vocab.eos)
      ]
