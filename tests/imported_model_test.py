"""A model of hf:FOLDER is used and trained as one of this library."""

import dataclasses
import json
from unittest import mock

import command_harness as commands
import huggingface_harness as harness
import jax
import numpy as np
import prepare_harness
import pytest
from paths import ROOT

import mdm_jax
from mdm_jax import command_line, fit, imported_model
from mdm_jax.config import Config
from mdm_jax.core.errors import UserError
from mdm_jax.core.progress import console
from mdm_jax.core.sharding import MeshConfig, planned_mesh
from mdm_jax.huggingface.families import FAMILIES
from mdm_jax.model.config import ModelConfig
from mdm_jax.objectives.config import AutoregressiveConfig, BlockConfig
from mdm_jax.workdir import Workdir

TEXT = "the cat thinks"
OPENED = "train/attention_opened"


def test_a_causal_model_scores_text_as_it_was_trained_to(tmp_path):
  tensors = harness.save(tmp_path, {})
  model = mdm_jax.load(f"hf:{tmp_path}")
  assert isinstance(model.config.objective, AutoregressiveConfig)
  assert model.config.stages[-1].length == 48
  scores = model.score(TEXT)
  ids = model.tokenizer.encode(TEXT)
  # Without a begin id the end of a document stands before a text; it ends one.
  row = np.array([256, *ids, 256])
  wanted = harness.logits({}, tensors, row[:-1])
  possible = model.tokenizer.vocab.is_predictable(np.arange(len(wanted[0])))
  wanted = np.where(possible, wanted, -np.inf)
  wanted -= np.log(np.exp(wanted).sum(-1, keepdims=True))
  by_hand = -wanted[np.arange(len(ids) + 1), row[1:]].sum()
  assert scores.tokens[0] == len(ids) + 1
  np.testing.assert_allclose(scores.nats, by_hand, rtol=1e-5)


def test_a_bidirectional_model_fills_in(tmp_path):
  harness.save(tmp_path, harness.QWEN3)
  model = mdm_jax.load(f"hf:{tmp_path}")
  drawn = model.generate("the [MASK:3] th", num_steps=3)
  assert drawn.texts[0].startswith("the") and len(drawn.texts) == 1


CONFIG = """
from mdm_jax.config import default_config, stage

def get_config(arg=""):
  config = default_config()
  config.data.update(corpus="text:texts/*", batch_size=2)
  config.data.update(eval_fraction=0.25, test_fraction=0.25)
  config.model.num_layers = 5
  config.stages = (stage(length=48, updates=2),)
  config.sample.update(num_samples=1, length=16)
  config.eval.update(judge="", batch_size=2)
  return config.lock()
"""


@pytest.mark.parametrize("kind", ["Fast_dLLM_Qwen", "sdar"])
def test_a_model_of_blocks_continues_a_text(tmp_path, kind):
  """In the blocks that it was trained with; its mask may be in no file."""
  base = harness.QWEN2 if kind != "sdar" else harness.QWEN3
  size = "bd_size" if kind != "sdar" else "block_size"
  tensors = harness.weights(harness.CONFIG | base)
  config = base | {"model_type": kind, "is_causal": None, size: 4}
  family = dataclasses.replace(FAMILIES[kind], mask=harness.ROWS - 1)
  harness.save(tmp_path, config, tensors)
  with mock.patch.dict(FAMILIES._pieces, {kind: family}):
    model = mdm_jax.load(f"hf:{tmp_path}")
    assert model.tokenizer.vocab.mask == harness.ROWS - 1
  assert model.config.objective == BlockConfig(name="block", block_length=4)
  drawn = model.generate("the cat", 1, num_steps=2, length=16)
  assert (drawn.step >= 0).any() and drawn.texts[0].startswith("the cat")


@pytest.mark.slow
def test_a_run_starts_from_it_and_resumes_without_the_folder(tmp_path):
  env = commands.environment(tmp_path / "cache")
  tensors = harness.save(tmp_path / "model", harness.QWEN3)
  prepare_harness.write_texts(tmp_path / "texts")
  (tmp_path / "config.py").write_text(CONFIG)
  call = lambda *args: commands.call(
    tmp_path,
    env,
    "--config=config.py",
    "--config.init_from=hf:model",
    "--workdir=run",
    *args,
  )
  done = call("--config.optimizer.learning_rate=1e-9")
  assert done.returncode == 0, done.stderr
  assert "hf:model has its own sizes: not used num_layers=5" in done.stdout
  assert "starting from the weights of hf:model" in done.stdout
  saved = Workdir(tmp_path / "run").read_config()
  assert (saved.model.num_layers, saved.model.head_dim) == (2, 6)
  (tmp_path / "model").rename(tmp_path / "gone")
  again = call("--config.optimizer.learning_rate=1e-9")
  assert again.returncode == 0, again.stderr
  model = mdm_jax.load(str(tmp_path / "run"))
  up = np.asarray(model._model.params["blocks"]["mlp"]["up"])
  theirs = tensors["model.layers.0.mlp.up_proj.weight"]
  np.testing.assert_allclose(up[0], theirs.T, atol=1e-6)
  fresh = call("--workdir=other")
  commands.check_mistake(fresh, "hf:model", "config.json")


@pytest.mark.slow
def test_a_causal_model_becomes_a_masked_one(tmp_path):
  env = commands.environment(tmp_path / "cache")
  harness.save(tmp_path / "model", {})
  config = f"--config={ROOT / 'configs' / 'from_causal.py'}:quick"
  call = lambda *args: commands.call(tmp_path, env, *args)
  missing = call(config)
  commands.check_mistake(missing, "models/SmolLM2-135M", "config.json")
  given = "--config.init_from=hf:model", "--workdir=run"
  done = call(f"{config},gradual,shifted", *given, "--config.train.log_every=1")
  assert done.returncode == 0, done.stderr
  assert "starting from the weights of hf:model" in done.stdout
  assert "opening 10%" in done.stdout
  saved = Workdir(tmp_path / "run").read_config()
  assert saved.model.shift_outputs and saved.model.num_layers == 2
  lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  logged = [json.loads(line) for line in lines]
  opened = [x[OPENED] for x in logged if OPENED in x]
  assert opened == pytest.approx([0, 1 / 1.2, *[1] * 10])
  model = mdm_jax.load(str(tmp_path / "run"))
  assert model.generate("the [MASK:3] th", num_steps=3).texts


@pytest.mark.slow
def test_a_causal_model_becomes_one_of_blocks(tmp_path):
  env = commands.environment(tmp_path / "cache")
  harness.save(tmp_path / "model", {})
  config = f"--config={ROOT / 'configs' / 'from_causal.py'}:blocks,shifted"
  short = [f"--config.stages[{i}].updates=2" for i in range(3)]
  short += [f"--config.stages[{i}].length=48" for i in range(3)]
  call = lambda *args: commands.call(
    tmp_path, env, config, "--config.data.max_documents=12", *short, *args
  )
  last = "--config.stages[2].block_length=8"
  done = call("--config.init_from=hf:model", "--workdir=run", last)
  assert done.returncode == 0, done.stderr
  assert "by block of 4" in done.stdout and "by block of 16" in done.stdout
  model = mdm_jax.load(str(tmp_path / "run"))
  assert model.config.model.shift_outputs
  assert model.generate("the", num_steps=3).texts


@pytest.mark.slow
def test_the_config_of_lora_trains_what_is_added_to_an_imported_model(tmp_path):
  env = commands.environment(tmp_path / "cache")
  harness.save(tmp_path / "model", {})
  lines = [
    json.dumps({"prompt": f"{i} and then ", "completion": f"{i + 1}"})
    for i in range(100)
  ]
  (tmp_path / "exchanges.jsonl").write_text("\n".join(lines))
  config = f"--config={ROOT / 'configs' / 'lora.py'}:quick"
  given = "--config.init_from=hf:model", "--workdir=run"
  done = commands.call(tmp_path, env, config, *given)
  assert done.returncode == 0, done.stderr
  results = json.loads((tmp_path / "run" / "results.json").read_text())
  assert np.isfinite(results["nll_per_token"])
  config = Workdir(tmp_path / "run").read_config()
  assert config.model.lora.rank == 8 and config.model.embed_dim == 16


def test_other_sizes_are_refused_by_name(tmp_path, mesh):
  harness.save(tmp_path, {})
  config = imported_model.config_of(f"hf:{tmp_path}")
  model = dataclasses.replace(config.model, num_layers=3)
  config = dataclasses.replace(config, model=model)
  with pytest.raises(UserError, match="model.num_layers=3, but .* has 2"):
    imported_model.load_imported(f"hf:{tmp_path}", config)


def test_a_config_takes_the_sizes_and_says_what_it_replaces(tmp_path):
  harness.save(tmp_path, harness.QWEN3)
  given = Config(
    init_from=f"hf:{tmp_path}",
    model=ModelConfig(num_layers=5, embed_dim=16, num_heads=4, dtype="float32"),
  )
  workdir = Workdir(tmp_path / "none")
  with console.capture() as said:
    found = command_line.with_imported_sizes(given, workdir)
  assert found.model.num_layers == 2 and found.model.dtype == "float32"
  assert "not used num_layers=5\n" in said.get()
  plain = dataclasses.replace(given, init_from="")
  assert command_line.with_imported_sizes(plain, workdir) == plain


def test_outputs_are_shifted_if_either_side_says_so():
  plain, shifted = ModelConfig(), ModelConfig(shift_outputs=True)
  merge = imported_model.with_sizes
  assert merge(shifted, plain).shift_outputs
  assert merge(plain, shifted).shift_outputs
  assert not merge(plain, plain).shift_outputs
  with pytest.raises(UserError, match="set model.shift_outputs=False"):
    Config(model=shifted, objective=AutoregressiveConfig(name="autoregressive"))


def test_a_plan_has_the_rows_of_its_vocabulary_and_reads_no_weights(tmp_path):
  harness.save(tmp_path, {})
  (tmp_path / "model.safetensors").unlink()
  config = imported_model.config_of(f"hf:{tmp_path}")
  mesh = planned_mesh(MeshConfig(fsdp=2))
  assert fit.blueprint(config, mesh).vocab.size == harness.ROWS
  # JAX's own attention mixes dtypes.
  with console.capture() as said, jax.numpy_dtype_promotion("standard"):
    held = fit.plan_mesh(config, "2", None)["held"]
  # Every number thrice, for Adam, and in the average: on one of two devices.
  assert sum(held.values()) > 13_520 * 4 * 4 / 2
  assert "13,520 parameters" in said.get()
