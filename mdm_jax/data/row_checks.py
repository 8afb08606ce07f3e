"""Rows on disk are what a model can be trained on, or it is told at the start.

Their hashes only say that they are as they were written. JAX would not say that
they were written wrong: an index past the end of an array is clamped on a
device, silently, so that a wrong id trains the embedding of another one.
"""

from typing import Any

import numpy as np

from mdm_jax.core.errors import UserError
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data.config import RowsConfig, StageConfig

_CHUNK = 2**22  # tokens looked at at once; more would fill the memory
_IDS = np.uint16, np.int32


def find_wrong(
  tokens: np.ndarray, segments: np.ndarray, length: int, vocab: Vocabulary
) -> str | None:
  """Returns what is wrong first with what should be packed rows, if anything.

  Args:
    tokens: ids; may be memory-mapped, and are never read as a whole.
    segments: beside them, as in `Rows`.
    length: tokens a row should have.
    vocab: of the tokenizer that the ids are of.
  """
  shapes = tokens.shape, segments.shape
  if shapes[0] != shapes[1] or shapes[0][1:] != (length,):
    return f"rows of {length} tokens have shapes {shapes[0]} and {shapes[1]}"
  if tokens.dtype not in _IDS or segments.dtype != np.uint16:
    return f"ids and segments are {tokens.dtype} and {segments.dtype}"
  step = max(_CHUNK // length, 1)
  for i in range(0, len(tokens), step):
    wrong = _wrong(tokens[i : i + step], segments[i : i + step], vocab)
    if wrong.any():
      row, place = map(int, np.argwhere(wrong)[0])
      reason = _reason(int(tokens[i + row, place]), vocab)
      return f"row {i + row}, token {place}: {reason}"
  return None


def find_wrong_texts(segments: np.ndarray, texts: np.ndarray) -> str | None:
  """Returns what is wrong with a table of held-out texts, if anything.

  Args:
    segments: of the rows it is about, as in `Rows`.
    texts: as in `HeldOut`.
  """
  if texts.dtype != np.int64 or texts.ndim != 2 or texts.shape[1] != 5:
    return f"a table of {texts.dtype} with shape {texts.shape}"
  step = max(_CHUNK // max(segments.shape[1], 1), 1)
  parts = range(0, len(segments), step)
  counts = np.concatenate(
    [np.zeros(0, np.int64)]
    + [segments[i : i + step].max(axis=1).astype(np.int64) for i in parts]
  )
  row = np.repeat(np.arange(len(counts)), counts)
  segment = (
    1 + np.arange(len(row)) - np.repeat(counts.cumsum() - counts, counts)
  )
  if len(texts) != len(row):
    return f"{len(texts)} texts, but the rows have {len(row)}"
  if (texts[:, 0] != row).any() or (texts[:, 1] != segment).any():
    return "rows or segments that are not those of the rows"
  return "a number below 0" if (texts < 0).any() else None


def _wrong(
  tokens: np.ndarray, segments: np.ndarray, vocab: Vocabulary
) -> np.ndarray:
  """Marks the ids that may not be where they are: padding is PAD, only it."""
  in_text = vocab.may_be_text(tokens)
  return np.where(segments > 0, ~in_text, tokens != vocab.pad)


def _reason(token: int, vocab: Vocabulary) -> str:
  """Says why an id is wrong; PAD is so only in a text."""
  if token == vocab.mask:
    return f"id {token} is the mask, which stands for no text"
  if vocab.may_be_text(np.array([token])):
    return f"id {token} in padding, which is {vocab.pad}"
  if token == vocab.pad:
    return f"id {token} is padding, but in a text"
  return f"id {token} is none of the tokenizer's"


def check_enough(config: RowsConfig, index: int, rows: int) -> None:
  """Raises UserError if a stage has fewer rows than one of its updates.

  Args:
    config: what rows depend on.
    index: of the stage.
    rows: that the stage has.
  """
  batch, parts = config.data.batch_size, config.accumulation
  needed = batch * parts
  if rows >= needed:
    return
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
  """Raises UserError if a stage has no row: what was left out, what keeps it.

  Args:
    config: what rows depend on.
    counts: of all rows, by their names on disk.
  """
  for i, stage in enumerate(config.stages):
    if not counts[f"stage_{i + 1}"]["rows"]:
      raise UserError(_no_rows(f"stages[{i}]", stage, counts[f"stage_{i + 1}"]))


def _no_rows(name: str, stage: StageConfig, counts: dict[str, Any]) -> str:
  found, unfit = counts["units_found"], counts["texts_too_long"]
  short, long = counts["units_too_short"], counts["units_too_long"]
  hard = found - counts["units_selected"]
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
  told = [
    f"{count:,} {reason} ({name}.{field} keeps them)"
    for count, reason, field in reasons
    if count
  ]
  return (
    f"{name} has no rows: of {short + long + found:,} {stage.unit}"
    f" {', '.join(told) or 'none holds any text'}"
  )
