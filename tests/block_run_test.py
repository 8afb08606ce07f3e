"""A run of block diffusion that starts from a masked run of our own."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from mdm_jax import train
from mdm_jax.config import Config
from mdm_jax.data.config import DataConfig, StageConfig, TokenizerConfig
from mdm_jax.evaluation.config import EvalConfig
from mdm_jax.model.config import ModelConfig
from mdm_jax.objectives.config import BlockConfig, BlockStage
from mdm_jax.sample import load
from mdm_jax.sampling.config import SampleConfig
from mdm_jax.studies import search, tune
from mdm_jax.trained_model import load_model
from mdm_jax.training.config import OptimizerConfig
from mdm_jax.workdir import Workdir

LENGTH = 32
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
  """The folder of a masked run, its config and its results."""
  folder = tmp_path_factory.mktemp("masked")
  config = Config(
    data=DataConfig(
      corpus="python_docs",
      batch_size=8,
      max_documents=12,
      cache_dir=str(folder / "cache"),
    ),
    tokenizer=TokenizerConfig(kind="byte"),
    model=ModelConfig(num_layers=1, embed_dim=16, num_heads=2),
    stages=(StageConfig(length=LENGTH, updates=60),),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
    eval=EvalConfig(every=0, rows=8, final_rows=8, samples=0),
    sample=SampleConfig(num_steps=4, num_samples=1),
  )
  return folder, config, train(config, str(folder / "run"))


def in_blocks(masked, block, name, **optimizer):
  """A block run from the masked one's weights, of `block` tokens each."""
  folder, config, _ = masked
  stage = dataclasses.replace(config.stages[0], objective=BlockStage())
  config = dataclasses.replace(
    config,
    init_from=str(folder / "run"),
    tokenizer=TokenizerConfig(),  # that of the run it starts from
    objective=BlockConfig(name="block", block_length=block),
    stages=(dataclasses.replace(stage, updates=20),),
    optimizer=dataclasses.replace(config.optimizer, **optimizer),
  )
  return Workdir(folder / name), train(config, str(folder / name))


def losses(path):
  lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
  return [x["train/loss"] for x in lines if "train/loss" in x]


def test_one_block_without_training_is_the_masked_model(masked):
  folder, _, before = masked
  # As good as none: its weights and its bound are those of the masked run.
  run, after = in_blocks(masked, LENGTH, "same", learning_rate=1e-9)
  bound = "nelbo_per_token"
  # Other masks only where a row holds several texts, each a block of its own.
  np.testing.assert_allclose(after[bound], before[bound], rtol=0.01)
  ours, theirs = (load_model(w).params for w in (run, Workdir(folder / "run")))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, theirs
  )


@pytest.fixture(scope="module")
def grown(masked):
  """A run of blocks of 8 tokens, and its results."""
  return in_blocks(masked, 8, "grown", learning_rate=3e-3)


def test_blocks_grow_from_a_masked_run(masked, grown):
  run, results = grown
  # It begins where the masked run has come to, not at the start.
  assert losses(run.path)[0] < losses(masked[0] / "run")[0] - 0.5
  assert np.isfinite(results["nelbo_per_token"])
  text = load(run).generate("The", num_steps=2, seed=1)
  assert text.texts[0].startswith("The")
  # Two steps of each block of 8, and one call for the prompt.
  assert text.calls[0] <= 2 * LENGTH // 8 + 1


def test_its_sampling_is_tuned(grown, monkeypatch):
  run, _ = grown
  whole = search.rounds

  def two_settings(*args):
    first = whole(*args)[0]
    few = lambda best: first.propose(best)[:2]
    return (dataclasses.replace(first, propose=few, texts=2, keep=1),)

  monkeypatch.setattr(search, "rounds", two_settings)
  config = run.read_config()
  config = dataclasses.replace(
    config, eval=dataclasses.replace(config.eval, samples=2)
  )
  found = tune.tune_workdir(config, run)
  assert found["settings"]["num_steps"] == 4  # of a block
  assert {"sampling", "tuned"} <= found["text_metrics"].keys()
