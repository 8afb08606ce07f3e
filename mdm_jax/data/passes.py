"""The passes that turn one block of a corpus into rows.

A pass is a function of the block, the config, and the records of earlier
passes; it returns one record. So blocks can be processed in any order, by any
process, and repeatedly. There is no other way from text to rows: a corpus in
memory is one block.

count    documents, bytes, hashes, bad records
sample   size of each split; text for the tokenizer and the n-gram judge
words    number of units with each word, for stages with `easiest` < 1
signals  signals of each unit whose mean rank is its difficulty, in bins
rows     rows of every stage and of held-out text

`words` and `signals` are needed only with several blocks. The units of a single
block are ranked exactly, in the last pass.
"""

import dataclasses
import zlib
from typing import Any, Literal

import numpy as np

from mdm_jax.core import modules
from mdm_jax.data import (
  answers,
  corpora,
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
from mdm_jax.data.rows import Rows
from mdm_jax.data.segments import Selection, Unit, UnitWords
from mdm_jax.data.splits import HELD_OUT, TEST, TRAIN, Shares, Sides, Split
from mdm_jax.data.stage_rows import make_held_out, make_rows, stage_name
from mdm_jax.data.stores import Store
from mdm_jax.data.text_files import Document

# Words are counted by a hash, so that the table (32 MiB) does not grow with the
# corpus. Two words with the same hash are counted together.
WORD_BINS = 2**22
_PIECE = 2**16  # characters per sampled piece of text

Pass = Literal["count", "sample", "words", "signals", "rows"]


@dataclasses.dataclass(frozen=True)
class Job:
  """What the passes over all blocks share.

  Attributes:
    config: what rows depend on.
    store: reads documents and keeps the records.
    split: which documents are held out (None: not decided yet).
    sampled: share of the train split in the sample.
    copied: share of the train split's 8-grams that are kept.
    one_block: whether the corpus is a single block.
  """

  config: RowsConfig
  store: Store
  split: Split | None = None
  sampled: float = 1.0
  copied: float = 1.0
  one_block: bool = False

  @property
  def shares(self) -> Shares:
    """The shares of the corpus to hold out."""
    return splits.shares_of(self.config.data)

  @property
  def ranked(self) -> dict[str, StageConfig]:
    """Stages, by name, whose units are ranked across several blocks."""
    stages = enumerate(() if self.one_block else self.config.stages)
    return {
      stage_name(i): stage
      for i, stage in stages
      if not stage.reads_all and stage.easiest < 1
    }


def _name(name: Pass, block: Block) -> str:
  """Returns the name of a pass' record of a block."""
  # `most` is in the name: a block that `max_documents` cuts short has other
  # records than the whole block.
  part = "" if block.most is None else f".first_{block.most}"
  side = "" if block.side == TRAIN else f".{block.side}"
  suffix = "npz" if name in ("words", "signals") else "json"
  return f"{name}{side}.{block.number:06d}{part}.{suffix}"


def ngrams_name(block: Block) -> str:
  """Returns the name of a block's 8-grams; only a large corpus has them."""
  return f"ngrams.{block.number:06d}.npy"


def is_done(name: Pass, job: Job, block: Block) -> bool:
  """Whether the record of a pass over a block exists."""
  return _name(name, block) in job.store


def run(name: Pass, job: Job, block: Block) -> None:
  """Runs a pass over a block, unless its record exists."""
  modules.load(job.config.modules)  # a new worker has imported none of them
  if not is_done(name, job, block):
    job.store[_name(name, block)] = _PASSES[name](job, block)


def record(name: Pass, job: Job, block: Block) -> dict[str, Any]:
  """Returns the record that a pass made of a block."""
  return job.store[_name(name, block)]


# MARK: documents


def _count(job: Job, block: Block) -> dict[str, Any]:
  documents, tally = job.store.read(block)
  found = {
    "documents": len(documents),
    "bytes": sum(len(document.text.encode()) for document in documents),
    "sha256": corpora.fingerprint(documents),
    "tally": dataclasses.asdict(tally),
  }
  if block.side == TRAIN:
    own = _own(job, block, documents)
    found["counts"] = dataclasses.asdict(splits.count(own, job.shares))
  else:
    # The other splits leave these texts out (`_own`).
    found["places"] = sorted({splits.place(d.text) for d in documents})
  return found


def _own(job: Job, block: Block, documents: list[Document]) -> list[Document]:
  """Returns the documents that are in no held-out corpus of higher priority."""
  # A text given twice belongs to test, else to validation, else to training, so
  # held-out text is never trained on.
  first = {TRAIN: HELD_OUT, TEST: ()}.get(block.side, (TEST,))
  given = (side for side in first if side not in job.shares.wanted)
  places = (job.store[f"places.{side}.npy"] for side in given)
  held = {at for known in places for at in known.tolist()}
  return [d for d in documents if not held or splits.place(d.text) not in held]


def divide(job: Job, block: Block) -> Sides:
  """Returns the documents of a block by split, once the split is decided."""
  own = _own(job, block, job.store.read(block)[0])
  if block.side == TRAIN:
    return job.split(own)
  # A corpus given for a split belongs to that split as a whole.
  return splits.no_documents() | {block.side: own}


def _train_units(job: Job, block: Block, stage: StageConfig) -> list[Unit]:
  texts = [document.text for document in divide(job, block)[TRAIN]]
  return segments.units(texts, stage, job.config.data.language)


def _sample(job: Job, block: Block) -> dict[str, Any]:
  sides = divide(job, block)
  texts = [answers.plain(document.text) for document in sides[TRAIN]]
  characters = set()
  if job.sampled < 1:  # otherwise `texts` has the whole corpus already
    found = ngrams.of(texts, job.copied)
    job.store[ngrams_name(block)] = found.hashes
    if job.config.tokenizer.kind == "char":
      # The `char` tokenizer needs every character, not only the sampled ones.
      characters = set().union(*texts)
  return {
    "sizes": splits.sizes(sides),
    "texts": [p for text in texts for p in _pieces(text, job.sampled)],
    "characters": "".join(sorted(characters)),
  }


def _pieces(text: str, share: float) -> list[str]:
  """Returns the text as one piece, or a random share of its pieces by hash."""
  if share >= 1:
    return [text]
  pieces = (text[i : i + _PIECE] for i in range(0, len(text), _PIECE))
  return [p for p in pieces if splits.place(p, "sample") < share]


# MARK: difficulty


def _bins_of(words: UnitWords) -> np.ndarray:
  # crc32 is the same in every process; Python's own hash of a string isn't.
  hashes = [zlib.crc32(word.encode()) % WORD_BINS for word in words.distinct]
  return np.array(hashes, np.int64)


def _words(job: Job, block: Block) -> dict[str, np.ndarray]:
  arrays = {}
  for name, stage in job.ranked.items():
    units = _train_units(job, block, stage)
    words = segments.unit_words(units)
    # Add up the counts of words that share a bin.
    bins, inverse = np.unique(_bins_of(words), return_inverse=True)
    counts = np.zeros(len(bins), np.int64)
    np.add.at(counts, inverse, words.frequency())
    arrays |= {
      f"{name}.bins": bins,
      f"{name}.counts": counts,
      f"{name}.units": np.array(len(units)),
    }
  return arrays


def _signals(job: Job, block: Block) -> dict[str, np.ndarray]:
  arrays = {}
  for name, stage in job.ranked.items():
    units = _train_units(job, block, stage)
    words = segments.unit_words(units)
    rarity = job.store[f"rarity.{name}.npy"]
    found = segments.signals(
      units, words, rarity[_bins_of(words)], job.config.data.language
    )
    arrays[name] = ranking.to_bins(found)
  return arrays


def _select(
  job: Job, index: int, block: Block, units: list[Unit]
) -> Selection | None:
  """Returns the units that a stage keeps; None if it keeps all, unranked."""
  name, stage = stage_name(index), job.config.stages[index]
  if job.one_block and not stage.reads_all:
    return segments.easiest(units, stage.easiest, job.config.data.language)
  if name not in job.ranked:
    return None
  scores = difficulty(job, name, block)
  last, quota = job.store[f"cuts.{name}.npy"][block.number].tolist()
  kept = np.flatnonzero(ranking.kept(ranking.levels(scores), last, quota))
  return Selection([units[i] for i in kept], scores[kept], scores)


def difficulty(job: Job, name: str, block: Block) -> np.ndarray:
  """Returns the difficulty of a block's units, ranked in the whole corpus."""
  bins = record("signals", job, block)[name]
  return ranking.difficulty(bins, job.store[f"ranks.{name}.npy"])


# MARK: rows


def _rows(job: Job, block: Block) -> dict[str, Any]:
  tokenizer = tokenizers.load_tokenizer(job.store.folder)
  sides = divide(job, block)
  train = [document.text for document in sides[TRAIN]]
  data, coverage = job.config.data, Coverage([*map(answers.plain, train)])
  made = {}
  # Only blocks of `data.corpus` have text to train on.
  for i, stage in enumerate(job.config.stages if block.side == TRAIN else ()):
    found = segments.find(train, stage, data.language)
    selection = _select(job, i, block, found.units)
    rows, counts, read = make_rows(found, selection, stage, tokenizer, data)
    coverage.add(read)
    name = stage_name(i)
    made[name] = _put_rows(job, block, name, rows, counts)
  made["text"] = coverage.counts()
  # The held-out splits that are taken from this block's corpus.
  for side in job.shares.wanted if block.side == TRAIN else (block.side,):
    texts = [document.text for document in sides[side]]
    held, counts = make_held_out(
      texts, job.config, tokenizer, corpora.asked(data, block.side)
    )
    table = {shards.TABLE: held.texts}
    made[side] = _put_rows(job, block, side, held.rows, counts, **table)
  return made


def _put_rows(
  job: Job,
  block: Block,
  name: str,
  rows: Rows,
  counts: dict[str, Any],
  **beside: np.ndarray,
) -> dict[str, Any]:
  """Writes a block's rows; returns their counts, index line and dtypes."""
  shard = {"rows": len(rows)}
  shard |= job.store.put_rows(name, block, rows.fields | beside)
  dtype = {part: array.dtype.name for part, array in rows.fields.items()}
  return {"counts": counts, "shard": shard, "dtype": dtype}


_PASSES = {
  "count": _count,
  "sample": _sample,
  "words": _words,
  "signals": _signals,
  "rows": _rows,
}
