"""Rows on disk: text is tokenised and packed once, then only read.

Of a corpus that fits in memory they are made here, when first asked for; of a
larger one they were made before, by --mode=prepare (`preparation.py`).

A folder of the cache holds the tokenizer, one pair of arrays a stage, one each
for validation and test text with a table of where that is, and a manifest with
their sizes and hashes. Its name is a hash of all it depends on (the text and
the fields that shape rows), so equal work is found again and different work
never collides. It appears whole, by a rename, or not at all.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from rich.progress import Progress

from mdm_jax.core import distributed, safe_files
from mdm_jax.core.errors import UserError
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data import (
  corpora,
  folder_inputs,
  ngrams,
  preparation,
  row_checks,
  segments,
  shards,
  splits,
)
from mdm_jax.data import tokenizer as tokenizers
from mdm_jax.data.config import RowsConfig, StageConfig
from mdm_jax.data.corpora import Document
from mdm_jax.data.coverage import Coverage
from mdm_jax.data.held_out import HeldOut
from mdm_jax.data.inputs import file_sha256, given_tokenizer, row_inputs
from mdm_jax.data.ngrams import Ngrams
from mdm_jax.data.rows import Rows, names, required
from mdm_jax.data.segments import Unit
from mdm_jax.data.shards import Index
from mdm_jax.data.splits import HELD_OUT
from mdm_jax.data.stage_rows import (
  make_held_out,
  make_rows,
  row_lengths,
  stage_name,
)
from mdm_jax.data.tokenizer import Tokenizer

_FORMAT = 4  # of the cache; rows of another one are made anew
_MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class PreparedData:
  """A run's data: what each stage trains on, and what the run is measured on.

  Attributes:
    tokenizer: of this text.
    stages: training rows, memory-mapped, in the order of `config.stages`.
    validation: all text that chooses, in rows of the last stage's length.
    test: all text that the results are of, in such rows.
    manifest: counts and hashes, as in the cache.
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
  """Returns the rows of a config, from the cache or made now.

  Args:
    config: what rows depend on.
    workdir: the run's folder. A run that started from another one's parameters
      has its tokenizer there, and needs that other one no more.
    for_training: whether every stage has to have the rows of one update.

  Raises:
    UserError: the corpus can't be read, a stage has too few rows to train on,
      or the prepared rows are not what was written, or written wrong.
  """
  given = given_tokenizer(config, workdir)
  if config.data.prepared:
    data = _read_folder(config, given)
  else:
    data = _from_cache(config, given)
  _check_rows(config, data, for_training)
  return data


def prepare_on_all(
  config: RowsConfig, workdir: epath.PathLike | None = None
) -> PreparedData:
  """Returns what `prepare` does, on each of several processes.

  One of them fills the cache; sharded rows they look at together.
  """
  if config.data.prepared:
    return prepare(config, workdir)
  return distributed.first_alone(lambda: prepare(config, workdir))


def training_texts(config: RowsConfig) -> list[str]:
  """Returns the text of the train split, as it was before tokens.

  Of rows that were prepared at scale it is a sample, or all of a small corpus.
  """
  if config.data.prepared:
    path = preparation.folder_of(config) / preparation.SAMPLE
    return safe_files.read_json(path)["texts"]
  found, _ = corpora.load_all(config.data)
  sides, _ = splits.divide(found, splits.shares_of(config.data))
  return [document.text for document in sides.train]


def training_ngrams(config: RowsConfig, texts: list[str]) -> Ngrams:
  """Returns the 8-grams of the whole train split, or of a share by hash.

  Args:
    config: what rows depend on.
    texts: as `training_texts` returns them.
  """
  if config.data.prepared:
    if found := preparation.read_ngrams(preparation.folder_of(config)):
      return found
  return ngrams.of(texts)


def _from_cache(config: RowsConfig, given: Tokenizer | None) -> PreparedData:
  found, tally = corpora.load_all(config.data)
  corpora.tell(tally)
  inputs = {
    "format": _FORMAT,
    "text": {side: corpora.fingerprint(found[side]) for side in found},
    "bad_records": tally.bad,
  } | row_inputs(config, given)
  key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode())
  folder = _cache_dir(config) / key.hexdigest()[:16]
  if not (folder / _MANIFEST).exists():
    _write(folder, config, found, inputs, given)
  data = _read(folder, config)
  logging.debug("prepared data: %s", folder)
  return data


def _cache_dir(config: RowsConfig) -> epath.Path:
  if config.data.cache_dir:
    return epath.Path(config.data.cache_dir).expanduser()
  base = os.environ.get("XDG_CACHE_HOME", "~/.cache")
  return epath.Path(base).expanduser() / "mdm_jax"


# MARK: writing


def _write(
  folder: epath.Path,
  config: RowsConfig,
  found: dict[str, list[Document]],
  inputs: dict[str, Any],
  given: Tokenizer | None,
) -> None:
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = epath.Path(tempfile.mkdtemp(dir=folder.parent, prefix="tmp-"))
  except OSError as error:
    raise UserError(
      f"data.cache_dir {folder.parent}: {error.strerror}"
    ) from error
  try:
    with Progress(transient=True) as progress:
      _fill(partial, config, found, inputs, given, progress)
    try:
      partial.rename(folder)
    except OSError:  # another process was faster, with the same bytes
      if not (folder / _MANIFEST).exists():
        raise
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _fill(
  folder: epath.Path,
  config: RowsConfig,
  found: dict[str, list[Document]],
  inputs: dict[str, Any],
  given: Tokenizer | None,
  progress: Progress,
) -> None:
  """Writes every file of a prepared folder, the manifest last."""
  task = progress.add_task("tokenizer", total=len(row_lengths(config)) + 1)
  step = lambda name: progress.update(
    task, description=f"rows: {name}", advance=1
  )
  sides, told = splits.divide(found, splits.shares_of(config.data))
  texts = [document.text for document in sides.train]
  tokenizer = given or tokenizers.build(config.tokenizer, texts)
  tokenizer.save(folder)
  coverage = Coverage(texts)
  counts = {}
  for i, stage in enumerate(config.stages):
    step(name := stage_name(i))
    rows, counts[name], read = _stage_rows(
      stage, texts, tokenizer, config.data.language
    )
    coverage.add(read)
    _save(folder, name, rows.fields)
  for name in HELD_OUT:
    step(name)
    held = [document.text for document in sides[name]]
    made, counts[name] = make_held_out(held, config, tokenizer)
    _save(folder, name, made.rows.fields | {shards.TABLE: made.texts})
  manifest = {
    "inputs": inputs,
    "documents": told["documents"] | {"bad": inputs["bad_records"]},
    "split": told,
    "tokenizer": {
      "kind": tokenizer.kind,
      "sha256": tokenizer.sha256,
      "vocab_size": tokenizer.vocab.size,
    },
    "rows": counts,
    "text": coverage.counts(),
    "files": {p.name: file_sha256(p) for p in sorted(folder.iterdir())},
  }
  (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2))


def _save(folder: epath.Path, name: str, parts: dict[str, np.ndarray]) -> None:
  for part, array in parts.items():
    np.save(folder / _array_name(name, part), array, allow_pickle=False)


def _stage_rows(
  stage: StageConfig, texts: list[str], tokenizer: Tokenizer, language: str
) -> tuple[Rows, dict[str, Any], list[Unit]]:
  found, selection = segments.find(texts, stage, language), None
  if stage.unit != "paragraphs":
    selection = segments.easiest(found.units, stage.easiest, language)
  return make_rows(found, selection, stage, tokenizer)


# MARK: reading


def _read(folder: epath.Path, config: RowsConfig) -> PreparedData:
  """Returns what a folder holds, once all of it is what it should be."""
  lengths = row_lengths(config)
  arrays = {_array_name(n, part) for n in lengths for part in required()}
  arrays |= {_array_name(name, shards.TABLE) for name in HELD_OUT}
  manifest = _read_manifest(folder, [*lengths], arrays)
  tokenizer = tokenizers.load_tokenizer(folder)
  read = lambda n: _read_rows(folder, n, lengths[n], tokenizer.vocab, manifest)
  stages = tuple(read(stage_name(i)) for i in range(len(config.stages)))
  held = [_read_held_out(folder, name, read(name)) for name in HELD_OUT]
  return PreparedData(tokenizer, stages, *held, manifest)


def _read_manifest(
  folder: os.PathLike, names: list[str], needed: set[str]
) -> dict[str, Any]:
  """Returns the manifest, if it is about these rows, and so are its files."""
  path = (folder := epath.Path(folder)) / _MANIFEST
  try:
    manifest = safe_files.read_json(path)
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


def _read_rows(
  folder: epath.Path,
  name: str,
  length: int,
  vocab: Vocabulary,
  manifest: dict[str, Any],
) -> Rows:
  """Maps the fields of some rows into memory, once they are looked at."""
  there = [n for n in names() if _array_name(name, n) in manifest["files"]]
  fields = {n: _load(folder, _array_name(name, n)) for n in there}
  if wrong := row_checks.find_wrong(fields, length, vocab):
    raise _damaged(folder, f"{folder / name}, {wrong}")
  return Rows(**fields)


def _read_held_out(folder: epath.Path, name: str, rows: Rows) -> HeldOut:
  texts = _load(folder, file := _array_name(name, shards.TABLE))
  if wrong := row_checks.find_wrong_texts(rows.segments, texts):
    raise _damaged(folder, f"{folder / file}, {wrong}")
  return HeldOut(rows, np.array(texts))


def _load(folder: epath.Path, file: str) -> np.ndarray:
  try:
    return np.load(folder / file, mmap_mode="r", allow_pickle=False)
  except (ValueError, EOFError):
    raise _damaged(folder, folder / file) from None


def _array_name(name: str, part: str) -> str:
  return f"{name}.{part}.npy"


def _damaged(folder: os.PathLike, what: Any) -> UserError:
  return UserError(
    f"prepared data is damaged: {what}; delete the folder {folder} and run"
    " again to make it anew"
  )


# MARK: sharded rows


def _read_folder(config: RowsConfig, given: Tokenizer | None) -> PreparedData:
  """Returns the sharded rows of a folder, every process having read a part."""
  folder = preparation.folder_of(config)
  wanted = folder_inputs.of(config, given)
  if not (folder / _MANIFEST).exists():
    raise UserError(
      f"data.prepared={folder} holds no finished preparation; run"
      " --mode=prepare with the same config first"
    )
  names = [*row_lengths(config)]
  folder_inputs.check_made(folder, wanted, config.data)
  manifest = _read_manifest(folder, names, {*map(shards.index_name, names)})
  tokenizer = tokenizers.load_tokenizer(folder)
  indices = [shards.read_index(folder, name) for name in names]
  _check_shards(folder, indices, tokenizer.vocab)
  *stages, validation, test = (index.open() for index in indices)
  tables = [index.texts() for index in indices[-len(HELD_OUT) :]]
  held = [HeldOut(validation, tables[0]), HeldOut(test, tables[1])]
  return PreparedData(tokenizer, tuple(stages), *held, manifest)


def _check_shards(
  folder: pathlib.Path, indices: list[Index], vocab: Vocabulary
) -> None:
  """Looks for every file, and reads this process's part of them.

  Raises:
    UserError: on all processes, if one of them found damage.
  """
  missing = (index.missing() for index in indices)
  wrong = next(filter(None, missing), None) or _damaged_shard(indices, vocab)
  told = wrong and str(_damaged(folder, wrong))
  distributed.agree("what is wrong with data.prepared", told)
  if told:
    raise UserError(told)


def _damaged_shard(indices: list[Index], vocab: Vocabulary) -> str | None:
  mine = slice(distributed.index(), None, distributed.count())
  every = [(i, n) for i in indices for n in range(len(i.shards))]
  found = (index.damaged(number, vocab) for index, number in every[mine])
  return next(filter(None, found), None)


# MARK: both


def _check_rows(
  config: RowsConfig, data: PreparedData, for_training: bool
) -> None:
  row_checks.check_stages(config, data.manifest["rows"])
  if for_training:
    for i, rows in enumerate(data.stages):
      row_checks.check_enough(config, i, len(rows))
