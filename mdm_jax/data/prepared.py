"""Rows on disk: text is tokenised and packed once, then only read.

Of a corpus that fits in memory they are made here, when first asked for; of a
larger one they were made before, by --mode=prepare (`preparation.py`).

A folder of the cache holds the tokenizer, one pair of arrays a stage and one
for the held-out text, and a manifest with their sizes and hashes. The folder's
name is a hash of all it depends on (the text and the fields that shape rows),
so equal work is found again and different work never collides. It appears
whole, by a rename, or not at all.
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
from mdm_jax.core.config import Config, StageConfig
from mdm_jax.core.errors import UserError
from mdm_jax.data import corpora, preparation, row_checks, segments, shards
from mdm_jax.data import tokenizer as tokenizers
from mdm_jax.data.corpora import Document
from mdm_jax.data.inputs import file_sha256, given_tokenizer, row_inputs
from mdm_jax.data.packing import Rows
from mdm_jax.data.shards import Index
from mdm_jax.data.stage_rows import (
  HELD_OUT,
  held_out_stage,
  make_rows,
  row_lengths,
  stage_name,
)
from mdm_jax.data.text_files import Tally
from mdm_jax.data.tokenizer import Tokenizer, Vocabulary

_FORMAT = 2
_MANIFEST = "manifest.json"
_CHUNK = 2**22  # tokens looked at at once


@dataclasses.dataclass(frozen=True)
class PreparedData:
  """A run's data: what each stage trains on, and what the run is measured on.

  Attributes:
    tokenizer: of this text.
    stages: training rows, memory-mapped, in the order of `config.stages`.
    held_out: rows of the last stage's length that hold the whole held-out text.
    manifest: counts and hashes, as in the cache.
  """

  tokenizer: Tokenizer
  stages: tuple[Rows, ...]
  held_out: Rows
  manifest: dict[str, Any]

  def num_bytes(self, rows: Rows) -> np.ndarray:
    """Returns the UTF-8 bytes of text each row holds."""
    sizes = np.zeros(self.tokenizer.vocab.size, np.int64)
    sizes[: len(self.tokenizer.pieces)] = [
      len(piece) for piece in self.tokenizer.pieces
    ]
    step = max(_CHUNK // rows.length, 1)
    parts = (rows.tokens[i : i + step] for i in range(0, len(rows), step))
    counts = [sizes[tokens].sum(axis=1) for tokens in parts]
    return np.concatenate(counts) if counts else np.zeros(0, np.int64)


def prepare(
  config: Config,
  workdir: epath.PathLike | None = None,
  for_training: bool = True,
) -> PreparedData:
  """Returns the rows of a config, from the cache or made now.

  Args:
    config: of the run.
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
  config: Config, workdir: epath.PathLike | None = None
) -> PreparedData:
  """Returns what `prepare` does, on each of several processes.

  One of them fills the cache; sharded rows they look at together.
  """
  if config.data.prepared:
    return prepare(config, workdir)
  return distributed.first_alone(lambda: prepare(config, workdir))


def training_texts(config: Config) -> list[str]:
  """Returns the text of the train split, as it was before tokens.

  Of rows that were prepared at scale it is a sample, or all of a small corpus.
  """
  if config.data.prepared:
    path = preparation.folder_of(config) / preparation.SAMPLE
    return safe_files.read_json(path)["texts"]
  documents, _ = _load(config)
  train, _ = corpora.split(documents, config.data.eval_fraction)
  return [document.text for document in train]


def _from_cache(config: Config, given: Tokenizer | None) -> PreparedData:
  documents, tally = _load(config)
  corpora.tell(tally)
  inputs = {
    "format": _FORMAT,
    "text": corpora.fingerprint(documents),
    "bad_records": tally.bad,
  } | row_inputs(config, given)
  key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode())
  folder = _cache_dir(config) / key.hexdigest()[:16]
  if not (folder / _MANIFEST).exists():
    _write(folder, config, documents, inputs, given)
  data = _read(folder, config)
  logging.info("prepared data: %s", folder)
  return data


def _load(config: Config) -> tuple[list[Document], Tally]:
  data = config.data
  return corpora.load_and_count(
    data.corpus, data.max_documents, data.on_bad_record
  )


def _cache_dir(config: Config) -> epath.Path:
  if config.data.cache_dir:
    return epath.Path(config.data.cache_dir).expanduser()
  base = os.environ.get("XDG_CACHE_HOME", "~/.cache")
  return epath.Path(base).expanduser() / "mdm_jax"


# MARK: writing


def _write(
  folder: epath.Path,
  config: Config,
  documents: list[Document],
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
      _fill(partial, config, documents, inputs, given, progress)
    try:
      partial.rename(folder)
    except OSError:  # another process was faster, with the same bytes
      if not (folder / _MANIFEST).exists():
        raise
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _fill(
  folder: epath.Path,
  config: Config,
  documents: list[Document],
  inputs: dict[str, Any],
  given: Tokenizer | None,
  progress: Progress,
) -> None:
  """Writes every file of a prepared folder, the manifest last."""
  *names, _ = row_lengths(config)
  task = progress.add_task("tokenizer", total=len(names) + 2)
  train, held_out = corpora.split(documents, config.data.eval_fraction)
  texts = [document.text for document in train]
  tokenizer = given or tokenizers.build(config.tokenizer, texts)
  tokenizer.save(folder)
  counts = {}
  held_texts = [document.text for document in held_out]
  for name, stage, source in [
    *zip(names, config.stages, [texts] * len(names), strict=True),
    (HELD_OUT, held_out_stage(config), held_texts),
  ]:
    progress.update(task, description=f"rows: {name}", advance=1)
    rows, counts[name] = _stage_rows(stage, source, tokenizer)
    for file, array in zip(
      _array_names(name), (rows.tokens, rows.segments), strict=True
    ):
      np.save(folder / file, array, allow_pickle=False)
  manifest = {
    "inputs": inputs,
    "documents": {
      "train": len(train),
      "held_out": len(held_out),
      "bad": inputs["bad_records"],
    },
    "tokenizer": {
      "kind": tokenizer.kind,
      "sha256": tokenizer.sha256,
      "vocab_size": tokenizer.vocab.size,
    },
    "rows": counts,
    "files": {p.name: file_sha256(p) for p in sorted(folder.iterdir())},
  }
  (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2))


def _stage_rows(
  stage: StageConfig, texts: list[str], tokenizer: Tokenizer
) -> tuple[Rows, dict[str, Any]]:
  units, selection = segments.units(texts, stage), None
  if stage.unit != "paragraphs":
    selection = segments.easiest(units, stage.easiest)
  return make_rows(units, selection, stage, tokenizer)


# MARK: reading


def _read(folder: epath.Path, config: Config) -> PreparedData:
  """Returns what a folder holds, once all of it is what it should be."""
  lengths = row_lengths(config)
  arrays = {file for name in lengths for file in _array_names(name)}
  manifest = _read_manifest(folder, [*lengths], arrays)
  tokenizer = tokenizers.load_tokenizer(folder)
  *stages, held_out = [
    _read_rows(folder, name, length, tokenizer.vocab)
    for name, length in lengths.items()
  ]
  return PreparedData(tokenizer, tuple(stages), held_out, manifest)


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
  folder: epath.Path, name: str, length: int, vocab: Vocabulary
) -> Rows:
  """Maps the two arrays of some rows into memory, once they are looked at."""
  arrays = []
  for path in (folder / file for file in _array_names(name)):
    try:
      arrays.append(np.load(path, mmap_mode="r", allow_pickle=False))
    except (ValueError, EOFError):
      raise _damaged(folder, path) from None
  wrong = row_checks.find_wrong(*arrays, length, vocab)
  if wrong:
    raise _damaged(folder, f"{folder / name}, {wrong}")
  return Rows(*arrays)


def _array_names(name: str) -> tuple[str, str]:
  return f"{name}.tokens.npy", f"{name}.segments.npy"


def _damaged(folder: os.PathLike, what: Any) -> UserError:
  return UserError(
    f"prepared data is damaged: {what}; delete the folder {folder} and run"
    " again to make it anew"
  )


# MARK: sharded rows


def _read_folder(config: Config, given: Tokenizer | None) -> PreparedData:
  """Returns the sharded rows of a folder, every process having read a part."""
  folder = preparation.folder_of(config)
  wanted = preparation.folder_inputs(config, given)
  if not (folder / _MANIFEST).exists():
    raise UserError(
      f"data.prepared={folder} holds no finished preparation; run"
      " --mode=prepare with the same config first"
    )
  names = [*row_lengths(config)]
  preparation.check_made(folder, wanted)
  manifest = _read_manifest(folder, names, {*map(shards.index_name, names)})
  tokenizer = tokenizers.load_tokenizer(folder)
  indices = [shards.read_index(folder, name) for name in names]
  _check_shards(folder, indices, tokenizer.vocab)
  *stages, held_out = [
    Rows(*(index.open(part) for part in shards.PARTS)) for index in indices
  ]
  return PreparedData(tokenizer, tuple(stages), held_out, manifest)


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


def _check_rows(config: Config, data: PreparedData, for_training: bool) -> None:
  for i, (stage, rows) in enumerate(
    zip(config.stages, data.stages, strict=True)
  ):
    if not len(rows):
      raise row_checks.no_rows(i, stage, data.manifest["rows"][stage_name(i)])
    if for_training:
      row_checks.check_enough(config, i, len(rows))
