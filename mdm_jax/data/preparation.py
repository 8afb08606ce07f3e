"""Prepares rows from a corpus in blocks: runs the passes and joins the records.

count -> split, blocks -> sample -> tokenizer -> (words -> rarity -> signals ->
ranks -> cut) -> rows

A corpus that fits in memory is one block (`cache.py`), a larger one has many
(`folder.py`). After each pass the records of all blocks are reduced, one by
one, to something of fixed size. So memory depends on the size of a block, not
of the corpus.
"""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from mdm_jax.core.errors import UserError
from mdm_jax.data import (
  corpora,
  journal,
  passes,
  row_checks,
  splits,
  stage_ranks,
)
from mdm_jax.data import tokenizer as tokenizers
from mdm_jax.data.blocks import Block
from mdm_jax.data.passes import Job, Pass
from mdm_jax.data.splits import TRAIN
from mdm_jax.data.stage_rows import row_lengths, spread
from mdm_jax.data.text_files import Tally
from mdm_jax.data.tokenizer import Tokenizer

# A corpus with more 8-grams keeps about this many, by hash. Each takes 3 bytes
# of text or more, so texts up to 50 MB keep all of them.
_NGRAMS = 2**24
_NGRAM_BYTES = 3
SAMPLE_BYTES = 2**25  # of training text, for the tokenizer and the n-gram judge

# Executes a pass over blocks, in any process; returns when all are done.
Run = Callable[[Pass, Job, list[Block]], None]


def run_here(name: Pass, job: Job, found: list[Block]) -> None:
  """Runs a pass over blocks in this process."""
  for block in found:
    passes.run(name, job, block)


def _do(name: Pass, job: Job, found: list[Block], run: Run) -> None:
  # Skipping finished blocks is what resumes an interrupted preparation.
  if left := [b for b in found if not passes.is_done(name, job, b)]:
    run(name, job, left)


# MARK: documents


@dataclasses.dataclass(frozen=True)
class Counted:
  """A corpus whose documents were counted, and how it is split.

  Attributes:
    job: for the passes to come, with the split and the sample's share set.
    blocks: blocks of `data.corpus`, then of the held-out corpora, with hashes.
    tally: files and records read, in all corpora.
    size: UTF-8 bytes of `data.corpus`.
    others: documents that were read but are not in the corpus: those of
      held-out corpora, and those left out because they are in one.
  """

  job: Job
  blocks: list[Block]
  tally: Tally
  size: int
  others: int

  @property
  def corpus(self) -> list[Block]:
    """The blocks of `data.corpus` alone."""
    return [block for block in self.blocks if block.side == TRAIN]


def count(job: Job, found: list[Block], run: Run) -> Counted:
  """Counts the documents of all blocks and decides how they are split.

  Raises:
    UserError: too many records are bad, there is no text, or too little text to
      hold any out.
  """
  # Held-out corpora first: their texts are left out of the corpus' counts.
  apart = [block for block in found if block.side != TRAIN]
  _do("count", job, apart, run)
  _keep_places(job, apart)
  own = [block for block in found if block.side == TRAIN]
  _do("count", job, own, run)
  # Where `max_documents` ends inside a block, that block is counted again.
  own = _limited(job, own)
  _do("count", job, own, run)
  return _counted(dataclasses.replace(job, one_block=len(own) == 1), own, apart)


def _limited(job: Job, found: list[Block]) -> list[Block]:
  """Returns the blocks that hold the first `data.max_documents` documents."""
  left = job.config.data.max_documents
  if left is None:
    return found
  kept = []
  for block in found:
    if left <= 0:
      break
    documents = passes.record("count", job, block)["documents"]
    part = left if left < documents else block.most
    kept.append(dataclasses.replace(block, most=part))
    left -= documents
  return kept


def _keep_places(job: Job, apart: list[Block]) -> None:
  """Stores hashes of the held-out corpora's texts, for `passes._own`."""
  for side in splits.HELD_OUT:
    name = f"places.{side}.npy"
    mine = [block for block in apart if block.side == side]
    if mine and name not in job.store:
      records = (passes.record("count", job, block) for block in mine)
      places = {at for record in records for at in record["places"]}
      job.store[name] = np.array(sorted(places), np.float64)


def _counted(job: Job, own: list[Block], apart: list[Block]) -> Counted:
  sums, size, known = splits.Counts(), 0, []
  tallies: dict[str, Tally] = collections.defaultdict(Tally)
  read: collections.Counter[str] = collections.Counter()
  for block in own + apart:
    record = passes.record("count", job, block)
    tallies[block.side].add(Tally(**record["tally"]))
    read[block.side] += record["documents"]
    known.append(dataclasses.replace(block, sha256=record["sha256"]))
    if block.side == TRAIN:
      size += record["bytes"]
      sums.add(splits.Counts(**record["counts"]))
  total = Tally()
  # Each corpus must be sound by itself; the log adds them up.
  for side, (field, corpus) in corpora.sources(job.config.data).items():
    corpora.check(corpus, field, tallies[side], read[side])
    total.add(tallies[side])
  if not sums.documents:
    corpus = job.config.data.corpus
    raise UserError(
      f"data.corpus={corpus!r}: all of its text is in a held-out corpus"
    )
  job = dataclasses.replace(job, split=splits.decide(sums, job.shares))
  # A single block is in memory anyway: no sample, and all of its 8-grams.
  if not job.one_block:
    job = dataclasses.replace(
      job,
      sampled=min(SAMPLE_BYTES / size, 1.0),
      copied=min(_NGRAMS * _NGRAM_BYTES / size, 1.0),
    )
  return Counted(job, known, total, size, read.total() - sums.documents)


# MARK: training text


def sample(counted: Counted, run: Run) -> tuple[list[str], str, dict[str, Any]]:
  """Returns the training text, or a sample of it if the corpus is large.

  Returns:
    Texts; the characters of the whole corpus, if the texts are a sample and the
    tokenizer needs them; and the split's summary for the manifest.
  """
  job = counted.job
  _do("sample", job, counted.blocks, run)
  sizes = splits.sizes(splits.no_documents())
  texts: list[str] = []
  characters: set[str] = set()
  room = SAMPLE_BYTES
  for block in counted.blocks:
    record = passes.record("sample", job, block)
    for what, by_side in record["sizes"].items():
      for side, size in by_side.items():
        sizes[what][side] += size
    characters.update(record["characters"])
    # The share to sample is right on average only; `room` is the hard limit.
    for text in record["texts"] if room > 0 or job.sampled >= 1 else ():
      texts.append(text)
      room -= len(text.encode())
  apart = [s for s in splits.HELD_OUT if s not in job.shares.wanted]
  # Documents used from held-out corpora; the rest of `others` was left out.
  kept = sum(sizes["documents"][side] for side in apart)
  split = splits.summary(job.split, sizes, counted.others - kept)
  return texts, "".join(sorted(characters)), split


def _tokenizer(
  job: Job, texts: list[str], given: Tokenizer | None
) -> Tokenizer:
  """Returns the folder's tokenizer, built and saved first if it has none."""
  folder = job.store.folder
  if not tokenizers.is_saved_in(folder):
    tokenizer = given or tokenizers.build(job.config.tokenizer, texts)
    journal.put(folder / tokenizer.filename, tokenizer.content)
  # Rows are made with the saved file, from now or an interrupted run.
  return tokenizers.load_tokenizer(folder)


# MARK: rows


def _join(what: Callable, job: Job, own: list[Block]) -> None:
  """Reduces the records of all blocks, for every stage that ranks its units."""
  for name in job.ranked:
    record = f"{what.__name__}.{name}.npy"
    if record not in job.store:
      job.store[record] = what(job, own, name)


@dataclasses.dataclass(frozen=True)
class Made:
  """What `make` has written to the store's folder.

  Attributes:
    counted: the corpus.
    tokenizer: of the rows.
    texts: training text, or a sample of it.
    manifest: entries of the manifest, as plain values.
    dtype: {rows: {field: dtype}}, as `{"stage_1": {"tokens": "uint16"}}`.
    shards: {rows: index lines of the blocks}.
  """

  counted: Counted
  tokenizer: Tokenizer
  texts: list[str]
  manifest: dict[str, Any]
  dtype: dict[str, dict[str, str]]
  shards: dict[str, list[dict[str, Any]]]


def make(
  job: Job, found: list[Block], given: Tokenizer | None, run: Run
) -> Made:
  """Makes the tokenizer, the rows of every stage, and the held-out rows.

  Args:
    job: config and store; what follows from counting is set here.
    found: blocks of `data.corpus`, then those of the held-out corpora.
    given: tokenizer to use instead of the one the config describes.
    run: executes a pass over blocks.

  Raises:
    UserError: the corpus and a stage's unit don't fit, or a pass fails.
  """
  row_checks.check_units(job.config)
  counted = count(job, found, run)
  job, own = counted.job, counted.corpus
  texts, characters, split = sample(counted, run)
  learnt = [*texts, characters] if characters else texts
  tokenizer = _tokenizer(job, learnt, given)
  if job.ranked:
    _do("words", job, own, run)
    _join(stage_ranks.rarity, job, own)
    _do("signals", job, own, run)
    _join(stage_ranks.ranks, job, own)
    _join(stage_ranks.cuts, job, own)
  _do("rows", job, counted.blocks, run)
  manifest = {
    "documents": split["documents"] | {"bad": counted.tally.bad},
    "split": split,
    "tokenizer": {
      "kind": tokenizer.kind,
      "sha256": tokenizer.sha256,
      "vocab_size": tokenizer.vocab.size,
    },
  }
  more, dtype, listed = _joined(counted)
  return Made(counted, tokenizer, texts, manifest | more, dtype, listed)


def _joined(
  counted: Counted,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
  """Joins the "rows" records of all blocks to the last fields of `Made`."""
  # Examples come from a few blocks only, so their number stays small.
  shown = {block.number for block in spread(counted.blocks)}
  rows: dict[str, Any] = {name: {} for name in row_lengths(counted.job.config)}
  dtype, listed = {}, collections.defaultdict(list)
  examples = collections.defaultdict(list)
  unread: collections.Counter[str] = collections.Counter()
  for block in counted.blocks:
    record = dict(passes.record("rows", counted.job, block))
    unread.update(record.pop("text"))
    for name, part in record.items():
      dtype[name] = part["dtype"]
      listed[name].append(part["shard"])
      rows[name] = _merge(rows[name], part["counts"])
      if block.number in shown:
        examples[name] += enumerate(part["counts"]["examples"])
  for name, counts in rows.items():
    if counts["difficulty"]:  # by position in their block: easy ones first
      examples[name].sort(key=lambda example: example[0])
    counts["examples"] = [text for _, text in spread(examples[name])]
  return {"rows": rows, "text": dict(unread)}, dtype, listed


def _merge(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
  """Adds up the counts of two sets of blocks; `most_*` take the maximum."""
  if not a:
    return b
  join = lambda k: max(a[k], b[k]) if k.startswith("most_") else a[k] + b[k]
  merged = {k: join(k) for k in a if isinstance(a[k], int)}
  merged["difficulty"] = b["difficulty"]
  if b["difficulty"]:
    both = a["difficulty"], b["difficulty"]
    sums = np.sum([part["histogram"] for part in both], axis=0).tolist()
    cut = max(part["cut"] for part in both)
    merged["difficulty"] = {"histogram": sums, "cut": cut}
  return merged
