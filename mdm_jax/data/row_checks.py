"""Checks that rows on disk can be trained on, before anything is compiled.

Hashes only show that files are as they were written. They would not show rows
that were written wrong, and neither would JAX: on devices an index past an
array's end is clamped silently, so a wrong id trains another id's embedding.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mdm_jax.core.errors import UserError
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data import corpora
from mdm_jax.data.config import RowsConfig, StageConfig
from mdm_jax.data.holes import Holes
from mdm_jax.data.rows import Field, Values, field

_CHUNK = 2**22  # tokens checked at once, to bound memory


def find_wrong(values: Values, length: int, vocab: Vocabulary) -> str | None:
  """Describes the first error in packed rows; None if there is none.

  Args:
    values: arrays [N, L] by field; memory-mapped ones are read in chunks.
    length: tokens that each row should have.
    vocab: vocabulary of the ids.
  """
  # Shapes and dtypes first: they are known without reading any row.
  shapes = {name: array.shape for name, array in values.items()}
  rows = len(next(iter(values.values())))
  if any(shape != (rows, length) for shape in shapes.values()):
    return f"rows of {length} tokens have shapes {_listed(shapes)}"
  fields = [field(name) for name in values]
  types = {f.name: values[f.name].dtype for f in fields}
  if any(types[f.name] not in map(np.dtype, f.stored) for f in fields):
    return f"unexpected dtypes: {_listed(types)}"
  step = max(_CHUNK // length, 1)
  for i in range(0, rows, step):
    part = {name: array[i : i + step] for name, array in values.items()}
    for f in fields:
      if wrong := _first_wrong(f, part, i, vocab):
        return wrong
  return None


def _first_wrong(
  f: Field, part: Values, before: int, vocab: Vocabulary
) -> str | None:
  """Describes a field's first invalid value; None if all are valid.

  Args:
    f: the field.
    part: all fields of some rows, as one field's check may read another's.
    before: number of rows before these, for the message.
    vocab: vocabulary of the ids.
  """
  if f.wrong is None or not (wrong := f.wrong(part, vocab)).any():
    return None
  row, place = map(int, np.argwhere(wrong)[0])
  reason = f.why(part[f.name][row, place].item(), vocab)
  return f"row {before + row}, token {place}: {reason}"


def _listed(facts: Mapping[str, Any]) -> str:
  return " and ".join(f"{fact} ({name})" for name, fact in facts.items())


def find_wrong_texts(segments: np.ndarray, texts: np.ndarray) -> str | None:
  """Describes an error in the table of held-out texts; None if there is none.

  Args:
    segments: segments of the rows, as in `Rows`.
    texts: the table, as in `HeldOut`.
  """
  if texts.dtype != np.int64 or texts.ndim != 2 or texts.shape[1] != 5:
    return f"a table of {texts.dtype} with shape {texts.shape}"
  step = max(_CHUNK // max(segments.shape[1], 1), 1)
  parts = range(0, len(segments), step)
  # Segments count up from 1, so a row's largest is its number of texts.
  counts = np.concatenate(
    [np.zeros(0, np.int64)]
    + [segments[i : i + step].max(axis=1).astype(np.int64) for i in parts]
  )
  # The rows' own (row, segment) pairs, in the order that the table must have.
  row = np.repeat(np.arange(len(counts)), counts)
  segment = (
    1 + np.arange(len(row)) - np.repeat(counts.cumsum() - counts, counts)
  )
  if len(texts) != len(row):
    return f"{len(texts)} texts, but the rows have {len(row)}"
  if (texts[:, 0] != row).any() or (texts[:, 1] != segment).any():
    return "row or segment numbers that don't match the rows"
  return "a negative number" if (texts < 0).any() else None


def check_units(config: RowsConfig) -> None:
  """Raises UserError if a stage would lose a corpus' answers, or has none."""
  corpora.check_hidden(config.data)
  corpus, given = config.data.corpus, corpora.has_answers(config.data)
  for i, stage in enumerate(config.stages):
    name = f"stages[{i}].unit"
    if corpora.asked(config.data) == "holes":
      _check_holes(config, i, stage)
      continue
    if given and stage.unit != "conversations":
      raise UserError(
        f"{name}={stage.unit} would read data.corpus={corpus!r} without its"
        f" answers; set {name}=conversations"
      )
    if not given and stage.unit == "conversations":
      raise UserError(
        f"{name}=conversations: the documents of data.corpus={corpus!r} have no"
        f" answers; give chat:PATH or task:NAME, or set {name}=paragraphs"
      )


def _check_holes(config: RowsConfig, index: int, stage: StageConfig) -> None:
  name, holes = f"stages[{index}]", Holes.of(config.data)
  if stage.unit in ("pairs", "conversations"):
    raise UserError(
      f"{name}.unit={stage.unit} can't have the holes of data.corpus="
      f"{config.data.corpus!r}; set {name}.unit=paragraphs, sentences or lines"
    )
  # Of each hole a token, and given ones before, between and behind them.
  least = holes.growth + 2 * holes.most + 1
  if stage.length < least:
    raise UserError(
      f"{name}.length={stage.length} has no room for text beside data.holes="
      f"{holes.most} of data.hole_length={holes.length}; nearest valid:"
      f" {name}.length={least}"
    )


def check_enough(config: RowsConfig, index: int, rows: int) -> None:
  """Raises UserError if a stage has fewer rows than one update needs.

  Args:
    config: what rows depend on.
    index: of the stage.
    rows: number of rows that the stage has.
  """
  batch, parts = config.data.batch_size, config.accumulation
  needed = batch * parts
  if rows >= needed:
    return
  # Suggest the nearest config that the stage has enough rows for.
  fit = (
    f"data.batch_size={rows // parts}"
    if rows >= parts
    else f"data.batch_size={rows} and optimizer.accumulation=1"
  )
  raise UserError(
    f"stages[{index}] has {rows} rows of {config.stages[index].length} tokens,"
    f" an update needs {needed} (data.batch_size={batch} x"
    f" optimizer.accumulation={parts}); nearest valid: {fit}, or give more text"
  )


def check_stages(config: RowsConfig, counts: dict[str, Any]) -> None:
  """Raises UserError if a stage has no rows, with the reasons and remedies.

  Args:
    config: what rows depend on.
    counts: counts of all rows, by their names on disk.
  """
  for i, stage in enumerate(config.stages):
    if not counts[f"stage_{i + 1}"]["rows"]:
      raise UserError(_no_rows(f"stages[{i}]", stage, counts[f"stage_{i + 1}"]))


def _no_rows(name: str, stage: StageConfig, counts: dict[str, Any]) -> str:
  found, unfit = counts["units_found"], counts["texts_too_long"]
  short, long = counts["units_too_short"], counts["units_too_long"]
  hard = found - counts["units_selected"]
  # No limit is to blame here: there were no pairs to begin with.
  if stage.unit == "pairs" and not short + long + found:
    return (
      f"{name} has no rows: none of {counts['documents']:,} documents has two"
      f" sentences to pair ({name}.unit=sentences or lines reads single ones)"
    )
  reasons = [
    (short, f"have fewer than {stage.min_words} words", "min_words=0"),
    (long, f"have more than {stage.max_words} words", "max_words=None"),
    (hard, f"are not among the easiest {stage.easiest:.0%}", "easiest=1.0"),
    (unfit, f"are longer than {stage.length} tokens", "length, if larger,"),
  ]
  shown = [
    f"{count:,} {reason} ({name}.{field} keeps them)"
    for count, reason, field in reasons
    if count
  ]
  return (
    f"{name} has no rows: of {short + long + found:,} {stage.unit}"
    f" {', '.join(shown) or 'none has any text'}"
  )
