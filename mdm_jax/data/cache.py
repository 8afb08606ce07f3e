"""The cache of prepared rows, for a corpus that fits in memory.

Rows are made when they are first asked for. A cache folder holds the tokenizer,
the arrays of each stage, those of validation and test text with a table of
their texts, and a manifest with counts and hashes. The folder's name is a hash
of everything the rows depend on (the text and the config fields that shape
them), so equal inputs share a folder and different ones never do. It is renamed
into place when complete, so it is never seen half-written.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any

from absl import logging
from etils import epath

from mdm_jax.core.errors import UserError
from mdm_jax.core.progress import console
from mdm_jax.data import corpora, preparation
from mdm_jax.data.config import RowsConfig
from mdm_jax.data.inputs import MANIFEST, file_sha256, row_inputs
from mdm_jax.data.passes import Job, Pass
from mdm_jax.data.preparation import run_here
from mdm_jax.data.stores import InMemory
from mdm_jax.data.text_files import Document, Tally
from mdm_jax.data.tokenizer import Tokenizer

# Part of the folder's hash: raise it when the same inputs give other rows.
_FORMAT = 4
# What is shown during passes that are named for something else than the slow
# part: deciding the split follows `count`, training the tokenizer `sample`.
_SHOWN: dict[Pass, str] = {"count": "split", "sample": "tokenizer"}


def folder_of(config: RowsConfig, given: Tokenizer | None) -> pathlib.Path:
  """Returns the cache folder of a config's rows, making them if necessary.

  Args:
    config: what rows depend on.
    given: tokenizer to use instead of the one the config describes.

  Raises:
    UserError: the corpus can't be read, or the folder can't be written.
  """
  config = dataclasses.replace(config, data=corpora.settle(config.data))
  found, total = corpora.load_all(config.data), Tally()
  for _, tally in found.values():
    total.add(tally)
  corpora.log_bad(total)
  inputs = {
    "format": _FORMAT,
    "text": {side: corpora.fingerprint(d) for side, (d, _) in found.items()},
    # The manifest states it, so another count needs another folder.
    "bad_records": total.bad,
  } | row_inputs(config, given)
  # Two revisions with the same text have rows of their own: the manifest says
  # which one was read.
  if revisions := corpora.revisions(config.data):
    inputs["revisions"] = revisions
  key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode())
  folder = _cache_dir(config) / key.hexdigest()[:16]
  if not (folder / MANIFEST).exists():
    _write(folder, config, found, inputs, given)
  logging.debug("prepared data: %s", folder)
  return pathlib.Path(folder)


def training_texts(config: RowsConfig) -> list[str]:
  """Returns the documents of the train split as text.

  The corpus is read and split again: the cache keeps only ids.
  """
  config = dataclasses.replace(config, data=corpora.settle(config.data))
  store = InMemory(corpora.load_all(config.data))
  counted = preparation.count(Job(config, store), store.blocks, run_here)
  return preparation.sample(counted, run_here)[0]


def _cache_dir(config: RowsConfig) -> epath.Path:
  if config.data.cache_dir:
    return epath.Path(config.data.cache_dir).expanduser()
  base = os.environ.get("XDG_CACHE_HOME", "~/.cache")
  return epath.Path(base).expanduser() / "mdm_jax"


def _write(
  folder: epath.Path,
  config: RowsConfig,
  found: dict[str, tuple[list[Document], Tally]],
  inputs: dict[str, Any],
  given: Tokenizer | None,
) -> None:
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that it can be renamed into place.
    partial = pathlib.Path(tempfile.mkdtemp(dir=folder.parent, prefix="tmp-"))
  except OSError as error:
    raise UserError(
      f"data.cache_dir {folder.parent}: {error.strerror}"
    ) from error
  try:
    store = InMemory(found, partial)
    with console.status("") as status:

      def run(name: Pass, *blocks: Any) -> None:
        status.update(_SHOWN.get(name, name))
        run_here(name, *blocks)

      made = preparation.make(Job(config, store), store.blocks, given, run)
    files = {p.name: file_sha256(p) for p in sorted(partial.iterdir())}
    read = {"revisions": corpora.revisions(config.data)}
    manifest = {"inputs": inputs, **read, **made.manifest, "files": files}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=2))
    try:
      partial.rename(folder)
    except OSError:  # another process was faster, with the same bytes
      if not (folder / MANIFEST).exists():
        raise
  finally:
    shutil.rmtree(partial, ignore_errors=True)
