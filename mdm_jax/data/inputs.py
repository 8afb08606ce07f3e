"""What prepared rows depend on, and whether a folder was prepared with it."""

import dataclasses
import hashlib
import pathlib
from typing import Any

from absl import logging
from etils import epath

from mdm_jax.core.errors import UserError
from mdm_jax.data import (
  blocks,
  corpora,
  huggingface_tokenizer,
  journal,
  splits,
  tasks,
)
from mdm_jax.data import tokenizer as tokenizers
from mdm_jax.data.config import DataConfig, RowsConfig
from mdm_jax.data.tokenizer import Tokenizer
from mdm_jax.huggingface import folder as folders

MANIFEST = "manifest.json"
# Fields of a stage that shape its rows; others (epochs, ...) may change.
_UNIT_FIELDS = ("unit", "length", "easiest", "min_words", "max_words")
# Raise it when folders of earlier versions must not be read any more.
FOLDER_FORMAT = 3
# Names of corpora may change if the files are the same (`renamed`).
_NAMES = "corpus", "validation_corpus", "test_corpus"


def given_tokenizer(
  config: RowsConfig, workdir: epath.PathLike | None
) -> Tokenizer | None:
  """Returns the tokenizer of `init_from`, a run or hf:FOLDER; None if not set.

  Args:
    config: what rows depend on.
    workdir: this run's folder; it holds a copy once the run has started.

  Raises:
    UserError: `init_from` holds no tokenizer.
  """
  if not config.init_from:
    return None
  # The run's own copy first: `init_from` may have been deleted since.
  imported = folders.is_named(config.init_from)
  for folder in (workdir, None if imported else config.init_from):
    if folder is not None and tokenizers.is_saved_in(folder):
      return tokenizers.load_tokenizer(folder)
  if imported:
    folder = folders.open_folder(config.init_from)
    return huggingface_tokenizer.from_folder(folder)
  raise UserError(
    f"init_from={config.init_from!r} is not a finished run: it has no"
    " tokenizer; give --config.init_from=WORKDIR"
  )


def row_inputs(config: RowsConfig, given: Tokenizer | None) -> dict[str, Any]:
  """Returns what shapes rows besides the text, as plain JSON values."""
  path = config.tokenizer.path
  sha256 = given.sha256 if given else path and file_sha256(epath.Path(path))
  return {
    "eval_fraction": config.data.eval_fraction,
    "test_fraction": config.data.test_fraction,
    "language": config.data.language,
    # A given tokenizer counts by its hash; the config's fields have no effect.
    "tokenizer": None if given else dataclasses.asdict(config.tokenizer),
    "given_tokenizer": sha256 or None,
    "stages": [
      {name: getattr(stage, name) for name in _UNIT_FIELDS}
      for stage in config.stages
    ],
    **_answer_inputs(config.data),
    **_hole_inputs(config.data),
  }


def _answer_inputs(data: DataConfig) -> dict[str, Any]:
  # Only if set: rows made before these fields existed stay valid.
  if data.answer_length is None:
    return {}
  return {"answers": [data.answer_length, data.answer_fill]}


def _hole_inputs(data: DataConfig) -> dict[str, Any]:
  # The texts are those of the corpus without holes, so what is hidden counts.
  sides = splits.SIDES
  hidden = [side for side in sides if corpora.asked(data, side) == "holes"]
  if not hidden and not tasks.has_holes(data.corpus):
    return {}
  return {"holes": [data.holes, data.hole_length, data.untold_holes, hidden]}


def difference(made: Any, wanted: Any, path: str = "") -> str | None:
  """Describes the first difference of two nested structures of plain values.

  Args:
    made: what the rows were made with.
    wanted: what the config asks for.
    path: of both values, for the message.

  Returns:
    For example `stages[0].length is 64, here 48` (made, then wanted), or None
    if they are equal.
  """
  if isinstance(made, dict) and isinstance(wanted, dict):
    names = [*wanted, *(name for name in made if name not in wanted)]
    pairs = [(f"{path}.{n}", made.get(n), wanted.get(n)) for n in names]
  elif isinstance(made, list) and isinstance(wanted, list):
    if len(made) != len(wanted):
      return f"the number of {path[1:]} is {len(made)}, here {len(wanted)}"
    both = zip(made, wanted, strict=True)
    pairs = [(f"{path}[{i}]", a, b) for i, (a, b) in enumerate(both)]
  elif made == wanted:
    return None
  else:
    return f"{path[1:]} is {made!r}, here {wanted!r}"
  found = (difference(a, b, name) for name, a, b in pairs)
  return next((text for text in found if text), None)


def file_sha256(path: epath.PathLike) -> str:
  """Returns the sha256 of a file without loading it into memory as a whole."""
  try:
    with epath.Path(path).open("rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()
  except OSError as error:
    raise UserError(f"{path}: {error.strerror}") from error


# MARK: prepared folders


def folder_inputs(
  config: RowsConfig, given: Tokenizer | None
) -> dict[str, Any]:
  """Returns the config fields that shape a folder's rows, and a format."""
  template = config.data.chat_template
  chat_template = {"chat_template": template} if template else {}
  return {
    "format": FOLDER_FORMAT,
    "data": {
      name: getattr(config.data, name)
      for name in (*_NAMES, "document", "text_key", "max_documents")
    }
    | chat_template,
  } | row_inputs(config, given)


def check_made(
  folder: pathlib.Path, wanted: dict[str, Any], data: DataConfig
) -> None:
  """Raises UserError if a finished folder was prepared with another config.

  A corpus may have another name if its files are the same; a warning says so.
  """
  manifest = journal.get(folder / MANIFEST)
  if not isinstance(manifest, dict) or "inputs" not in manifest:
    raise UserError(f"{folder / MANIFEST} was not written by --mode=prepare")
  made = manifest["inputs"]
  if made == wanted:
    return
  if isinstance(made, dict) and made.get("format") != FOLDER_FORMAT:
    raise UserError(
      f"data.prepared={folder} was prepared by another version (format"
      f" {made.get('format')}, not {FOLDER_FORMAT}); prepare another folder"
    )
  if renamed(made, wanted) != wanted or not _is_there(manifest, data):
    check(folder, made, wanted)
  logging.warning(
    "data.prepared=%s was prepared from the same files under another name: %s.",
    folder,
    difference(made, wanted),
  )


def renamed(made: Any, wanted: dict[str, Any]) -> Any:
  """Returns `made` with the corpus names of `wanted`, to compare all else."""
  if not isinstance(made, dict) or not isinstance(made.get("data"), dict):
    return made
  names = {name: wanted["data"][name] for name in _NAMES}
  return made | {"data": made["data"] | names}


def _is_there(manifest: dict[str, Any], data: DataConfig) -> bool:
  """Whether the corpora have the same files that the folder was made from."""
  try:
    found = blocks.cut(corpora.settle(data))
    return blocks.files(found) == manifest.get("from")
  except UserError:
    return False


def check(folder: pathlib.Path, made: Any, wanted: Any) -> None:
  """Raises UserError naming the first field whose values differ, if any."""
  differs = difference(made, wanted)
  if differs:
    raise UserError(
      f"data.prepared={folder} was prepared with another config: {differs};"
      " restore that value, or prepare another folder"
    )
