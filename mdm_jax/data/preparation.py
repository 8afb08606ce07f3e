"""A folder of sharded rows: the passes over all blocks, and what joins them.

count -> split, blocks -> sample -> tokenizer -> (words -> rarity -> signals ->
ranks -> cut) -> rows -> index, manifest

Between two passes, the records of all blocks become something of a fixed size,
one record after the other. Nothing here holds more than one block's.
"""

import collections
import dataclasses
import fcntl
import hashlib
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np

from mdm_jax.core.errors import StorageError, UserError
from mdm_jax.data import (
  blocks,
  corpora,
  folder_inputs,
  inputs,
  journal,
  ngrams,
  passes,
  row_checks,
  shards,
  splits,
  stage_ranks,
)
from mdm_jax.data import tokenizer as tokenizers
from mdm_jax.data.blocks import Block
from mdm_jax.data.config import RowsConfig
from mdm_jax.data.ngrams import Ngrams
from mdm_jax.data.passes import Job, Pass
from mdm_jax.data.splits import TRAIN
from mdm_jax.data.stage_rows import row_lengths, spread
from mdm_jax.data.text_files import Tally
from mdm_jax.data.tokenizer import Tokenizer

MANIFEST = "manifest.json"
SAMPLE = "training_sample.json"
NGRAMS = "training_8grams.npz"
_NGRAMS = 2**24  # that are kept, about, so that a larger corpus takes no more
_NGRAM_BYTES = 3  # of text for each, or more
SAMPLE_BYTES = 2**25  # of text, for the tokenizer and the n-gram judge

# Does a pass over some blocks, anywhere; returns when all of them are done.
Run = Callable[[Pass, Job, list[Block]], None]


def folder_of(config: RowsConfig) -> pathlib.Path:
  """Returns the folder `data.prepared`; raises UserError if it is a bucket."""
  if "://" in config.data.prepared:
    raise UserError(
      f"data.prepared={config.data.prepared} is a bucket; rows are mapped into"
      " memory, so give a folder of a disk that all machines see, or mount it"
    )
  return pathlib.Path(config.data.prepared).expanduser().absolute()


def prepare_folder(
  config: RowsConfig, given: Tokenizer | None, run: Run
) -> dict[str, Any]:
  """Fills the folder `data.prepared`, or goes on with it; returns its manifest.

  Args:
    config: what rows depend on.
    given: the tokenizer to use instead of the config's.
    run: does a pass over blocks.

  Raises:
    UserError: the corpus can't be prepared, a stage finds nothing in it, or the
      folder is of another config.
  """
  folder = folder_of(config)
  wanted = folder_inputs.of(config, given)
  if not (folder / MANIFEST).exists():
    job = Job(folder, config)
    with _owned(job.work):
      found = blocks.cut(config.data)
      _begin(job, wanted, found)
      _fill(job, wanted, given, found, run)
  folder_inputs.check_made(folder, wanted, config.data)
  shutil.rmtree(folder / passes.WORK, ignore_errors=True)
  manifest = journal.get_json(folder / MANIFEST)
  row_checks.check_stages(config, manifest["rows"])
  return manifest


# MARK: the folder


class _owned:
  """Holds a folder of work alone; a process that dies lets go of it."""

  def __init__(self, work: pathlib.Path):
    self._work = work

  def __enter__(self) -> None:
    try:
      self._work.mkdir(parents=True, exist_ok=True)
      self._file = open(self._work / "lock", "w")
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UserError(
        f"another process prepares {self._work.parent}; wait for it, or give"
        " another data.prepared"
      ) from None
    except OSError as error:
      where = self._work.parent
      raise StorageError(
        f"data.prepared={where} can't be written: {error.strerror}"
      ) from error

  def __exit__(self, *_: Any) -> None:
    self._file.close()


def _begin(job: Job, wanted: dict[str, Any], found: list[Block]) -> None:
  """Goes on with the work of before, if it is this one."""
  # It decides which bytes are written, but not how they are read.
  size = {"data.block_megabytes": job.config.data.block_megabytes}
  now = {"inputs": wanted, "blocks": size, "files": blocks.state(found)}
  path = job.work / "job.json"
  for place in (job.work, job.folder):
    journal.sweep(place)
  if not path.exists():
    journal.put_json(path, now)
    return
  before = journal.get_json(path)
  same = before["files"] == now["files"]
  made = before["inputs"]
  if same:  # they may have moved
    made = folder_inputs.renamed(made, wanted)
  folder_inputs.check(job.folder, made | before["blocks"], wanted | size)
  if not same:
    raise UserError(
      f"the files of data.corpus={job.config.data.corpus!r} have changed since"
      f" {job.folder} was begun; delete that folder and run again"
    )


def _fill(
  job: Job,
  wanted: dict[str, Any],
  given: Tokenizer | None,
  found: list[Block],
  run: Run,
) -> None:
  """Writes every file of a folder, the manifest last."""
  do = lambda name, some: run(name, job, _undone(name, job, some))
  apart = [block for block in found if block.side != TRAIN]
  do("count", apart)
  _write_places(job, apart)
  own = [block for block in found if block.side == TRAIN]
  do("count", own)
  own = _limited(job, own)
  do("count", own)
  job, own, apart, counts = _counted(job, own, apart)
  do("sample", own + apart)
  counts, told = _sampled(job, own + apart, given, counts)
  if job.ranked:
    do("words", own)
    stage_ranks.write_rarity(job, own)
    do("signals", own)
    for name in job.ranked:
      stage_ranks.write_ranks(job, own, name)
      stage_ranks.write_cuts(job, own, name)
  do("rows", own + apart)
  _finish(job, wanted, own + apart, counts, told)


def _undone(name: Pass, job: Job, found: list[Block]) -> list[Block]:
  return [block for block in found if not job.record(name, block).exists()]


# MARK: documents


def _limited(job: Job, found: list[Block]) -> list[Block]:
  """Returns the blocks of the first `data.max_documents` documents."""
  left = job.config.data.max_documents
  if left is None:
    return found
  kept = []
  for block, record in zip(
    found, passes.records("count", job, found), strict=True
  ):
    if left <= 0:
      break
    part = left if left < record["documents"] else None
    kept.append(dataclasses.replace(block, most=part))
    left -= record["documents"]
  return kept


def _write_places(job: Job, apart: list[Block]) -> None:
  """Lists the texts that were given for a side: no other may have them."""
  for side in splits.HELD_OUT:
    path = job.places(side)
    mine = [block for block in apart if block.side == side]
    if mine and not path.exists():
      records = passes.records("count", job, mine)
      places = {at for record in records for at in record["places"]}
      journal.put_array(path, np.array(sorted(places), np.float64))


def _counted(
  job: Job, own: list[Block], apart: list[Block]
) -> tuple[Job, list[Block], list[Block], dict[str, Any]]:
  """Returns what follows from the counts: the split, and the sample's share."""
  total, read, tally = 0, 0, Tally()
  sums = splits.count([], job.shares)
  known = []
  found = own + apart
  for block, record in zip(
    found, passes.records("count", job, found), strict=True
  ):
    tally.add(Tally(**record["tally"]))
    known.append(dataclasses.replace(block, sha256=record["sha256"]))
    read += record["documents"]
    if block.side == TRAIN:
      total += record["bytes"]
      sums.add(splits.Counts(**record["counts"]))
  tally.check()
  corpora.tell(tally)
  if not sums.documents:
    raise UserError(f"data.corpus={job.config.data.corpus!r} holds no text")
  job = dataclasses.replace(
    job,
    split=splits.decide(sums, job.shares),
    sampled=min(SAMPLE_BYTES / total, 1.0),
    copied=min(_NGRAMS * _NGRAM_BYTES / total, 1.0),
  )
  digest = hashlib.sha256("".join(b.sha256 for b in known).encode())
  counts = {
    "bytes": total,
    "text": digest.hexdigest(),
    "bad": tally.bad,
    "repeated": read - sums.documents,
  }
  return job, known[: len(own)], known[len(own) :], counts


def _sampled(
  job: Job, found: list[Block], given: Tokenizer | None, counts: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Writes the sample of the training text and the tokenizer.

  Returns:
    The counts of documents, and what is to be known of the split.
  """
  sizes = splits.Sides([], [], []).count()
  texts: list[str] = []
  characters: set[str] = set()
  room = SAMPLE_BYTES
  for record in passes.records("sample", job, found):
    for what, by_side in record["sizes"].items():
      for side, size in by_side.items():
        sizes[what][side] += size
    characters.update(record["characters"])
    for text in record["texts"] if room > 0 else ():
      texts.append(text)
      room -= len(text.encode())
  if not (job.folder / SAMPLE).exists():
    journal.put_json(job.folder / SAMPLE, {"texts": texts})
  if not tokenizers.is_saved_in(job.folder):
    learnt = [*texts, "".join(sorted(characters))] if characters else texts
    tokenizer = given or tokenizers.build(job.config.tokenizer, learnt)
    journal.put(job.folder / tokenizer.filename, tokenizer.content)
  if job.sampled < 1:
    _write_ngrams(job, [block for block in found if block.side == TRAIN])
  apart = [s for s in splits.HELD_OUT if s not in job.shares.wanted]
  kept = sum(sizes["documents"][side] for side in apart)
  told = splits.told(job.split, sizes, counts.pop("repeated") - kept)
  return counts | sizes["documents"], told


def _write_ngrams(job: Job, own: list[Block]) -> None:
  path = job.folder / NGRAMS
  if not path.exists():
    hashes = np.zeros(0, np.uint64)
    for block in own:
      more = journal.map_array(job.ngrams(block))
      hashes = ngrams.distinct(np.concatenate([hashes, more]))
    journal.put_arrays(
      path, {"hashes": hashes, "share": np.float64(job.copied)}
    )


def read_ngrams(folder: pathlib.Path) -> Ngrams | None:
  """Returns the 8-grams of the train split, if it is larger than the sample."""
  if not (folder / NGRAMS).exists():
    return None
  found = journal.get_arrays(folder / NGRAMS)
  return Ngrams(found["hashes"], float(found["share"]))


# MARK: the end


def _finish(
  job: Job,
  wanted: dict[str, Any],
  found: list[Block],
  counts: dict[str, Any],
  told: dict[str, Any],
) -> None:
  """Writes the indices of all shards, and the manifest over all of it."""
  lengths = row_lengths(job.config)
  rows = {n: _write_index(job, found, n, lengths[n]) for n in lengths}
  tokenizer = tokenizers.load_tokenizer(job.folder)
  small = [SAMPLE, tokenizer.filename, *map(shards.index_name, lengths)]
  small += [NGRAMS] if job.sampled < 1 else []
  manifest = {
    "inputs": wanted,
    "blocks": {
      "count": len(found),
      "megabytes": job.config.data.block_megabytes,
    },
    "documents": counts,
    "split": told,
    "from": blocks.files(blocks.cut(job.config.data)),
    "tokenizer": {
      "kind": tokenizer.kind,
      "sha256": tokenizer.sha256,
      "vocab_size": tokenizer.vocab.size,
    },
    "rows": rows,
    "text": _unread(job, found),
    "files": {n: inputs.file_sha256(job.folder / n) for n in sorted(small)},
  }
  journal.put_json(job.folder / MANIFEST, manifest)


def _unread(job: Job, found: list[Block]) -> dict[str, int]:
  """Adds up the text, and what of it no stage reads."""
  total: collections.Counter[str] = collections.Counter()
  for record in passes.records("rows", job, found):
    total.update(record.get("text", {}))
  return dict(total)


def _write_index(
  job: Job, found: list[Block], name: str, length: int
) -> dict[str, Any]:
  """Writes the index of some rows; returns their counts."""
  shown = {block.number for block in spread(found)}
  listed, merged, examples = [], None, []
  for block, record in zip(
    found, passes.records("rows", job, found), strict=True
  ):
    if name not in record:  # of text that was given for another side
      continue
    part = record[name]
    listed.append(part["shard"])
    merged = _merge(merged, part["counts"])
    if block.number in shown:
      examples += enumerate(part["counts"]["examples"])
  if merged["difficulty"]:  # a block's own go from easy to difficult
    examples.sort(key=lambda example: example[0])
  content = shards.index_bytes(length, part["dtype"], listed)
  journal.put(job.folder / shards.index_name(name), content)
  return merged | {"examples": [text for _, text in spread(examples)]}


def _merge(a: dict[str, Any] | None, b: dict[str, Any]) -> dict[str, Any]:
  """Adds up the counts of two runs of blocks."""
  if a is None:
    return b
  join = lambda k: max(a[k], b[k]) if k.startswith("most_") else a[k] + b[k]
  merged = {k: join(k) for k in a if isinstance(a[k], int)}
  merged["difficulty"] = b["difficulty"] and {
    "histogram": [
      x + y
      for x, y in zip(
        a["difficulty"]["histogram"], b["difficulty"]["histogram"], strict=True
      )
    ],
    "cut": max(a["difficulty"]["cut"], b["difficulty"]["cut"]),
  }
  return merged
