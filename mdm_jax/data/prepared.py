"""Loads a run's prepared rows: memory-mapped, and checked before training.

Rows of a corpus that fits in memory are made on first use (`cache.py`). Those
of a larger one are made beforehand by --mode=prepare (`folder.py`).
"""

import dataclasses
import os
import pathlib
from typing import Any

from etils import epath

from mdm_jax.core import distributed, safe_files
from mdm_jax.core.errors import UserError
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data import (
  cache,
  folder,
  inputs,
  ngrams,
  row_checks,
  shards,
)
from mdm_jax.data import tokenizer as tokenizers
from mdm_jax.data.config import RowsConfig
from mdm_jax.data.held_out import HeldOut
from mdm_jax.data.inputs import MANIFEST, file_sha256, given_tokenizer
from mdm_jax.data.ngrams import Ngrams
from mdm_jax.data.rows import Rows, names, required
from mdm_jax.data.shards import Index
from mdm_jax.data.splits import HELD_OUT
from mdm_jax.data.stage_rows import row_lengths
from mdm_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class PreparedData:
  """A run's data: rows to train on, and rows to measure on.

  Attributes:
    tokenizer: what the ids were made with.
    stages: memory-mapped training rows, in the order of `config.stages`.
    validation: held-out text that chooses the best checkpoint.
    test: held-out text that results are reported on.
    manifest: counts and hashes.
  """

  tokenizer: Tokenizer
  stages: tuple[Rows, ...]
  validation: HeldOut
  test: HeldOut
  manifest: dict[str, Any]


def prepare(
  config: RowsConfig,
  workdir: epath.PathLike | None = None,
  for_training: bool = True,
) -> PreparedData:
  """Returns the rows of a config; fills the cache if they aren't in it.

  Args:
    config: what rows depend on.
    workdir: the run's folder. If `init_from` is set, a copy of that run's
      tokenizer is there once this run has started.
    for_training: also require enough rows for one update in every stage.

  Raises:
    UserError: the corpus can't be read, a stage has no rows or too few, or
      prepared files are missing, damaged or hold invalid values.
  """
  given = given_tokenizer(config, workdir)
  read = _folder if config.data.prepared else _cache
  data = read(config, given)
  row_checks.check_stages(config, data.manifest["rows"])
  for i, rows in enumerate(data.stages if for_training else ()):
    row_checks.check_enough(config, i, len(rows))
  return data


def prepare_on_all(
  config: RowsConfig, workdir: epath.PathLike | None = None
) -> PreparedData:
  """Calls `prepare` on every process; process 0 alone fills the cache.

  Sharded rows are checked by all processes, each of them a part.
  """
  if config.data.prepared:
    return prepare(config, workdir)
  return distributed.first_alone(lambda: prepare(config, workdir))


def training_texts(config: RowsConfig) -> list[str]:
  """Returns the train split as text.

  For a prepared folder of a large corpus this is a sample.
  """
  if config.data.prepared:
    return folder.training_texts(folder.path_of(config))
  return cache.training_texts(config)


def training_ngrams(config: RowsConfig, texts: list[str]) -> Ngrams:
  """Returns the 8-grams of the whole train split, or a share chosen by hash.

  Args:
    config: what rows depend on.
    texts: what `training_texts` returned.
  """
  if config.data.prepared:
    if found := folder.training_ngrams(folder.path_of(config)):
      return found
  return ngrams.of(texts)


# MARK: reading


def _cache(config: RowsConfig, given: Tokenizer | None) -> PreparedData:
  """Returns the rows of the cache, checked against hashes and vocabulary."""
  path = cache.folder_of(config, given)
  lengths = row_lengths(config)
  file = lambda name, part: shards.shard_name(name, None, part)
  needed = {file(name, part) for name in lengths for part in required()}
  needed |= {file(name, shards.TABLE) for name in HELD_OUT}
  manifest = _read_manifest(path, [*lengths], needed)
  tokenizer = tokenizers.load_tokenizer(path)
  indices = []
  for name, length in lengths.items():
    there = [n for n in names() if file(name, n) in manifest["files"]]
    listed = [{"rows": manifest["rows"][name]["rows"]}]
    # A single shard without a number; the manifest has its hashes.
    index = Index(path, name, length, dict.fromkeys(there, ""), listed, False)
    indices.append(index)
    # Hashes matched; now check that what was written is valid.
    if wrong := index.wrong(0, tokenizer.vocab):
      raise _damaged(path, wrong)
  return _open(tokenizer, indices, manifest)


def _folder(config: RowsConfig, given: Tokenizer | None) -> PreparedData:
  """Returns the rows of a prepared folder; each process checks some shards."""
  path = folder.path_of(config)
  wanted = inputs.folder_inputs(config, given)
  if not (path / MANIFEST).exists():
    raise UserError(
      f"data.prepared={path} contains no finished preparation; run"
      " --mode=prepare with the same config first"
    )
  sets = [*row_lengths(config)]
  inputs.check_made(path, wanted, config.data)
  manifest = _read_manifest(path, sets, {*map(shards.index_name, sets)})
  tokenizer = tokenizers.load_tokenizer(path)
  indices = [shards.read_index(path, name) for name in sets]
  _check_shards(path, indices, tokenizer.vocab)
  return _open(tokenizer, indices, manifest)


def _open(
  tokenizer: Tokenizer, indices: list[Index], manifest: dict[str, Any]
) -> PreparedData:
  # In the order of `row_lengths`.
  *stages, validation, test = (index.open() for index in indices)
  tables = [index.texts() for index in indices[-len(HELD_OUT) :]]
  held = [HeldOut(validation, tables[0]), HeldOut(test, tables[1])]
  return PreparedData(tokenizer, tuple(stages), *held, manifest)


def _read_manifest(
  folder: os.PathLike, names: list[str], needed: set[str]
) -> dict[str, Any]:
  """Returns the manifest, if it lists all that is needed and all hashes match.

  Args:
    folder: with the manifest.
    names: of the rows it must describe.
    needed: files it must list.
  """
  path = (folder := epath.Path(folder)) / MANIFEST
  try:
    manifest = safe_files.read_json(path)
    # The folder may come from someone else: stay inside it.
    for name in manifest["files"]:
      safe_files.check_name(name, path)
    complete = manifest["files"].keys() >= needed
    complete &= manifest["rows"].keys() >= set(names)
  except (KeyError, TypeError, AttributeError):
    complete = False
  except safe_files.UnsafeFile as error:
    raise _damaged(folder, error) from None
  if not complete:
    raise _damaged(folder, path)
  for name, digest in manifest["files"].items():
    if not (folder / name).exists() or file_sha256(folder / name) != digest:
      raise _damaged(folder, folder / name)
  return manifest


def _check_shards(
  folder: pathlib.Path, indices: list[Index], vocab: Vocabulary
) -> None:
  """Checks the size of every file, and the content of this process' shards.

  Raises:
    UserError: on all processes, if one of them found damage.
  """
  missing = (index.missing() for index in indices)
  wrong = next(filter(None, missing), None) or _damaged_shard(indices, vocab)
  message = wrong and str(_damaged(folder, wrong))
  # Raises where processes differ; if all found the same, the line below does.
  distributed.agree("the damage found in data.prepared", message)
  if message:
    raise UserError(message)


def _damaged_shard(indices: list[Index], vocab: Vocabulary) -> str | None:
  # Every n-th shard of n processes: together they read each shard once.
  mine = slice(distributed.index(), None, distributed.count())
  every = [(i, n) for i in indices for n in range(len(i.shards))]
  found = (index.damaged(number, vocab) for index, number in every[mine])
  return next(filter(None, found), None)


def _damaged(folder: os.PathLike, what: Any) -> UserError:
  return UserError(
    f"prepared data is damaged: {what}; delete the folder {folder} and run"
    " again to rebuild it"
  )
