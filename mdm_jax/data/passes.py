"""What is done with one block of a corpus, pass by pass.

Each pass is a function of the block, the config and what earlier passes wrote;
it writes one record into the folder's `work`, which is there when all of it is.
So blocks can be done by anyone, anywhere, in any order, and more than once.

count    documents, bytes, hashes; bad records
sample   how much is on each side; text for the tokenizer and the judge
words    in how many units a word is, for stages that select the easiest
signals  what the difficulty of each unit is a mean of, in bins
rows     the shards of every stage and of the held-out texts
"""

import dataclasses
import functools
import pathlib
import types
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np

from mdm_jax.core import modules
from mdm_jax.core.errors import UserError
from mdm_jax.data import (
  blocks,
  corpora,
  journal,
  ngrams,
  ranking,
  segments,
  shards,
  splits,
)
from mdm_jax.data import tokenizer as tokenizers
from mdm_jax.data.blocks import Block
from mdm_jax.data.config import RowsConfig, StageConfig
from mdm_jax.data.coverage import Coverage
from mdm_jax.data.ranking import Cut
from mdm_jax.data.rows import Rows
from mdm_jax.data.segments import Selection, Unit, UnitWords
from mdm_jax.data.splits import HELD_OUT, TEST, TRAIN, Shares, Sides, Split
from mdm_jax.data.stage_rows import make_held_out, make_rows, stage_name
from mdm_jax.data.text_files import Document, Tally

WORK = "work"
WORD_BINS = 2**22  # words are counted by a hash of so many values
_PIECE = 2**16  # characters that are sampled together
_SUFFIXES = {"words": ".npz", "signals": ".npz"}

Pass = Literal["count", "sample", "words", "signals", "rows"]


@dataclasses.dataclass(frozen=True)
class Job:
  """What all blocks share.

  Attributes:
    folder: that is prepared; `work` in it has the records.
    config: what rows depend on.
    split: which documents are held out, once they are counted.
    sampled: share of the train split that the sample is.
    copied: share of its 8-grams that are kept, where that is not all of it.
  """

  folder: pathlib.Path
  config: RowsConfig
  split: Split | None = None
  sampled: float = 1.0
  copied: float = 1.0

  @property
  def work(self) -> pathlib.Path:
    """Where records are."""
    return self.folder / WORK

  @property
  def shares(self) -> Shares:
    """What is held out of the corpus."""
    return splits.shares_of(self.config.data)

  @property
  def ranked(self) -> dict[str, StageConfig]:
    """The stages that select the easiest units, by their names on disk."""
    stages = enumerate(self.config.stages)
    return {
      stage_name(i): stage
      for i, stage in stages
      if stage.unit != "paragraphs" and stage.easiest < 1
    }

  def record(self, name: Pass, block: Block) -> pathlib.Path:
    """Returns the file that says that a pass has done a block."""
    part = "" if block.most is None else f".first_{block.most}"
    side = "" if block.side == TRAIN else f".{block.side}"
    suffix = _SUFFIXES.get(name, ".json")
    return self.work / f"{name}{side}.{block.number:06d}{part}{suffix}"

  def ngrams(self, block: Block) -> pathlib.Path:
    """Returns the file with the 8-grams of a block, of a larger corpus."""
    return self.work / f"ngrams.{block.number:06d}.npy"

  def places(self, side: str) -> pathlib.Path:
    """Returns the file with the places of the texts given for a side."""
    return self.work / f"places.{side}.npy"


def run(name: Pass, job: Job, block: Block) -> None:
  """Does a pass over a block, if it is not done."""
  modules.load(job.config.modules)  # this process may know none of them yet
  if not job.record(name, block).exists():
    _PASSES[name](job, block)


def records(
  name: Pass, job: Job, found: list[Block]
) -> Iterator[dict[str, Any]]:
  """Yields what a pass has recorded of each block."""
  return (journal.get_json(job.record(name, block)) for block in found)


# MARK: documents


def _count(job: Job, block: Block) -> None:
  tally = Tally(skip=job.config.data.on_bad_record == "skip")
  documents = blocks.read(job.config.data, block, tally)
  record = {
    "documents": len(documents),
    "bytes": sum(len(document.text.encode()) for document in documents),
    "sha256": corpora.fingerprint(documents),
    "tally": dataclasses.asdict(tally),
  }
  if block.side == TRAIN:
    own = _own(job, block, documents)
    record["counts"] = dataclasses.asdict(splits.count(own, job.shares))
  else:
    record["places"] = sorted({splits.place(d.text) for d in documents})
  journal.put_json(job.record("count", block), record)


def _own(job: Job, block: Block, documents: list[Document]) -> list[Document]:
  """Returns the documents that were not given for a side that comes first."""
  first = {TRAIN: HELD_OUT, TEST: ()}.get(block.side, (TEST,))
  given = (job.places(side) for side in first if side not in job.shares.wanted)
  held = {at for path in given for at in journal.map_array(path).tolist()}
  return splits.without(documents, held)


def _split(job: Job, block: Block) -> Sides:
  """Returns the sides of a block, once it is as it was counted."""
  tally = Tally(skip=job.config.data.on_bad_record == "skip")
  documents = blocks.read(job.config.data, block, tally)
  if corpora.fingerprint(documents) != block.sha256:
    where = block.spans[0].path
    raise UserError(
      f"{where}, or a file after it, has changed while it was prepared; delete"
      f" the folder {job.folder} and run again"
    )
  own = _own(job, block, documents)
  if block.side == TRAIN:
    return job.split(own)
  return dataclasses.replace(Sides([], [], []), **{block.side: own})


def _train_units(job: Job, block: Block, stage: StageConfig) -> list[Unit]:
  texts = [document.text for document in _split(job, block).train]
  return segments.units(texts, stage, job.config.data.language)


def _sample(job: Job, block: Block) -> None:
  sides = _split(job, block)
  texts = [document.text for document in sides.train]
  characters = set().union(*texts) if _spells(job.config) else ()
  if job.sampled < 1:  # else the sample is all there is to look at
    found = ngrams.of(texts, job.copied)
    journal.put_array(job.ngrams(block), found.hashes)
  record = {
    "sizes": sides.count(),
    "texts": [p for text in texts for p in _pieces(text, job.sampled)],
    "characters": "".join(sorted(characters)),
  }
  journal.put_json(job.record("sample", block), record)


def _spells(config: RowsConfig) -> bool:
  return config.tokenizer.kind == "char"


def _pieces(text: str, share: float) -> list[str]:
  """Returns a share of a text by a hash of each piece, or all of it."""
  if share >= 1:
    return [text]
  pieces = (text[i : i + _PIECE] for i in range(0, len(text), _PIECE))
  return [p for p in pieces if splits.place(p, "sample") < share]


# MARK: difficulty


def _bins_of(words: UnitWords) -> np.ndarray:
  hashes = [zlib.crc32(word.encode()) % WORD_BINS for word in words.distinct]
  return np.array(hashes, np.int64)


def _words(job: Job, block: Block) -> None:
  arrays = {}
  for name, stage in job.ranked.items():
    units = _train_units(job, block, stage)
    words = segments.unit_words(units)
    # A word that shares its bin with another counts with it.
    bins, inverse = np.unique(_bins_of(words), return_inverse=True)
    counts = np.zeros(len(bins), np.int64)
    np.add.at(counts, inverse, words.frequency())
    arrays |= {
      f"{name}.bins": bins,
      f"{name}.counts": counts,
      f"{name}.units": np.array(len(units)),
    }
  journal.put_arrays(job.record("words", block), arrays)


def _signals(job: Job, block: Block) -> None:
  arrays = {}
  for name, stage in job.ranked.items():
    units = _train_units(job, block, stage)
    words = segments.unit_words(units)
    rarity = journal.map_array(job.work / f"rarity.{name}.npy")
    found = segments.signals(
      units, words, rarity[_bins_of(words)], job.config.data.language
    )
    arrays[name] = ranking.to_bins(found)
  journal.put_arrays(job.record("signals", block), arrays)


def _select(
  job: Job, name: str, block: Block, units: list[Unit]
) -> Selection | None:
  if name not in job.ranked:
    return None
  scores = difficulty(job, name, block)
  kept = np.flatnonzero(_cut(job, name, block).keeps(ranking.levels(scores)))
  return Selection([units[i] for i in kept], scores[kept], scores)


def difficulty(job: Job, name: str, block: Block) -> np.ndarray:
  """Returns the difficulty of a block's units among those of all blocks."""
  bins = journal.get_arrays(job.record("signals", block))[name]
  ranks = journal.map_array(job.work / f"ranks.{name}.npy")
  return ranking.difficulty(bins, ranks)


def _cut(job: Job, name: str, block: Block) -> Cut:
  cuts = journal.map_array(job.work / f"cuts.{name}.npy")
  return Cut(*cuts[block.number].tolist())


# MARK: rows


def _rows(job: Job, block: Block) -> None:
  tokenizer = tokenizers.load_tokenizer(job.folder)
  sides = _split(job, block)
  train = [document.text for document in sides.train]
  put = functools.partial(_put_rows, job, block)
  coverage, language = Coverage(train), job.config.data.language
  record = {}
  for i, stage in enumerate(job.config.stages if block.side == TRAIN else ()):
    found = segments.find(train, stage, language)
    selection = _select(job, stage_name(i), block, found.units)
    rows, counts, read = make_rows(found, selection, stage, tokenizer)
    coverage.add(read)
    record[stage_name(i)] = put(stage_name(i), rows, counts)
  record["text"] = coverage.counts()
  for side in job.shares.wanted if block.side == TRAIN else (block.side,):
    texts = [document.text for document in sides[side]]
    held, counts = make_held_out(texts, job.config, tokenizer)
    record[side] = put(side, held.rows, counts, {shards.TABLE: held.texts})
  journal.put_json(job.record("rows", block), record)


def _put_rows(
  job: Job,
  block: Block,
  name: str,
  rows: Rows,
  counts: dict[str, Any],
  beside: Mapping[str, np.ndarray] = types.MappingProxyType({}),
) -> dict[str, Any]:
  """Writes a shard; returns its counts and its line of the index."""
  shard: dict[str, Any] = {"rows": len(rows)}
  parts = rows.fields | beside
  for part, array in parts.items():
    path = job.folder / shards.shard_name(name, block.number, part)
    shard[part] = journal.put_array(path, array)
  dtype = {part: array.dtype.name for part, array in rows.fields.items()}
  return {"counts": counts, "shard": shard, "dtype": dtype}


_PASSES = {
  "count": _count,
  "sample": _sample,
  "words": _words,
  "signals": _signals,
  "rows": _rows,
}
