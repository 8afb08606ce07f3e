"""The configs of the papers: on small text of the same form as theirs.

Neither text8 nor OpenWebText is at hand here.
"""

import importlib.util
import json
import random

import jax
import numpy as np
import pytest
from mesh_harness import make_mesh
from paths import ROOT

from mdm_jax import config as config_lib
from mdm_jax import fit
from mdm_jax.benchmarks import programs
from mdm_jax.blueprint import make_trainer
from mdm_jax.core import sharding
from mdm_jax.data.prepared import prepare

MERGES = "#version: 0.2\n\u0120 t\nh e\n\u0120t he\n"
WORDS = (
  "the anarchism of one nine nine zero term is used to be an early".split()
)


@pytest.fixture(autouse=True)
def standard_promotion():
  """As in a run: Adam raises a float to an integer power."""
  with jax.numpy_dtype_promotion("standard"):
    yield


def built(name, argument=""):
  """Returns what configs/NAME.py builds, still to be changed."""
  path = ROOT / "configs" / f"{name}.py"
  spec = importlib.util.spec_from_file_location(name, path)
  spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
  return module.get_config(argument)


def text8(folder, characters=20_000):
  """Writes one line of a to z and spaces; returns it."""
  numbers = random.Random(0)
  words = (numbers.choice(WORDS) for _ in range(characters))
  text = " " + " ".join(words)[: characters - 1]
  (folder / "text8").write_text(text)
  return text


def owt(folder):
  """Writes documents in the two parts of the split, and GPT-2's merges."""
  numbers = random.Random(0)
  for part, count in (("train", 40), ("heldout", 6)):
    (folder / "owt" / part).mkdir(parents=True)
    texts = [" ".join(numbers.choices(WORDS, k=400)) for _ in range(count)]
    lines = [json.dumps({"text": f"{text}."}) for text in texts]
    path = folder / "owt" / part / "0.jsonl"
    path.write_text("\n".join(lines) + "\n")
  (folder / "gpt2").mkdir()
  (folder / "gpt2" / "merges.txt").write_text(MERGES)


def train(config, updates=2):
  """Returns a config's rows, and the losses of its first updates."""
  config = config_lib.from_config_dict(config)
  data, mesh = prepare(config.rows), make_mesh("1x1")
  with jax.set_mesh(mesh):
    trainer = make_trainer(config, data, mesh)
    state, losses = trainer.init(), []
    for update in range(updates):
      state, metrics = trainer.update(state, update)
      losses.append(float(metrics["loss"]))
  assert np.isfinite(losses).all()
  return data


def test_text8_is_split_by_position_and_trained_on(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  text = text8(tmp_path)
  config = built("text8", "quick")
  config.data.update(eval_fraction=0.05, test_fraction=0.05)
  config.data.cache_dir = "cache"
  data = train(config)
  # Rows are sorted by length, so the characters of a part are compared.
  rows = lambda held: held.rows.tokens[:].reshape(-1)
  validation, test = map(rows, (data.validation, data.test))
  validation, test = map(data.tokenizer.decode, (validation, test))
  assert 1000 <= len(test) < 1020 and 1000 <= len(validation) < 1020
  rest = text[: -len(test)]
  assert sorted(test) == sorted(text[-len(test) :])
  assert sorted(validation) == sorted(rest[-len(validation) :])
  assert rest[-1] == " " == rest[-len(validation) - 1]  # words stay whole
  symbols = set(data.tokenizer.pieces[256 : data.tokenizer.vocab.end])
  assert symbols == {c.encode() for c in set(text)} and len(symbols) <= 27
  sizes = (data.stages[0].segments[:] > 0).sum(axis=1)
  assert (sizes[:-1] == 64).all()  # whole rows of running text


def test_owt_reports_on_its_published_split(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  owt(tmp_path)
  config = built("owt", "quick")
  config.data.cache_dir = "cache"
  data = train(config)
  assert data.test.documents == 6
  assert data.manifest["split"]["given"] == ["test"]
  assert data.tokenizer.pieces[258] == b" the"


@pytest.mark.parametrize(
  "name, argument", [("mdlm", "paper"), ("text8", ""), ("owt", "")]
)
def test_an_update_of_the_papers_size_lowers(
  name, argument, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  owt(tmp_path)
  config = config_lib.from_config_dict(built(name, argument))
  assert config.rows_per_update == 512
  assert config.objective.weighting == "nelbo"
  (stage,) = config.stages
  assert stage.objective.mask_rate is None and stage.updates == 10**6
  mesh = sharding.planned_mesh(sharding.parse_mesh("8"))
  run = fit.blueprint(config, mesh)
  program = programs.Program("train_step")
  traced = programs.trace(run, program, mesh)
  text = traced.lower(lowering_platforms=("tpu",)).as_text()
  assert '"fsdp"=8' in text


@pytest.mark.parametrize("name", ["autoregressive", "block"])
def test_a_config_is_the_quickstart_with_another_objective(name):
  """So their bits per byte compare the objectives alone."""
  ours, theirs = built(name), built("quickstart")
  for section in ("data", "tokenizer", "model", "optimizer", "train", "eval"):
    assert ours[section] == theirs[section], section
  masked = {"mask_rate", "rehearsal"}
  plain = lambda stage: {k: v for k, v in stage.items() if k not in masked}
  assert [plain(s) for s in ours.stages] == [plain(s) for s in theirs.stages]
  if name == "block":
    assert ours.stages == theirs.stages
