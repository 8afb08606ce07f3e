"""Prepared rows: found again, never mixed up, whole or not there at all."""

import dataclasses
import io
import pydoc_data.topics

import numpy as np
import prepare_harness as harness
import pytest
import sentencepiece

from mdm_jax import config as config_lib
from mdm_jax import config_changes
from mdm_jax.core.errors import UserError
from mdm_jax.data import cache as cache_lib
from mdm_jax.data import passes, preparation
from mdm_jax.data import segments as segments_lib
from mdm_jax.data.prepared import prepare
from mdm_jax.workdir import Workdir

TOPICS = [
  pydoc_data.topics.topics[name]
  for name in sorted(pydoc_data.topics.topics)
  if len(pydoc_data.topics.topics[name]) < 6000
][:24]
STAGES = [
  {"unit": "sentences", "length": 48, "min_words": 3, "easiest": 0.5},
  {"unit": "pairs", "length": 96, "easiest": 0.7},
  {"unit": "paragraphs", "length": 64},
]


@pytest.fixture
def texts(tmp_path):
  """A folder of real text, one file a document."""
  folder = tmp_path / "texts"
  folder.mkdir()
  for i, text in enumerate(TOPICS):
    (folder / f"{i:02d}.txt").write_text(text, newline="")
  return folder


@pytest.fixture
def cache(tmp_path):
  """Where rows are kept."""
  return tmp_path / "cache"


@pytest.fixture
def config(texts, cache):
  """Three stages over the folder."""
  return config_lib.from_dict(
    {
      "data": {
        "corpus": f"text:{texts}/*.txt",
        "cache_dir": str(cache),
        "eval_fraction": 0.25,
        "test_fraction": 0.25,
        "batch_size": 2,
      },
      "tokenizer": {"vocab_size": 400},
      "stages": STAGES,
    }
  )


def _change(config, section, **fields):
  raw = config_lib.to_dict(config)
  target = raw["stages"][0] if section == "stage" else raw[section]
  target.update(fields)
  return config_lib.from_dict(raw)


def _folders(cache):
  return sorted(path.name for path in cache.iterdir())


_split = harness.sides


def _bytes(documents):
  return sum(len(document.text.encode()) for document in documents)


def _pieces(rows):
  for tokens, segments in zip(rows.tokens, rows.segments, strict=True):
    for number in range(1, segments.max() + 1):
      yield tokens[segments == number]


def _error(config):
  with pytest.raises(UserError) as caught:
    prepare(config.rows)
  message = str(caught.value)
  assert "\n" not in message
  return message


# MARK: the cache


def test_the_second_time_nothing_is_made(config, cache, monkeypatch):
  first = prepare(config.rows)

  def refuse(*_):
    raise AssertionError("made again")

  monkeypatch.setattr(preparation.tokenizers, "build", refuse)
  monkeypatch.setattr(passes.segments, "find", refuse)
  second = prepare(config.rows)
  assert len(_folders(cache)) == 1
  assert second.tokenizer.sha256 == first.tokenizer.sha256
  assert second.manifest == first.manifest
  for a, b in zip(
    (*first.stages, first.validation.rows, first.test.rows),
    (*second.stages, second.validation.rows, second.test.rows),
    strict=True,
  ):
    assert (a.tokens == b.tokens).all() and (a.segments == b.segments).all()


def test_the_same_text_gives_the_same_bytes(config, cache, tmp_path):
  prepare(config.rows)
  prepare(_change(config, "data", cache_dir=str(tmp_path / "other")).rows)
  assert _folders(cache) == _folders(tmp_path / "other")
  for path in (cache / _folders(cache)[0]).iterdir():
    twin = tmp_path / "other" / path.relative_to(cache)
    assert path.read_bytes() == twin.read_bytes()


@pytest.mark.parametrize(
  "section, fields",
  [
    ("data", {"eval_fraction": 0.3}),
    ("data", {"test_fraction": 0.3}),
    ("data", {"max_documents": 20}),
    ("tokenizer", {"vocab_size": 420}),
    ("tokenizer", {"kind": "byte"}),
    ("stage", {"length": 40}),
    ("stage", {"unit": "pairs"}),
    ("stage", {"easiest": 0.4}),
    ("stage", {"min_words": 4}),
    ("stage", {"max_words": 12}),
  ],
)
def test_a_field_that_shapes_rows_makes_a_new_folder(
  config, cache, section, fields
):
  prepare(config.rows)
  prepare(_change(config, section, **fields).rows)
  assert len(_folders(cache)) == 2


def test_other_fields_share_the_folder(config, cache):
  prepare(config.rows)
  other = _change(config, "stage", name="x", epochs=9, mask_rate=[0.1, 0.2])
  other = _change(other, "data", batch_size=1, on_bad_record="skip")
  prepare(dataclasses.replace(other, seed=5, name="other").rows)
  assert len(_folders(cache)) == 1


def test_a_changed_text_makes_a_new_folder(config, cache, texts):
  prepare(config.rows)
  with (texts / "03.txt").open("a") as file:
    file.write(" ")
  prepare(config.rows)
  assert len(_folders(cache)) == 2


def test_found_B10_a_corpus_that_moved_is_the_same(config, cache, tmp_path):
  """Rows are compared, not names; the change is told, another text refused."""
  workdir = Workdir(tmp_path / "run")
  workdir.create()
  first = prepare(config.rows)
  workdir.write_config(config, first.tokenizer.sha256)
  workdir.write("data.json", first.manifest)
  (tmp_path / "texts").rename(tmp_path / "moved")
  moved = _change(config, "data", corpus=f"text:{tmp_path}/moved/*.txt")
  (change,) = config_changes.check(config, moved)
  assert change.path == "data.corpus"
  data = prepare(moved.rows)
  assert data.manifest == first.manifest and len(_folders(cache)) == 1
  workdir.check_tokenizer(data.tokenizer.sha256)
  workdir.check_data(data.manifest)
  path = tmp_path / "moved" / "03.txt"
  path.write_text(path.read_text().replace("e", "E", 1), newline="")
  with pytest.raises(UserError, match="started with another text"):
    workdir.check_data(prepare(moved.rows).manifest)


def test_a_given_tokenizer_is_known_by_its_bytes(config, cache, tmp_path):
  path = tmp_path / "given.model"
  for size in (400, 420):
    made = prepare(_change(config, "tokenizer", vocab_size=size).rows)
    path.write_bytes(made.tokenizer.content)
    given = prepare(_change(config, "tokenizer", path=str(path)).rows)
    assert given.tokenizer.sha256 == made.tokenizer.sha256
  assert len(_folders(cache)) == 4


@pytest.mark.parametrize(
  "name", ["stage_2.tokens.npy", "test.segments.npy", "validation.texts.npy"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_file_is_refused(config, cache, name, damage):
  prepare(config.rows)
  folder = cache / _folders(cache)[0]
  content = bytearray((folder / name).read_bytes())
  if damage == "flip":
    content[-1] ^= 1
    (folder / name).write_bytes(content)
  elif damage == "cut":
    (folder / name).write_bytes(content[:-1])
  else:
    (folder / name).unlink()
  message = _error(config)
  assert name in message and "delete the folder" in message
  assert str(folder) in message


@pytest.mark.parametrize("content", ["", "{}", '{"files": {'])
def test_a_damaged_manifest_is_refused(config, cache, content):
  prepare(config.rows)
  manifest = cache / _folders(cache)[0] / "manifest.json"
  manifest.write_text(content)
  assert "delete the folder" in _error(config)


@pytest.mark.parametrize(
  "module, step", [(passes, "make_rows"), (cache_lib, "file_sha256")]
)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_death_half_way_leaves_nothing(
  config, cache, monkeypatch, module, step, error
):
  calls = []
  whole = getattr(module, step)

  def die(*args):
    calls.append(args)
    if len(calls) == 3:
      raise error
    return whole(*args)

  with monkeypatch.context() as patch:
    patch.setattr(module, step, die)
    with pytest.raises(error):
      prepare(config.rows)
  assert _folders(cache) == []
  prepare(config.rows)
  assert len(_folders(cache)) == 1


def test_a_faster_process_wins(config, cache, monkeypatch):
  whole = preparation.make

  def overtaken(*args):
    made = whole(*args)
    with monkeypatch.context() as patch:
      patch.setattr(preparation, "make", whole)
      prepare(config.rows)
    return made

  monkeypatch.setattr(preparation, "make", overtaken)
  data = prepare(config.rows)
  assert len(data.validation)
  assert len(_folders(cache)) == 1


def test_a_cache_that_can_not_be_made_is_reported(config, tmp_path):
  (tmp_path / "file").write_text("")
  message = _error(_change(config, "data", cache_dir=f"{tmp_path}/file/x"))
  assert "data.cache_dir" in message


def test_the_cache_follows_the_environment(config, tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  prepare(_change(config, "data", cache_dir="").rows)
  assert len(_folders(tmp_path / "xdg" / "mdm_jax")) == 1


# MARK: the rows


@pytest.mark.parametrize("kind", ["sentencepiece", "byte", "char"])
def test_held_out_rows_are_the_held_out_text(config, kind):
  config = _change(config, "tokenizer", kind=kind)
  data = prepare(config.rows)
  eos = data.tokenizer.vocab.end
  for side in ("validation", "test"):
    held_out, rows = _split(config)[side], getattr(data, side).rows
    assert held_out
    ends = sum(piece[-1] == eos for piece in _pieces(rows))
    assert ends == len(held_out)
    decoded = sorted(data.tokenizer.decode(p) for p in _pieces(rows))
    for document in held_out:
      ends = {0}  # where a piece can end
      for at in range(len(document.text)):
        if at in ends:
          fits = [d for d in decoded if document.text.startswith(d, at)]
          ends |= {at + len(d) for d in fits}
      assert len(document.text) in ends
    assert sum(map(len, decoded)) == sum(len(d.text) for d in held_out)


@pytest.mark.parametrize("kind", ["sentencepiece", "byte", "char"])
def test_the_table_says_which_text_each_piece_is(config, kind):
  config = _change(config, "tokenizer", kind=kind)
  data = prepare(config.rows)
  sides = _split(config)
  for side in ("validation", "test"):
    held = getattr(data, side)
    assert held.num_bytes == _bytes(sides[side])
    assert held.documents == len(sides[side])
    for row, segment, document, size, _ in held.texts.tolist():
      ids = held.rows.tokens[row][held.rows.segments[row] == segment]
      text = data.tokenizer.decode(ids)
      assert text in sides[side][document].text
      assert len(text.encode()) == size
    some = held.subset(3)
    assert len(some) == 3 and set(some.texts[:, 0]) == {0, 1, 2}
    widths = [len(data.tokenizer.decode(r).encode()) for r in some.rows.tokens]
    sizes = np.bincount(some.texts[:, 0], some.texts[:, 3])
    assert sizes.tolist() == widths and some.num_bytes == sum(widths)


_NORMALISES = {
  "spaces": ("  much   space  " * 40, {}),
  "full_width": ("\uff21\uff22\uff23 \uff11\uff12 " * 40, {}),
  "ligatures": ("\ufb01ne o\ufb03ce \u2460\u00bd " * 40, {}),
}


@pytest.mark.parametrize("name", _NORMALISES)
def test_found_A5_bytes_are_those_of_the_original_text(
  config, texts, tmp_path, name
):
  """A model that normalises gives ids of other bytes: 0.38 of full width."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter("\n".join(TOPICS).splitlines()),
    model_writer=model,
    vocab_size=400,
    byte_fallback=True,
    minloglevel=2,
  )
  (tmp_path / "given.model").write_bytes(model.getvalue())
  for path in texts.iterdir():
    path.write_text(_NORMALISES[name][0] + path.read_text())
  config = _change(config, "tokenizer", path=str(tmp_path / "given.model"))
  data, sides = prepare(config.rows), _split(config)
  for side in ("validation", "test"):
    held = getattr(data, side)
    decoded = sum(
      len(data.tokenizer.decode(piece).encode()) for piece in _pieces(held.rows)
    )
    assert decoded != held.num_bytes == _bytes(sides[side])
    by_document = np.bincount(held.texts[:, 2], held.texts[:, 3])
    assert by_document.tolist() == [_bytes([d]) for d in sides[side]]


def test_held_out_text_is_never_trained_on(config):
  data = prepare(config.rows)
  sides = _split(config)
  train, held_out = sides["train"], sides["validation"] + sides["test"]
  trained = "".join(d.text for d in train)
  for rows in data.stages:
    for piece in _pieces(rows):
      cuts = np.flatnonzero(piece == data.tokenizer.vocab.separator)
      for part in np.split(piece, cuts):
        assert data.tokenizer.decode(part) in trained
  only_held_out = [
    line
    for d in held_out
    for line in d.text.splitlines()
    if len(line.strip()) > 50 and line not in trained
  ]
  assert len(only_held_out) > 20
  seen = "".join(
    data.tokenizer.decode(p) for rows in data.stages for p in _pieces(rows)
  )
  assert not [line for line in only_held_out if line in seen]


def test_the_last_stage_holds_the_whole_training_text(config):
  data = prepare(config.rows)
  written = [data.tokenizer.decode(p) for p in _pieces(data.stages[-1])]
  assert sum(len(t.encode()) for t in written) == _bytes(
    _split(config)["train"]
  )


def test_stages_hold_what_their_config_asks(config):
  data = prepare(config.rows)
  vocab = data.tokenizer.vocab
  assert [rows.length for rows in data.stages] == [48, 96, 64]
  held = data.validation.rows, data.test.rows
  assert [rows.length for rows in held] == [64, 64]
  sentences, pairs, running = (list(_pieces(rows)) for rows in data.stages)
  assert not any(vocab.separator in p or vocab.end in p for p in sentences)
  assert all((p == vocab.separator).sum() == 1 for p in pairs)
  assert all(len(data.tokenizer.decode(p).split()) >= 3 for p in sentences)
  assert not any(vocab.separator in p for p in running)
  for rows in (*data.stages, *held):
    assert rows.tokens.max() <= vocab.pad
    assert ((rows.tokens == vocab.pad) == (rows.segments == 0)).all()


def test_counts_are_those_of_the_rows(config):
  data = prepare(config.rows)
  sides = _split(config)
  counts = data.manifest["rows"]
  assert data.manifest["documents"] == {
    "train": len(sides["train"]),
    "validation": len(sides["validation"]),
    "test": len(sides["test"]),
    "bad": 0,
  }
  for i, rows in enumerate(data.stages):
    count = counts[f"stage_{i + 1}"]
    assert count["rows"] == len(rows)
    assert count["tokens"] == (rows.segments > 0).sum()
    assert count["capacity"] == rows.tokens.size
    assert count["units_selected"] <= count["units_found"]
  assert counts["stage_1"]["units_selected"] == -(
    -counts["stage_1"]["units_found"] // 2
  )


def test_the_easiest_are_ranked_exactly(config):
  """Among all units of the corpus, and not in bins."""
  data = prepare(config.rows)
  texts = [document.text for document in _split(config)["train"]]
  for i, stage in enumerate(config.stages[:2]):
    units = segments_lib.units(texts, stage)
    chosen = segments_lib.easiest(units, stage.easiest)
    counts = data.manifest["rows"][f"stage_{i + 1}"]
    assert counts["difficulty"]["cut"] == chosen.cut
    assert counts["difficulty"]["histogram"] == chosen.histogram(20)
    assert counts["units_selected"] == len(chosen.units)
    found = sorted(data.tokenizer.decode(p) for p in _pieces(data.stages[i]))
    wanted = sorted("".join(unit.parts) for unit in chosen.units)
    assert set(found) <= set(wanted)
    assert len(found) == len(wanted) - counts["texts_too_long"]


def test_rows_are_read_from_disk_and_can_not_be_changed(config):
  rows = prepare(config.rows).stages[0]
  assert isinstance(rows.tokens, np.memmap)
  with pytest.raises(ValueError):
    rows.tokens[0, 0] = 1


@pytest.mark.parametrize(
  "fields, told",
  [
    ({"min_words": 5000}, "have fewer than 5000 words (stages[0].min_words=0"),
    ({"length": 1}, "longer than 1 tokens"),
    ({"easiest": 0.0}, "are not among the easiest 0% (stages[0].easiest=1.0"),
  ],
)
def test_a_stage_without_rows_says_why(config, fields, told):
  message = _error(_change(config, "stage", **fields))
  assert message.startswith("stages[0] has no rows:")
  assert told in message
