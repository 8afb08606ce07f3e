"""Checks that a folder of sharded rows was prepared with the current config."""

import pathlib
from typing import Any

from absl import logging

from mdm_jax.core.errors import UserError
from mdm_jax.data import blocks, inputs, journal
from mdm_jax.data.config import DataConfig, RowsConfig
from mdm_jax.data.inputs import MANIFEST
from mdm_jax.data.tokenizer import Tokenizer

# Raise it when folders of earlier versions must not be read any more.
FORMAT = 3
# Names of corpora may change if the files are the same (`renamed`).
_NAMES = "corpus", "validation_corpus", "test_corpus"


def of(config: RowsConfig, given: Tokenizer | None) -> dict[str, Any]:
  """Returns the config fields that shape a folder's rows, and a format."""
  return {
    "format": FORMAT,
    "data": {
      name: getattr(config.data, name)
      for name in (*_NAMES, "document", "text_key", "max_documents")
    },
  } | inputs.row_inputs(config, given)


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
  if isinstance(made, dict) and made.get("format") != FORMAT:
    raise UserError(
      f"data.prepared={folder} was prepared by another version (format"
      f" {made.get('format')}, not {FORMAT}); prepare another folder"
    )
  if renamed(made, wanted) != wanted or not _is_there(manifest, data):
    check(folder, made, wanted)
  logging.warning(
    "data.prepared=%s was prepared from the same files under another name: %s.",
    folder,
    inputs.difference(made, wanted),
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
    return blocks.files(blocks.cut(data)) == manifest.get("from")
  except UserError:
    return False


def check(folder: pathlib.Path, made: Any, wanted: Any) -> None:
  """Raises UserError naming the first field whose values differ, if any."""
  differs = inputs.difference(made, wanted)
  if differs:
    raise UserError(
      f"data.prepared={folder} was prepared with another config: {differs};"
      " restore that value, or prepare another folder"
    )
