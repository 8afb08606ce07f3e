"""What is done with one block of a corpus, pass by pass.

Each pass is a function of the block, the config and what earlier passes wrote;
it writes one record into the folder's `work`, which is there when all of it is.
So blocks can be done by anyone, anywhere, in any order, and more than once.

count    documents, bytes, hashes; bad records
sample   which side documents are on; text for the tokenizer and the judge
words    in how many units a word is, for stages that select the easiest
signals  what the difficulty of each unit is a mean of, in bins
rows     the shards of every stage and of the held-out text
"""

import dataclasses
import pathlib
import zlib
from typing import Any, Literal

import numpy as np

from mdm_jax.core.config import Config, StageConfig
from mdm_jax.core.errors import UserError
from mdm_jax.data import blocks, corpora, journal, ranking, segments, shards
from mdm_jax.data import tokenizer as tokenizers
from mdm_jax.data.blocks import Block
from mdm_jax.data.corpora import Document
from mdm_jax.data.ranking import Cut
from mdm_jax.data.segments import Selection, Unit, UnitWords
from mdm_jax.data.stage_rows import (
  HELD_OUT,
  held_out_stage,
  make_rows,
  stage_name,
)
from mdm_jax.data.text_files import Tally

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
    config: of the run.
    below: the place of a text below which it is held out.
    sampled: share of the train split that the sample is.
  """

  folder: pathlib.Path
  config: Config
  below: float = 0.0
  sampled: float = 1.0

  @property
  def work(self) -> pathlib.Path:
    """Where records are."""
    return self.folder / WORK

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
    suffix = _SUFFIXES.get(name, ".json")
    return self.work / f"{name}.{block.number:06d}{part}{suffix}"


def run(name: Pass, job: Job, block: Block) -> None:
  """Does a pass over a block, if it is not done."""
  if not job.record(name, block).exists():
    _PASSES[name](job, block)


# MARK: documents


def _count(job: Job, block: Block) -> None:
  data = job.config.data
  tally = Tally(skip=data.on_bad_record == "skip")
  documents = blocks.read(data, block, tally)
  places = [corpora.place(document.text) for document in documents]
  record = {
    "documents": len(documents),
    "bytes": sum(len(document.text.encode()) for document in documents),
    "lowest": min(places, default=None),
    "highest": max(places, default=None),
    "sha256": corpora.fingerprint(documents),
    "tally": dataclasses.asdict(tally),
  }
  journal.put_json(job.record("count", block), record)


def _split(job: Job, block: Block) -> tuple[list[Document], list[Document]]:
  """Returns the two sides of a block, once it is as it was counted."""
  data = job.config.data
  tally = Tally(skip=data.on_bad_record == "skip")
  documents = blocks.read(data, block, tally)
  if corpora.fingerprint(documents) != block.sha256:
    where = block.spans[0].path
    raise UserError(
      f"{where}, or a file after it, has changed while it was prepared; delete"
      f" the folder {job.folder} and run again"
    )
  return corpora.split_at(documents, job.below)


def _train_units(job: Job, block: Block, stage: StageConfig) -> list[Unit]:
  train, _ = _split(job, block)
  return segments.units([document.text for document in train], stage)


def _sample(job: Job, block: Block) -> None:
  train, held_out = _split(job, block)
  texts = [document.text for document in train]
  characters = set().union(*texts) if _spells(job.config) else ()
  record = {
    "train": len(train),
    "held_out": len(held_out),
    "texts": [p for text in texts for p in _pieces(text, job.sampled)],
    "characters": "".join(sorted(characters)),
  }
  journal.put_json(job.record("sample", block), record)


def _spells(config: Config) -> bool:
  return config.tokenizer.kind == "char"


def _pieces(text: str, share: float) -> list[str]:
  """Returns a share of a text by a hash of each piece, or all of it."""
  if share >= 1:
    return [text]
  pieces = (text[i : i + _PIECE] for i in range(0, len(text), _PIECE))
  return [p for p in pieces if corpora.place(p, "sample") < share]


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
    found = segments.signals(units, words, rarity[_bins_of(words)])
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
  train, held_out = ([d.text for d in side] for side in sides)
  record = {}
  for i, stage in enumerate(job.config.stages):
    units = segments.units(train, stage)
    selection = _select(job, stage_name(i), block, units)
    made = make_rows(units, selection, stage, tokenizer)
    record[stage_name(i)] = _put_rows(job, stage_name(i), block, *made)
  stage = held_out_stage(job.config)
  units = segments.units(held_out, stage)
  made = make_rows(units, None, stage, tokenizer)
  record[HELD_OUT] = _put_rows(job, HELD_OUT, block, *made)
  journal.put_json(job.record("rows", block), record)


def _put_rows(
  job: Job, name: str, block: Block, rows: Any, counts: dict[str, Any]
) -> dict[str, Any]:
  """Writes a shard; returns its counts and its line of the index."""
  shard: dict[str, Any] = {"rows": len(rows)}
  for part in shards.PARTS:
    path = job.folder / shards.shard_name(name, block.number, part)
    shard[part] = journal.put_array(path, getattr(rows, part))
  dtype = {part: getattr(rows, part).dtype.name for part in shards.PARTS}
  return {"counts": counts, "shard": shard, "dtype": dtype}


_PASSES = {
  "count": _count,
  "sample": _sample,
  "words": _words,
  "signals": _signals,
  "rows": _rows,
}
