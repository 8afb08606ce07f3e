"""Rows on disk: text is tokenised and packed once, then only read.

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
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from rich.progress import Progress

from mdm_jax.core import safe_files
from mdm_jax.core.config import Config, StageConfig, to_dict
from mdm_jax.core.errors import UserError
from mdm_jax.data import corpora, row_checks, segments
from mdm_jax.data import tokenizer as tokenizers
from mdm_jax.data.corpora import Document
from mdm_jax.data.packing import Rows, Tokens, join_sentences, pack
from mdm_jax.data.segments import Selection, Unit
from mdm_jax.data.text_files import Tally
from mdm_jax.data.tokenizer import Tokenizer, Vocabulary

_FORMAT = 2
_MANIFEST = "manifest.json"
_HELD_OUT = "held_out"
_BINS = 20  # of the histogram of difficulty
_EXAMPLES = 5
_UNIT_FIELDS = ("unit", "length", "easiest", "min_words", "max_words")


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
    return sizes[rows.tokens].sum(axis=1)


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
  given = _given_tokenizer(config, workdir)
  documents, tally = _load(config)
  corpora.tell(tally)
  inputs = _inputs(config, documents, given) | {"bad_records": tally.bad}
  key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode())
  folder = _cache_dir(config) / key.hexdigest()[:16]
  if not (folder / _MANIFEST).exists():
    _write(folder, config, documents, inputs, given)
  data = _read(folder, config)
  _check_rows(config, data, for_training)
  logging.info("prepared data: %s", folder)
  return data


def training_texts(config: Config) -> list[str]:
  """Returns the text of the train split, as it was before tokens."""
  documents, _ = _load(config)
  train, _ = corpora.split(documents, config.data.eval_fraction)
  return [document.text for document in train]


def _load(config: Config) -> tuple[list[Document], Tally]:
  data = config.data
  return corpora.load_and_count(
    data.corpus, data.max_documents, data.on_bad_record
  )


def _given_tokenizer(
  config: Config, workdir: epath.PathLike | None
) -> Tokenizer | None:
  if not config.init_from:
    return None
  if workdir is not None and tokenizers.is_saved_in(workdir):
    return tokenizers.load_tokenizer(workdir)
  if not tokenizers.is_saved_in(config.init_from):
    raise UserError(
      f"init_from={config.init_from!r} is no finished run: it holds no"
      " tokenizer; give --config.init_from=WORKDIR"
    )
  return tokenizers.load_tokenizer(config.init_from)


def _inputs(
  config: Config, documents: list[Document], given: Tokenizer | None
) -> dict[str, Any]:
  """Everything that the rows depend on."""
  path = config.tokenizer.path
  sha256 = given.sha256 if given else path and _sha256(epath.Path(path))
  return {
    "format": _FORMAT,
    "text": corpora.fingerprint(documents),
    "eval_fraction": config.data.eval_fraction,
    "tokenizer": None if given else to_dict(config.tokenizer),
    "given_tokenizer": sha256 or None,
    "stages": [
      {name: getattr(stage, name) for name in _UNIT_FIELDS}
      for stage in config.stages
    ],
  }


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
  names = [_stage_name(i) for i in range(len(config.stages))]
  task = progress.add_task("tokenizer", total=len(names) + 2)
  train, held_out = corpora.split(documents, config.data.eval_fraction)
  texts = [document.text for document in train]
  tokenizer = given or tokenizers.build(config.tokenizer, texts)
  tokenizer.save(folder)
  counts = {}
  whole = StageConfig(unit="paragraphs", length=config.stages[-1].length)
  held_texts = [document.text for document in held_out]
  for name, stage, source in [
    *zip(names, config.stages, [texts] * len(names), strict=True),
    (_HELD_OUT, whole, held_texts),
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
    "files": {p.name: _sha256(p) for p in sorted(folder.iterdir())},
  }
  (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2))


def _stage_rows(
  stage: StageConfig, texts: list[str], tokenizer: Tokenizer
) -> tuple[Rows, dict[str, Any]]:
  """Returns a stage's packed rows, and what is to be known of them."""
  units = segments.units(texts, stage)
  found = len(units)
  selection = None
  if stage.unit != "paragraphs":
    selection = segments.easiest(units, stage.easiest)
    units = selection.units
  pieces = _encode(units, stage, tokenizer)
  fitting = [p for p in pieces if len(p) <= stage.length]
  rows = pack(fitting, stage.length, tokenizer.vocab.pad)
  return rows, {
    "units_found": found,
    "units_selected": len(units),
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
    return [tokenizer.decode(piece) for piece in _spread(pieces)]
  rising = np.argsort(selection.kept, kind="stable").tolist()
  return ["\n".join(selection.units[i].parts) for i in _spread(rising)]


def _spread(values: Sequence[Any]) -> list[Any]:
  at = np.linspace(0, len(values) - 1, min(_EXAMPLES, len(values)))
  return [values[int(i)] for i in at]


def _encode(
  units: list[Unit], stage: StageConfig, tokenizer: Tokenizer
) -> list[Tokens]:
  """Returns the token sequences of a stage, before packing."""
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


# MARK: reading


def _read(folder: epath.Path, config: Config) -> PreparedData:
  """Returns what a folder holds, once all of it is what it should be."""
  lengths = [stage.length for stage in config.stages]
  names = [*map(_stage_name, range(len(lengths))), _HELD_OUT]
  manifest = _read_manifest(folder, names)
  for name, digest in manifest["files"].items():
    if not (folder / name).exists() or _sha256(folder / name) != digest:
      raise _damaged(folder, folder / name)
  tokenizer = tokenizers.load_tokenizer(folder)
  *stages, held_out = [
    _read_rows(folder, name, length, tokenizer.vocab)
    for name, length in zip(names, [*lengths, lengths[-1]], strict=True)
  ]
  return PreparedData(tokenizer, tuple(stages), held_out, manifest)


def _read_manifest(folder: epath.Path, names: list[str]) -> dict[str, Any]:
  """Returns the manifest, if it is about these rows and leads nowhere else."""
  path = folder / _MANIFEST
  arrays = {file for name in names for file in _array_names(name)}
  try:
    manifest = safe_files.read_json(path)
    for name in manifest["files"]:
      safe_files.check_name(name, path)
    complete = manifest["files"].keys() >= arrays
    complete &= manifest["rows"].keys() >= set(names)
  except (KeyError, TypeError, AttributeError):
    complete = False
  except safe_files.UnsafeFile as error:
    raise _damaged(folder, error) from None
  if not complete:
    raise _damaged(folder, path)
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


def _damaged(folder: epath.Path, what: Any) -> UserError:
  return UserError(
    f"prepared data is damaged: {what}; delete the folder {folder} and run"
    " again to make it anew"
  )


def _check_rows(config: Config, data: PreparedData, for_training: bool) -> None:
  for i, (stage, rows) in enumerate(
    zip(config.stages, data.stages, strict=True)
  ):
    if not len(rows):
      raise row_checks.no_rows(i, stage, data.manifest["rows"][_stage_name(i)])
    if for_training:
      row_checks.check_enough(config, i, len(rows))


def _stage_name(index: int) -> str:
  return f"stage_{index + 1}"


def _sha256(path: epath.Path) -> str:
  try:
    with path.open("rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()
  except OSError as error:
    raise UserError(f"{path}: {error.strerror}") from error
