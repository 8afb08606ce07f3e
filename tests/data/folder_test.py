"""Rows prepared in blocks equal those made in memory, whatever interrupts."""

import dataclasses
import json

import numpy as np
import prepare_harness as harness
import pytest
from absl import logging

from mdm_jax.core import distributed
from mdm_jax.core.errors import UserError
from mdm_jax.data import inputs, ngrams, preparation, prepared
from mdm_jax.data.config import StageConfig
from mdm_jax.data.prepared import prepare, training_ngrams, training_texts
from mdm_jax.evaluation.text_metrics import copied_share

# Where nothing is about difficulty: its passes take longest.
ALL = {"stage__easiest": 1.0}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A folder with texts, and those prepared once."""
  folder = tmp_path_factory.mktemp("prepare")
  texts = harness.write_texts(folder / "texts")
  harness.fill(harness.make_config(texts, folder / "rows"))
  return folder


@pytest.fixture
def config(place):
  """Of what is prepared."""
  return harness.make_config(place / "texts", place / "rows")


def _fresh(place, tmp_path, **changes):
  return harness.make_config(place / "texts", tmp_path / "rows", **changes)


def _in_memory(config, tmp_path):
  data = dataclasses.replace(
    config.data, prepared="", cache_dir=str(tmp_path / "cache")
  )
  return dataclasses.replace(config, data=data)


def _error(function, *args):
  with pytest.raises(UserError) as caught:
    function(*args)
  message = str(caught.value)
  assert "\n" not in message
  return message


def _same_held_out(blocks, memory):
  """The same texts are held out, and of the same documents."""
  for side in ("validation", "test"):
    a, b = getattr(blocks, side), getattr(memory, side)
    assert harness.sequences(a.rows) == harness.sequences(b.rows)
    by_document = [np.bincount(h.texts[:, 2], h.texts[:, 3]) for h in (a, b)]
    assert by_document[0].tolist() == by_document[1].tolist()
  assert blocks.manifest["split"] == memory.manifest["split"]


# MARK: the same as in memory


UNITS = [
  {"unit": "sentences", "length": 48, "min_words": 3, "easiest": 0.5},
  {"unit": "pairs", "length": 96},
  {"unit": "lines", "length": 40, "easiest": 0.7, "max_words": 12},
  {"unit": "paragraphs", "length": 64},
]


def _given(tmp_path):
  """Writes text for a side, one of the corpus's own among it."""
  given = tmp_path / "given"
  given.mkdir()
  for i, text in enumerate([harness.TOPICS[0], "of its own\n" * 40]):
    (given / f"{i}.txt").write_text(text, newline="")
  return f"text:{given}/*.txt"


def _arrays(folder, number):
  """Returns the bytes of all rows, by what they are."""
  return {
    path.name.replace(number, ""): path.read_bytes()
    for path in folder.glob("*.npy")
  }


@pytest.mark.parametrize(
  "kind, what",
  [
    ("sentencepiece", "whole"),
    ("sentencepiece", "given for a side"),
    ("char", "whole"),
    ("char", "bad records"),
    ("char", "the first documents"),
    ("byte", "given for a side"),
  ],
)
def test_one_block_gives_the_same_bits_as_memory(place, tmp_path, kind, what):
  changes = {"tokenizer__kind": kind, "data__block_megabytes": 100.0}
  texts = place / "texts"
  if what == "given for a side":
    changes["data__test_corpus"] = _given(tmp_path)
  if what in ("bad records", "the first documents"):
    texts = harness.write_texts(tmp_path / "texts")
    (texts / "c.txt").write_bytes(b"\xff")
  if what == "bad records":
    changes["data__on_bad_record"] = "skip"
  if what == "the first documents":  # none of them is bad
    changes["data__max_documents"] = 17
  config = harness.make_config(texts, tmp_path / "rows", **changes)
  stages = tuple(StageConfig(**stage) for stage in UNITS)
  config = dataclasses.replace(config, stages=stages)
  harness.fill(config)
  block = prepare(config.rows)
  memory = prepare(_in_memory(config, tmp_path).rows)
  (cache,) = (tmp_path / "cache").iterdir()
  rows = _arrays(tmp_path / "rows", ".000000")
  assert rows == _arrays(cache, "no number") and len(rows) == 14
  assert block.tokenizer.content == memory.tokenizer.content
  for name in ("rows", "split", "text", "tokenizer"):
    assert block.manifest[name] == memory.manifest[name]
  assert memory.manifest["documents"].items() <= (
    block.manifest["documents"].items()
  )
  bad = int(what == "bad records")
  assert memory.manifest["documents"]["bad"] == bad
  assert training_texts(config.rows) == (
    training_texts(_in_memory(config, tmp_path).rows)
  )


def test_blocks_are_several(place):
  manifest = json.loads((place / "rows" / "manifest.json").read_text())
  assert manifest["blocks"]["count"] > 4


@pytest.mark.parametrize("kind", ["sentencepiece", "char"])
def test_rows_hold_what_those_made_in_memory_hold(place, tmp_path, kind):
  config = _fresh(place, tmp_path, tokenizer__kind=kind, **ALL)
  harness.fill(config)
  blocks, memory = (
    prepare(config.rows),
    prepare(_in_memory(config, tmp_path).rows),
  )
  assert blocks.tokenizer.sha256 == memory.tokenizer.sha256
  _same_held_out(blocks, memory)
  for a, b in zip(blocks.stages[1:], memory.stages[1:], strict=True):
    assert harness.sequences(a) == harness.sequences(b)
  for name in ("stage_2", "stage_3", "validation", "test"):
    a, b = blocks.manifest["rows"][name], memory.manifest["rows"][name]
    for count in ("units_found", "texts_too_long", "tokens"):
      assert a[count] == b[count]
    # Texts share rows only within their block.
    assert 0 <= a["rows"] - b["rows"] <= 2 * blocks.manifest["blocks"]["count"]
  for side in ("train", "validation", "test", "bad"):
    assert (
      blocks.manifest["documents"][side] == memory.manifest["documents"][side]
    )


def test_the_easiest_are_those_of_the_whole_corpus(config, tmp_path):
  """All but a hundredth of them are: ranks are counted in bins."""
  blocks, memory = (
    prepare(config.rows),
    prepare(_in_memory(config, tmp_path).rows),
  )
  a, b = (d.manifest["rows"]["stage_1"] for d in (blocks, memory))
  assert a["units_selected"] == b["units_selected"] == -(-a["units_found"] // 2)
  assert abs(a["difficulty"]["cut"] - b["difficulty"]["cut"]) < 0.002
  assert sum(a["difficulty"]["histogram"]) == b["units_found"]
  one, other = (harness.sequences(d.stages[0]) for d in (blocks, memory))
  assert (one & other).total() >= 0.99 * max(one.total(), other.total())


def test_a_tiny_share_holds_out_the_same_text(place, tmp_path):
  config = _fresh(
    place, tmp_path, data__eval_fraction=1e-9, data__test_fraction=0, **ALL
  )
  harness.fill(config)
  blocks, memory = (
    prepare(config.rows),
    prepare(_in_memory(config, tmp_path).rows),
  )
  assert blocks.manifest["documents"]["validation"] == 1
  assert blocks.manifest["documents"]["test"] == 1
  _same_held_out(blocks, memory)


def test_the_first_documents_are_those_of_memory(place, tmp_path):
  config = _fresh(place, tmp_path, data__max_documents=14, **ALL)
  split = harness.fill(config)["split"]
  counts = split["documents"].values()  # the way is this Python's pages' own
  assert (max if split["way"] == "ends" else sum)(counts) == 14
  blocks, memory = (
    prepare(config.rows),
    prepare(_in_memory(config, tmp_path).rows),
  )
  for a, b in zip(blocks.stages[1:], memory.stages[1:], strict=True):
    assert harness.sequences(a) == harness.sequences(b)


def test_the_judge_reads_the_same_text(config, tmp_path):
  memory = training_texts(_in_memory(config, tmp_path).rows)
  assert sorted(training_texts(config.rows)) == sorted(memory)


def test_of_a_large_corpus_the_judge_reads_a_sample(
  place, tmp_path, monkeypatch
):
  monkeypatch.setattr(preparation, "SAMPLE_BYTES", 20_000)
  config = _fresh(place, tmp_path, **ALL)
  harness.fill(config)
  texts = training_texts(config.rows)
  size = sum(len(text.encode()) for text in texts)
  assert 5_000 < size < 30_000
  everything = training_texts(_in_memory(config, tmp_path).rows)
  assert set(texts) < set(everything)
  assert texts != everything[: len(texts)], "the first ones are no sample"


@pytest.mark.parametrize("kept", [2**24, 3_000])
def test_found_A9_copies_of_any_part_of_a_large_corpus_are_seen(
  place, tmp_path, monkeypatch, kept
):
  """Its sample alone would show a third of them."""
  monkeypatch.setattr(preparation, "SAMPLE_BYTES", 5_000)
  monkeypatch.setattr(preparation, "_NGRAMS", kept)
  config = _fresh(place, tmp_path, **ALL)
  harness.fill(config)
  found = training_ngrams(config.rows, training_texts(config.rows))
  assert (found.share == 1) == (kept == 2**24)
  index, texts = (
    found,
    training_texts(_in_memory(config, tmp_path).rows),
  )
  every = len(ngrams.of(texts).hashes)
  assert abs(len(found.hashes) / found.share - every) < 0.1 * every
  assert copied_share(index, texts).value == 1
  whole, sample = ngrams.of(texts), ngrams.of(training_texts(config.rows))
  assert copied_share(sample, texts).value < 0.5
  # Some other text, and some that is copied.
  mixed = [f"{text[:600]} {text[600:1200][::-1]}" for text in texts]
  measured, exact = copied_share(index, mixed), copied_share(whole, mixed)
  assert 0.3 < exact.value < 0.7
  assert abs(measured.value - exact.value) <= 3 * measured.stderr * (kept < 1e6)


# MARK: stopped and gone on with


class _Death(BaseException):
  pass


@pytest.mark.parametrize("steps", [1, 9, 20, 26])
def test_what_was_stopped_ends_with_the_same_bytes(place, tmp_path, steps):
  config, done = _fresh(place, tmp_path), []

  def die(name, job, blocks):
    for block in blocks:
      if len(done) == steps:
        raise _Death
      harness.run_here(name, job, [block])
      done.append((name, block.number))

  def go_on(name, job, blocks):
    again = {(name, block.number) for block in blocks} & set(done)
    assert not again, "made again"
    harness.run_here(name, job, blocks)

  with pytest.raises(_Death):
    harness.fill(config, die)
  assert "no finished preparation" in _error(prepare, config.rows)
  (tmp_path / "rows" / "tmp-half").write_bytes(b"half")
  harness.fill(config, go_on)
  assert harness.contents(tmp_path / "rows") == harness.contents(place / "rows")


def test_what_is_done_is_not_done_again(place, config):
  def refuse(*_):
    raise AssertionError("made again")

  before = harness.contents(place / "rows")
  harness.fill(config, refuse)
  assert before == harness.contents(place / "rows")


def _begun(config):
  def die(name, job, blocks):
    if name == "rows":
      raise _Death
    harness.run_here(name, job, blocks)

  with pytest.raises(_Death):
    harness.fill(config, die)


def test_another_size_of_blocks_does_not_go_on(place, tmp_path):
  config = _fresh(place, tmp_path)
  _begun(config)
  other = _fresh(place, tmp_path, data__block_megabytes=1.0)
  message = _error(harness.fill, other)
  assert "data.block_megabytes is 0.006, here 1.0" in message


@pytest.mark.parametrize("seen", [True, False])
def test_a_text_that_changes_meanwhile_is_reported(tmp_path, seen):
  texts = harness.write_texts(tmp_path / "texts")
  config = harness.make_config(texts, tmp_path / "rows", **ALL)
  path = texts / "a03.txt"

  def change(name, job, blocks):
    if name == "rows":
      path.write_text(path.read_text().replace("e", "E", 1), newline="")
      if seen:
        raise _Death
    harness.run_here(name, job, blocks)

  if seen:
    with pytest.raises(_Death):
      harness.fill(config, change)
    message = _error(harness.fill, config)
  else:
    message = _error(harness.fill, config, change)
  told = "have changed since" if seen else "has changed while"
  assert told in message and "delete" in message


def test_two_at_once_are_refused(place, tmp_path):
  config = _fresh(place, tmp_path, **ALL)

  def overtaken(name, job, blocks):
    raise RuntimeError(_error(harness.fill, config))

  with pytest.raises(RuntimeError, match="another process is preparing"):
    harness.fill(config, overtaken)
  harness.fill(config)


# MARK: what can't be


@pytest.mark.parametrize(
  "changes, told",
  [
    ({"tokenizer__vocab_size": 420}, "tokenizer.vocab_size is 400, here 420"),
    ({"data__eval_fraction": 0.3}, "eval_fraction is 0.25, here 0.3"),
    ({"stage__length": 40}, "stages[0].length is 48, here 40"),
    ({"stage__easiest": 0.4}, "stages[0].easiest is 0.5, here 0.4"),
    ({"data__max_documents": 9}, "data.max_documents is None, here 9"),
    ({"data__corpus": "sotu"}, "data.corpus is 'text:"),
  ],
)
def test_a_config_that_does_not_fit_is_reported(place, changes, told):
  before = harness.contents(place / "rows")
  config = harness.make_config(place / "texts", place / "rows", **changes)
  assert told in _error(prepare, config.rows)
  assert told in _error(harness.fill, config)
  assert before == harness.contents(place / "rows")


@pytest.mark.parametrize("when", ["begun", "done"])
def test_a_corpus_that_moved_is_the_same(tmp_path, monkeypatch, when):
  texts = harness.write_texts(tmp_path / "texts")
  config = harness.make_config(texts, tmp_path / "rows", **ALL)
  told = []
  monkeypatch.setattr(logging, "warning", lambda m, *a: told.append(m % a))
  _begun(config) if when == "begun" else harness.fill(config)
  moved = texts.rename(tmp_path / "moved")
  assert harness.make_config(texts, tmp_path / "rows", **ALL) == config
  config = harness.make_config(moved, tmp_path / "rows", **ALL)
  harness.fill(config)
  assert len(prepare(config.rows).stages[0])
  assert bool(told) == (when == "done")
  if told:
    assert "the same files under another name: data.corpus is" in told[0]
    (moved / "a03.txt").write_text("another text")
    assert "data.corpus is 'text:" in _error(prepare, config.rows)


def test_rows_of_another_format_are_reported(place, tmp_path):
  config, folder = _copy(place, tmp_path)
  manifest = json.loads((folder / "manifest.json").read_text())
  manifest["inputs"]["format"] = 1
  (folder / "manifest.json").write_text(json.dumps(manifest))
  assert "by another version (format 1, not 3)" in _error(prepare, config.rows)


def test_fields_that_shape_no_row_may_differ(place):
  changes = {"stage__epochs": 3, "data__batch_size": 1}
  config = harness.make_config(place / "texts", place / "rows", **changes)
  assert len(prepare(config.rows).stages[0])


@pytest.mark.parametrize("copies", [1, 2])
def test_a_single_text_gives_its_end_as_in_memory(tmp_path, copies):
  texts = tmp_path / "texts"
  texts.mkdir()
  for i in range(copies):
    (texts / f"{i}.txt").write_text("\n".join(harness.TOPICS))
  config = harness.make_config(texts, tmp_path / "rows", **ALL)
  harness.fill(config)
  blocks, memory = (
    prepare(config.rows),
    prepare(_in_memory(config, tmp_path).rows),
  )
  assert blocks.manifest["split"]["way"] == "ends"
  _same_held_out(blocks, memory)


def test_text_that_is_given_for_a_side_is_as_in_memory(place, tmp_path):
  changes = {"data__test_corpus": _given(tmp_path), **ALL}
  config = _fresh(place, tmp_path, **changes)
  harness.fill(config)
  blocks, memory = (
    prepare(config.rows),
    prepare(_in_memory(config, tmp_path).rows),
  )
  _same_held_out(blocks, memory)
  split = blocks.manifest["split"]
  assert split["given"] == ["test"] and split["documents"]["test"] == 2
  assert split["repeated"] == 1
  for a, b in zip(blocks.stages[1:], memory.stages[1:], strict=True):
    assert harness.sequences(a) == harness.sequences(b)


def test_a_corpus_without_files_is_refused(place, tmp_path):
  config = _fresh(place, tmp_path, data__corpus="python_docs")
  assert "can't be prepared in blocks" in _error(harness.fill, config)


def test_a_bad_record_is_reported_with_its_line(tmp_path):
  texts = harness.write_texts(tmp_path / "texts")
  lines = (texts / "b.jsonl").read_text().splitlines()
  lines[9] = '{"text": 3}'
  (texts / "b.jsonl").write_text("\n".join(lines) + "\n")
  config = harness.make_config(texts, tmp_path / "rows", **ALL)
  assert "b.jsonl, line 10: no" in _error(harness.fill, config)
  skip = harness.make_config(
    texts, tmp_path / "skipped", data__on_bad_record="skip", **ALL
  )
  manifest = harness.fill(skip)
  assert manifest["documents"]["bad"] == 1


# MARK: damage, and who looks for it


def _copy(place, tmp_path):
  folder = tmp_path / "rows"
  folder.mkdir()
  for path in (place / "rows").iterdir():
    (folder / path.name).write_bytes(path.read_bytes())
  return harness.make_config(place / "texts", folder), folder


def _damage(path, kind):
  content = bytearray(path.read_bytes())
  if kind == "flip":
    content[-1] ^= 1
    path.write_bytes(content)
  elif kind == "cut":
    path.write_bytes(content[:-1])
  else:
    path.unlink()


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
@pytest.mark.parametrize(
  "name",
  [
    *(
      "stage_2.000003.tokens.npy",
      "test.000001.segments.npy",
      "validation.000002.texts.npy",
    ),
    *("tokenizer.model", "stage_1.shards.json", "training_sample.json"),
  ],
)
def test_damage_is_found(place, tmp_path, name, damage):
  config, folder = _copy(place, tmp_path)
  _damage(folder / name, damage)
  message = _error(prepare, config.rows)
  assert name in message and "delete the folder" in message


@pytest.mark.parametrize(
  "content, told",
  [
    ("[]", "was not written by --mode=prepare"),
    ("{", "is not valid JSON"),
    ('{"inputs": 3}', "with another config"),
    ('{"inputs": {"format": 3}}', "with another config"),
  ],
)
def test_a_manifest_of_something_else_is_reported(
  place, tmp_path, content, told
):
  config, folder = _copy(place, tmp_path)
  (folder / "manifest.json").write_text(content)
  assert told in _error(prepare, config.rows)
  assert told in _error(harness.fill, config)


@pytest.mark.parametrize("content", ["[]", '{"length": 64}', '{"length": 1}x'])
def test_an_index_of_something_else_is_reported(place, tmp_path, content):
  config, folder = _copy(place, tmp_path)
  path = folder / "stage_2.shards.json"
  path.write_text(content)
  manifest = json.loads((folder / "manifest.json").read_text())
  manifest["files"][path.name] = inputs.file_sha256(path)
  (folder / "manifest.json").write_text(json.dumps(manifest))
  assert "stage_2.shards.json is" in _error(prepare, config.rows)


def test_each_process_reads_its_own_shards(place, tmp_path, monkeypatch):
  """A flipped bit is found by one of three, a short file by each."""
  config, folder = _copy(place, tmp_path)
  _damage(folder / "stage_2.000003.tokens.npy", "flip")
  told = []
  monkeypatch.setattr(distributed, "count", lambda: 3)
  monkeypatch.setattr(distributed, "agree", lambda _, value: told.append(value))

  def look():
    told.clear()
    for index in range(3):
      monkeypatch.setattr(distributed, "index", lambda i=index: i)
      try:
        prepare(config.rows)
      except UserError as error:
        assert str(error) == told[-1]
    return [value is not None for value in told]

  assert sorted(look()) == [False, False, True]
  for damage in ("cut", "remove"):  # seen without reading
    _damage(folder / "stage_3.000001.tokens.npy", damage)
    assert look() == [True, True, True]


def test_a_process_reads_no_more_than_its_share(place, monkeypatch, config):
  read = []
  whole = prepared.Index.damaged

  def damaged(index, number, vocab):
    read.append((index.name, number))
    return whole(index, number, vocab)

  monkeypatch.setattr(prepared.Index, "damaged", damaged)
  monkeypatch.setattr(distributed, "count", lambda: 4)
  monkeypatch.setattr(distributed, "agree", lambda *_: None)
  parts = []
  for index in range(4):
    monkeypatch.setattr(distributed, "index", lambda i=index: i)
    prepare(config.rows)
    parts.append(set(read))
    read.clear()
  shards = [p.name for p in (place / "rows").glob("*.tokens.npy")]
  assert sum(map(len, parts)) == len(set.union(*parts)) == len(shards)
  assert max(map(len, parts)) - min(map(len, parts)) <= 1


# MARK: reading


def test_rows_are_those_of_the_shards(config, place):
  data = prepare(config.rows)
  validation = data.validation.rows
  for name, rows in [("stage_3", data.stages[2]), ("validation", validation)]:
    for part in ("tokens", "segments"):
      files = sorted((place / "rows").glob(f"{name}.0*.{part}.npy"))
      whole = np.concatenate(
        [np.load(path, allow_pickle=False) for path in files]
      )
      found = getattr(rows, part)
      assert found.shape == whole.shape and found.dtype == whole.dtype
      assert (np.array(list(found)) == whole).all()
      assert (found[:] == whole).all()
      grid = np.random.default_rng(0).integers(0, len(whole), (3, 5))
      assert (found[grid] == whole[grid]).all()
      assert (found[-1] == whole[-1]).all() and found[0].shape == (64,)
      assert (found[2:9] == whole[2:9]).all()
      with pytest.raises(IndexError):
        found[len(whole)]


def test_only_shards_that_are_asked_for_are_mapped(config):
  tokens = prepare(config.rows).stages[2].tokens
  tokens[np.array([0, 1, 1])]
  assert tokens._map.cache_info().currsize == 1


def test_bytes_are_those_of_the_text(config, tmp_path):
  data, memory = (
    prepare(config.rows),
    prepare(_in_memory(config, tmp_path).rows),
  )
  for side in ("validation", "test"):
    held = getattr(data, side)
    assert held.num_bytes == getattr(memory, side).num_bytes
    some = held.subset(3)
    assert isinstance(some.rows.tokens, np.ndarray) and len(some) == 3
    for row, segment, _, size, _ in some.texts.tolist():
      ids = some.rows.tokens[row][some.rows.segments[row] == segment]
      assert len(data.tokenizer.decode(ids).encode()) == size
