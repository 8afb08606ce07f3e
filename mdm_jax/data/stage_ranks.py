"""How difficult the units of all blocks are, among each other.

Each function joins what a pass has recorded of every block into one file.
"""

import numpy as np

from mdm_jax.data import journal, passes, ranking, segments
from mdm_jax.data.blocks import Block
from mdm_jax.data.passes import Job


def write_rarity(job: Job, found: list[Block]) -> None:
  """Adds up in how many units each word is, over the whole corpus."""
  for name in job.ranked:
    path = job.work / f"rarity.{name}.npy"
    if path.exists():
      continue
    frequency, units = np.zeros(passes.WORD_BINS, np.int64), 0
    for block in found:
      record = journal.get_arrays(job.record("words", block))
      frequency[record[f"{name}.bins"]] += record[f"{name}.counts"]
      units += int(record[f"{name}.units"])
    journal.put_array(path, segments.rarity(frequency, max(units, 1)))


def write_ranks(job: Job, found: list[Block], name: str) -> None:
  """Finds the percentile rank of every value of the signals."""
  path = job.work / f"ranks.{name}.npy"
  if path.exists():
    return
  counts = np.zeros((segments.SIGNALS, ranking.BINS), np.int64)
  for block in found:
    record = journal.get_arrays(job.record("signals", block))
    counts += ranking.count(record[name])
  journal.put_array(path, ranking.ranks(counts))


def write_cuts(job: Job, found: list[Block], name: str) -> None:
  """Finds the level of the last unit that is kept, and each block's share."""
  path = job.work / f"cuts.{name}.npy"
  if path.exists():
    return
  levels = lambda: (
    ranking.levels(passes.difficulty(job, name, block)) for block in found
  )
  counts = np.zeros(ranking.BINS, np.int64)
  for level in levels():
    counts += np.bincount(level, minlength=ranking.BINS)
  wanted = segments.share(job.ranked[name].easiest, int(counts.sum()))
  last, most = ranking.find_level(counts, wanted)
  tied = [int((level == last).sum()) for level in levels()]
  quotas = ranking.quotas(most, tied)
  journal.put_array(path, np.stack([np.full_like(quotas, last), quotas], 1))
