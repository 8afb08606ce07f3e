"""Prepares a folder of sharded rows block by block, and can be resumed."""

import contextlib
import dataclasses
import fcntl
import hashlib
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np

from mdm_jax.core.errors import StorageError, UserError
from mdm_jax.data import (
  blocks,
  corpora,
  inputs,
  journal,
  ngrams,
  passes,
  preparation,
  row_checks,
  shards,
)
from mdm_jax.data.blocks import Block
from mdm_jax.data.config import RowsConfig
from mdm_jax.data.inputs import MANIFEST
from mdm_jax.data.ngrams import Ngrams
from mdm_jax.data.passes import Job
from mdm_jax.data.preparation import Counted, Run
from mdm_jax.data.stage_rows import row_lengths
from mdm_jax.data.stores import OnDisk
from mdm_jax.data.tokenizer import Tokenizer

_SAMPLE = "training_sample.json"
_NGRAMS = "training_8grams.npz"
_JOB = "job.json"  # config and files that the records in `work` were made from


def path_of(config: RowsConfig) -> pathlib.Path:
  """Returns the path of `data.prepared`.

  Raises:
    UserError: it is a bucket, whose files can't be memory-mapped.
  """
  if "://" in config.data.prepared:
    raise UserError(
      f"data.prepared={config.data.prepared} is a bucket; rows are mapped into"
      " memory, so give a folder on a disk that all machines see, or mount it"
    )
  return pathlib.Path(config.data.prepared).expanduser().absolute()


def prepare_folder(
  config: RowsConfig, given: Tokenizer | None, run: Run
) -> dict[str, Any]:
  """Fills the folder `data.prepared`, resuming where an earlier call stopped.

  Args:
    config: what rows depend on.
    given: tokenizer to use instead of the one the config describes.
    run: executes a pass over blocks.

  Returns:
    The folder's manifest.

  Raises:
    UserError: the corpus can't be cut into blocks, a stage finds no text, or
      the folder was begun with another config.
    StorageError: the folder can't be written.
  """
  folder = path_of(config)
  wanted, store = (
    inputs.folder_inputs(config, given),
    OnDisk(folder, config.data),
  )
  if not (folder / MANIFEST).exists():
    settled = corpora.settle(config.data)
    job = Job(dataclasses.replace(config, data=settled), store)
    with _locked(store.work):
      found = blocks.cut(settled)
      _begin(job, wanted, found)
      _fill(job, wanted, given, found, run)
  inputs.check_made(folder, wanted, config.data)
  # Also in a folder that is already finished: a kill may have come between
  # writing the manifest and removing the records.
  shutil.rmtree(store.work, ignore_errors=True)
  manifest = journal.get(folder / MANIFEST)
  row_checks.check_stages(config, manifest["rows"])
  return manifest


# MARK: the folder


@contextlib.contextmanager
def _locked(work: pathlib.Path) -> Iterator[None]:
  """Locks the work folder; the operating system frees a dead process's lock."""
  folder = work.parent
  try:
    work.mkdir(parents=True, exist_ok=True)
    file = open(work / "lock", "w")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    raise UserError(
      f"another process is preparing {folder}; wait for it, or set another"
      " data.prepared"
    ) from None
  except OSError as error:
    raise StorageError(
      f"data.prepared={folder} can't be written: {error.strerror}"
    ) from error
  with file:  # closing it releases the lock
    yield


def _begin(job: Job, wanted: dict[str, Any], found: list[Block]) -> None:
  """Records what is being prepared, or checks that a resume does the same."""
  # The block size shapes the files, but readers of a finished folder need not
  # have the same one, so it isn't part of `wanted`.
  size = {"data.block_megabytes": job.config.data.block_megabytes}
  now = {"inputs": wanted, "blocks": size, "files": blocks.state(found)}
  for place in (job.store.work, job.store.folder):
    # We hold the lock: temporary files can only be leftovers.
    journal.sweep(place)
  if _JOB not in job.store:
    job.store[_JOB] = now
    return
  before = job.store[_JOB]
  same = before["files"] == now["files"]
  made = before["inputs"]
  if same:  # the same files under a new path are the same corpus
    made = inputs.renamed(made, wanted)
  inputs.check(job.store.folder, made | before["blocks"], wanted | size)
  if not same:
    raise UserError(
      f"the files of data.corpus={job.config.data.corpus!r} have changed since"
      f" {job.store.folder} was begun; delete that folder and run again"
    )


def _fill(
  job: Job,
  wanted: dict[str, Any],
  given: Tokenizer | None,
  found: list[Block],
  run: Run,
) -> None:
  """Writes every file of the folder, the manifest last."""
  folder = job.store.folder
  made = preparation.make(job, found, given, run)
  counted = made.counted
  corpora.log_bad(counted.tally)
  small = {_SAMPLE: {"texts": made.texts}}
  for name, length in row_lengths(job.config).items():
    small[shards.index_name(name)] = shards.index_bytes(
      length, made.dtype[name], made.shards[name]
    )
  if counted.job.sampled < 1:
    small[_NGRAMS] = _ngrams(counted)
  files = {n: journal.put(folder / n, small[n])["sha256"] for n in small}
  files[made.tokenizer.filename] = made.tokenizer.sha256
  manifest = {
    "inputs": wanted,
    "blocks": {
      "count": len(counted.blocks),
      "megabytes": job.config.data.block_megabytes,
    },
    # Recognises the corpus after a move (`inputs.check_made`).
    "from": blocks.files(blocks.cut(job.config.data)),
    "revisions": corpora.revisions(job.config.data),
    **made.manifest,
    "files": dict(sorted(files.items())),
  }
  # Hash of all documents, from the blocks' hashes: nothing is read again.
  text = hashlib.sha256("".join(b.sha256 for b in counted.blocks).encode())
  manifest["documents"] |= {"bytes": counted.size, "text": text.hexdigest()}
  journal.put(folder / MANIFEST, manifest)


# MARK: training text


def _ngrams(counted: Counted) -> dict[str, np.ndarray]:
  """Merges the blocks' 8-gram hashes, for a corpus larger than its sample."""
  hashes = np.zeros(0, np.uint64)
  for block in counted.corpus:
    more = counted.job.store[passes.ngrams_name(block)]
    hashes = ngrams.distinct(np.concatenate([hashes, more]))
  return {"hashes": hashes, "share": np.float64(counted.job.copied)}


def training_texts(folder: pathlib.Path) -> list[str]:
  """Returns the train split's text, or a sample if the corpus is too large."""
  return journal.get(folder / _SAMPLE)["texts"]


def training_ngrams(folder: pathlib.Path) -> Ngrams | None:
  """Returns the train split's 8-grams; None if `training_texts` has it all."""
  if not (folder / _NGRAMS).exists():
    return None
  found = journal.get(folder / _NGRAMS)
  return Ngrams(found["hashes"], float(found["share"]))
