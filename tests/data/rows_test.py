"""Rows have named fields; another one takes one line in a list."""

import dataclasses
import json

import jax
import numpy as np
import prepare_harness as harness
import pytest

from mdm_jax import config as config_lib
from mdm_jax.blueprint import make_trainer
from mdm_jax.checkpoints.checkpoint import Checkpoints
from mdm_jax.core.errors import UserError
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data import rows as rows_lib
from mdm_jax.data import stage_rows
from mdm_jax.data.batches import Batch, make_batch
from mdm_jax.data.packing import pack
from mdm_jax.data.prepared import prepare
from mdm_jax.data.row_checks import find_wrong
from mdm_jax.data.rows import Field, Rows
from mdm_jax.training import incident

VOCAB = Vocabulary.after_text(256)
TOY = Field(
  "weight",
  (np.float32,),
  np.float32,
  pad=-1,
  wrong=lambda values, _: (values["weight"] < 0) != (values["segments"] == 0),
  why=lambda value, _: f"weight {value:g}",
  optional=True,
)
TEXTS = [np.arange(n) + 100 * (n % 2) for n in (5, 3, 9, 1, 7, 10, 2)]


def half(text):
  """Marks the second half of a text, as the answer to the first."""
  return (np.arange(len(text)) >= len(text) // 2).astype(np.uint8)


def weights(text):
  """A number for each token that says which it is."""
  return (np.asarray(text) / 7).astype(np.float32)


@pytest.fixture
def toy(monkeypatch):
  """The list of fields with one line more."""
  monkeypatch.setattr(rows_lib, "FIELDS", (*rows_lib.FIELDS, TOY))


@pytest.fixture
def fields(monkeypatch):
  """Has a stage's texts packed with further fields."""

  def add(**of):
    def packed(texts, length, vocab):
      more = {name: [f(t) for t in texts] for name, f in of.items()}
      return pack(texts, length, vocab, **more)

    monkeypatch.setattr(stage_rows, "pack", packed)

  return add


# MARK: in memory


def test_fields_are_in_the_order_of_the_list_and_absent_ones_are_absent():
  one = np.zeros((2, 3), np.uint8)
  assert [*Rows(answer=one, segments=one, tokens=one).fields] == [
    "tokens",
    "segments",
    "answer",
  ]
  assert len(jax.tree.leaves(Batch(one, one))) == 2
  assert len(jax.tree.leaves(Batch(one, one, answer=one))) == 3
  again = jax.tree.map(lambda x: x + 1, Batch(one, one + 1))
  assert isinstance(again, Batch) and (again.segments == 2).all()
  paths = [p for p, _ in jax.tree_util.tree_leaves_with_path(again)]
  assert list(map(jax.tree_util.keystr, paths)) == [".tokens", ".segments"]
  with pytest.raises(TypeError, match="weight"):
    Rows(one, one, weight=one)


def test_without_answers_all_text_may_be_asked_for():
  segments = np.array([[1, 1, 2, 0]], np.uint16)
  for kind in (Rows, Batch):
    assert kind(segments, segments).answer.tolist() == [[1, 1, 1, 0]]
  answer = np.array([[0, 1, 1, 0]], np.uint8)
  assert Rows(segments, segments, answer=answer).answer.dtype == bool
  rows = Rows(segments, segments, answer=answer)
  assert rows.answer.tolist() == [[False, True, True, False]]


def test_every_value_stays_beside_its_token(toy):
  rows = pack(
    TEXTS,
    10,
    VOCAB,
    answer=list(map(half, TEXTS)),
    weight=list(map(weights, TEXTS)),
  )
  assert [*rows.fields] == ["tokens", "segments", "answer", "weight"]
  found = []
  for row in range(len(rows)):
    for number in range(1, rows.segments[row].max() + 1):
      here = rows.segments[row] == number
      text = rows.tokens[row][here]
      assert (rows.fields["answer"][row][here] == half(text)).all()
      assert (rows.fields["weight"][row][here] == weights(text)).all()
      found.append(tuple(text))
  assert sorted(found) == sorted(map(tuple, TEXTS))
  padding = rows.segments == 0
  assert padding.any() and not rows.answer[padding].any()
  assert (rows.fields["weight"][padding] == -1).all()
  assert rows.take(np.array([1])).fields["weight"].shape == (1, 10)


@pytest.mark.parametrize(
  "name, change, message",
  [
    ("answer", lambda a, s: a + 2 * (s > 1), "answer is [23], not 0 or 1"),
    ("answer", lambda a, s: a | (s == 0), "padding is marked as an answer"),
    ("answer", lambda a, s: a.astype(bool), r"bool \(answer\)"),
    ("answer", lambda a, s: a[:, 1:], r"\(\d, 9\) \(answer\)"),
    ("weight", lambda w, s: -w - 1, "token 0: weight -"),
    ("weight", lambda w, s: w.astype(np.float64), r"float64 \(weight\)"),
  ],
)
def test_a_fields_check_is_made(toy, name, change, message):
  more = {"answer": list(map(half, TEXTS)), "weight": map(weights, TEXTS)}
  more["weight"] = list(more["weight"])
  fields = dict(pack(TEXTS, 10, VOCAB, **more).fields)
  assert find_wrong(fields, 10, VOCAB) is None
  changed = change(fields[name], fields["segments"])
  fields[name] = (
    changed.astype(np.uint8)
    if name == "answer" and (changed.dtype != bool)
    else changed
  )
  with pytest.raises(AssertionError, match=message):
    raise AssertionError(find_wrong(fields, 10, VOCAB))


# MARK: on disk


@pytest.fixture
def config(tmp_path):
  """Two stages of bytes, in blocks."""
  texts = harness.write_texts(tmp_path / "texts")
  made = harness.make_config(texts, tmp_path / "rows", tokenizer__kind="byte")
  stages = [
    {"unit": "paragraphs", "length": 64, "updates": 3},
    {"unit": "sentences", "length": 64, "min_words": 3, "updates": 3},
  ]
  raw = config_lib.to_dict(made)
  model = {"num_layers": 1, "embed_dim": 16, "num_heads": 2}
  return config_lib.from_dict(raw | {"stages": stages, "model": model})


def stored(config, tmp_path, where):
  """Makes the rows of a config, in blocks or in memory; returns it."""
  if where == "blocks":
    harness.fill(config)
    return config
  cache = str(tmp_path / "cache")
  data = dataclasses.replace(config.data, prepared="", cache_dir=cache)
  return dataclasses.replace(config, data=data)


@pytest.mark.parametrize("where", ["memory", "blocks"])
def test_a_further_field_goes_to_disk_and_to_the_devices(
  any_mesh, config, tmp_path, toy, fields, where
):
  fields(answer=half, weight=weights)
  config = stored(config, tmp_path, where)
  data = prepare(config.rows)
  for rows in data.stages:
    whole = {name: np.array(list(v)) for name, v in rows.fields.items()}
    assert [*whole] == ["tokens", "segments", "answer", "weight"]
    inside = whole["segments"] > 0
    want = np.where(inside, weights(whole["tokens"]), -1)
    assert (whole["weight"] == want).all()
    numbers = np.arange(12)
    batch = make_batch(rows, numbers, 2, any_mesh)
    for name, values in whole.items():
      found = batch.fields[name]
      assert found.dtype == rows_lib.field(name).device
      assert found.shape == (2, 8 if any_mesh.size > 1 else 6, 64)
      mine = np.asarray(found)[:, :6].reshape(12, 64)
      assert (mine == values[:12]).all()
      assert not np.asarray(found)[:, 6:].any()
    assert batch.answer.dtype == bool
  assert [*data.validation.rows.fields] == ["tokens", "segments"]
  assert len(data.validation.subset(2)) == 2


@pytest.mark.parametrize("where", ["memory", "blocks"])
def test_what_a_row_holds_at_most_is_reported(config, tmp_path, fields, where):
  fields(answer=half)
  config = stored(config, tmp_path, where)
  data = prepare(config.rows)
  for i, rows in enumerate(data.stages):
    counts = data.manifest["rows"][f"stage_{i + 1}"]
    segments, answer = np.array(list(rows.segments)), rows.answer
    assert rows_lib.most_segments(counts, 64) == segments.max() > 1
    assert rows_lib.most_asked(counts, 64) == answer.sum(axis=1).max() < 64
    assert counts["tokens"] == (segments > 0).sum() > answer.sum()
  counts = data.manifest["rows"]["test"]
  assert "most_asked" not in counts
  assert rows_lib.most_asked(counts, 64) == 64
  assert rows_lib.most_segments({}, 64) == 64


@pytest.mark.parametrize("where", ["memory", "blocks"])
def test_damage_to_a_further_field_is_found(
  config, tmp_path, toy, fields, where
):
  fields(weight=lambda text: weights(text) - 5)
  config = stored(config, tmp_path, where)
  with pytest.raises(UserError, match=r"stage_1.*row 0, token \d+: weight -"):
    prepare(config.rows)


def test_a_further_fields_bytes_are_hashed(config, tmp_path, fields):
  fields(answer=half)
  config = stored(config, tmp_path, "blocks")
  (path, *_) = (tmp_path / "rows").glob("stage_1.*.answer.npy")
  content = bytearray(path.read_bytes())
  content[-1] ^= 1
  path.write_bytes(content)
  with pytest.raises(UserError, match=f"damaged: {path}"):
    prepare(config.rows)
  path.unlink()
  with pytest.raises(UserError, match=f"{path} is missing"):
    prepare(config.rows)


# MARK: in a run


@pytest.mark.parametrize(
  "any_mesh",
  ["1x1", pytest.param("4x2", marks=pytest.mark.slow)],
  indirect=True,
)
def test_a_run_with_answers_resumes_bit_for_bit(
  any_mesh, config, tmp_path, fields
):
  fields(answer=half)
  config = stored(config, tmp_path, "blocks")
  make = lambda: make_trainer(config, prepare(config.rows), any_mesh)
  trainer = make()
  state = trainer.init()
  (run := tmp_path / "run").mkdir()
  with Checkpoints(run) as checkpoints:
    for update in range(4):
      if update == 2:
        checkpoints.save(2, state, {})
      batch = trainer.batch(trainer.curriculum.stage_at(update), update)
      assert len(batch.fields) == 3 and batch.answer.any()
      plan = trainer.plan(trainer.curriculum.stage_at(update))
      assert 1 < plan.most_segments < plan.most_asked < 64
      assert (batch.segments > 0).sum() > batch.answer.sum()
      state, _ = trainer.update(state, update, batch)
    again = make()
    other = checkpoints.restore(2, jax.eval_shape(again.init))
    for update in (2, 3):
      other, _ = again.update(other, update)
  jax.tree.map(np.testing.assert_array_equal, *jax.device_get((state, other)))


def test_the_rows_of_an_incident_have_all_fields(
  mesh, config, tmp_path, fields
):
  fields(answer=half)
  config = stored(config, tmp_path, "memory")
  trainer = make_trainer(config, prepare(config.rows), mesh)
  for line in incident._rows(trainer, 0).splitlines():
    told = json.loads(line)
    rows = trainer.data.stages[0]
    for name in ("tokens", "segments", "answer"):
      assert told[name] == rows.fields[name][told["row"]].tolist()
