"""What is done with one block of a corpus, pass by pass.

Each pass is a function of the block, the config and what earlier passes kept;
it returns one record. So blocks can be done by anyone, anywhere, in any order,
and more than once. This is the only way from text to rows: of a corpus in
memory there is one block.

count    documents, bytes, hashes; bad records
sample   how much is on each side; text for the tokenizer and the judge
words    in how many units a word is, for stages that select the easiest
signals  what the difficulty of each unit is a mean of, in bins
rows     the rows of every stage and of the held-out texts

`words` and `signals` are for several blocks. In one, units are ranked among
each other in the last pass, exactly.
"""

import dataclasses
import zlib
from typing import Any, Literal

import numpy as np

from mdm_jax.core import modules
from mdm_jax.data import (
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
from mdm_jax.data.ranking import Cut
from mdm_jax.data.rows import Rows
from mdm_jax.data.segments import Selection, Unit, UnitWords
from mdm_jax.data.splits import HELD_OUT, TEST, TRAIN, Shares, Sides, Split
from mdm_jax.data.stage_rows import make_held_out, make_rows, stage_name
from mdm_jax.data.stores import Store
from mdm_jax.data.text_files import Document

WORD_BINS = 2**22  # words are counted by a hash of so many values
_PIECE = 2**16  # characters that are sampled together

Pass = Literal["count", "sample", "words", "signals", "rows"]


@dataclasses.dataclass(frozen=True)
class Job:
  """What all blocks share.

  Attributes:
    config: what rows depend on.
    store: has the documents, and keeps what is made of them.
    split: which documents are held out, once they are counted.
    sampled: share of the train split that the sample is.
    copied: share of its 8-grams that are kept, where that is not all of it.
    one_block: whether the corpus is a single one.
  """

  config: RowsConfig
  store: Store
  split: Split | None = None
  sampled: float = 1.0
  copied: float = 1.0
  one_block: bool = False

  @property
  def shares(self) -> Shares:
    """What is held out of the corpus."""
    return splits.shares_of(self.config.data)

  @property
  def ranked(self) -> dict[str, StageConfig]:
    """The stages whose units are ranked over several blocks, by their names."""
    stages = enumerate(() if self.one_block else self.config.stages)
    return {
      stage_name(i): stage
      for i, stage in stages
      if stage.unit != "paragraphs" and stage.easiest < 1
    }


def _name(name: Pass, block: Block) -> str:
  """Returns the name of the record that says that a pass has done a block."""
  part = "" if block.most is None else f".first_{block.most}"
  side = "" if block.side == TRAIN else f".{block.side}"
  suffix = "npz" if name in ("words", "signals") else "json"
  return f"{name}{side}.{block.number:06d}{part}.{suffix}"


def ngrams_name(block: Block) -> str:
  """Returns the name of the 8-grams of a block, of a larger corpus."""
  return f"ngrams.{block.number:06d}.npy"


def is_done(name: Pass, job: Job, block: Block) -> bool:
  """Whether a pass has done a block."""
  return _name(name, block) in job.store


def run(name: Pass, job: Job, block: Block) -> None:
  """Does a pass over a block, if it is not done."""
  modules.load(job.config.modules)  # this process may know none of them yet
  if not is_done(name, job, block):
    job.store[_name(name, block)] = _PASSES[name](job, block)


def record(name: Pass, job: Job, block: Block) -> dict[str, Any]:
  """Returns what a pass has kept of a block."""
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
    found["places"] = sorted({splits.place(d.text) for d in documents})
  return found


def _own(job: Job, block: Block, documents: list[Document]) -> list[Document]:
  """Returns the documents that were not given for a side that comes first."""
  first = {TRAIN: HELD_OUT, TEST: ()}.get(block.side, (TEST,))
  given = (side for side in first if side not in job.shares.wanted)
  places = (job.store[f"places.{side}.npy"] for side in given)
  held = {at for known in places for at in known.tolist()}
  return splits.without(documents, held)


def divide(job: Job, block: Block) -> Sides:
  """Returns the sides of a block, once the split is decided."""
  own = _own(job, block, job.store.read(block)[0])
  if block.side == TRAIN:
    return job.split(own)
  return dataclasses.replace(Sides([], [], []), **{block.side: own})


def _train_units(job: Job, block: Block, stage: StageConfig) -> list[Unit]:
  texts = [document.text for document in divide(job, block).train]
  return segments.units(texts, stage, job.config.data.language)


def _sample(job: Job, block: Block) -> dict[str, Any]:
  sides = divide(job, block)
  texts = [document.text for document in sides.train]
  characters = set()
  if job.sampled < 1:  # else the texts themselves are all there is to look at
    found = ngrams.of(texts, job.copied)
    job.store[ngrams_name(block)] = found.hashes
    if job.config.tokenizer.kind == "char":
      characters = set().union(*texts)
  return {
    "sizes": sides.count(),
    "texts": [p for text in texts for p in _pieces(text, job.sampled)],
    "characters": "".join(sorted(characters)),
  }


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


def _words(job: Job, block: Block) -> dict[str, np.ndarray]:
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
  """Returns the units that a stage keeps (None: all, which are not ranked)."""
  name, stage = stage_name(index), job.config.stages[index]
  if job.one_block and stage.unit != "paragraphs":
    return segments.easiest(units, stage.easiest, job.config.data.language)
  if name not in job.ranked:
    return None
  scores = difficulty(job, name, block)
  kept = np.flatnonzero(_cut(job, name, block).keeps(ranking.levels(scores)))
  return Selection([units[i] for i in kept], scores[kept], scores)


def difficulty(job: Job, name: str, block: Block) -> np.ndarray:
  """Returns the difficulty of a block's units among those of all blocks."""
  bins = record("signals", job, block)[name]
  return ranking.difficulty(bins, job.store[f"ranks.{name}.npy"])


def _cut(job: Job, name: str, block: Block) -> Cut:
  cuts = job.store[f"cuts.{name}.npy"]
  return Cut(*cuts[block.number].tolist())


# MARK: rows


def _rows(job: Job, block: Block) -> dict[str, Any]:
  tokenizer = tokenizers.load_tokenizer(job.store.folder)
  sides = divide(job, block)
  train = [document.text for document in sides.train]
  coverage, language = Coverage(train), job.config.data.language
  made = {}
  for i, stage in enumerate(job.config.stages if block.side == TRAIN else ()):
    found = segments.find(train, stage, language)
    selection = _select(job, i, block, found.units)
    rows, counts, read = make_rows(found, selection, stage, tokenizer)
    coverage.add(read)
    name = stage_name(i)
    made[name] = _put_rows(job, block, name, rows, counts)
  made["text"] = coverage.counts()
  for side in job.shares.wanted if block.side == TRAIN else (block.side,):
    texts = [document.text for document in sides[side]]
    held, counts = make_held_out(texts, job.config, tokenizer)
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
  """Writes rows of a block; returns their counts and the line of an index."""
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
