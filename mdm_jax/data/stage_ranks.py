"""Ranks units across blocks, by joining the records of all blocks."""

import numpy as np

from mdm_jax.data import passes, ranking, segments
from mdm_jax.data.blocks import Block
from mdm_jax.data.passes import Job


def rarity(job: Job, found: list[Block], name: str) -> np.ndarray:
  """Returns each word bin's inverse document frequency over all blocks."""
  frequency, units = np.zeros(passes.WORD_BINS, np.int64), 0
  for block in found:
    words = passes.record("words", job, block)
    # Bins are distinct within a block, so += adds every count.
    frequency[words[f"{name}.bins"]] += words[f"{name}.counts"]
    units += int(words[f"{name}.units"])
  return segments.rarity(frequency, max(units, 1))


def ranks(job: Job, found: list[Block], name: str) -> np.ndarray:
  """Returns the percentile rank of each bin [S, K], over all blocks."""
  counts = np.zeros((segments.SIGNALS, ranking.BINS), np.int64)
  for block in found:
    counts += ranking.count(passes.record("signals", job, block)[name])
  return ranking.ranks(counts)


def cuts(job: Job, found: list[Block], name: str) -> np.ndarray:
  """Returns each block's last level and quota (`ranking.kept`) [blocks, 2]."""
  # A generator made anew for each of two sweeps: one block in memory at a time.
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
  return np.stack([np.full_like(quotas, last), quotas], 1)
