"""Pieces of one's own, outside the package, in every program.

A module in the user's folder registers one of each kind; a config file names
them. Then a run is trained, goes on, is measured and sampled, with nothing but
the names in its folder.
"""

import json

import pytest
from command_harness import call, check_mistake, environment

PIECES = '''
import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import optax

from mdm_jax.core import fields
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data.corpora import CORPORA, Corpus
from mdm_jax.data.text_files import Document
from mdm_jax.data.tokenizer import TOKENIZERS, Kind, Tokenizer
from mdm_jax.evaluation import text_metrics
from mdm_jax.model.kernels import KERNELS, Reference
from mdm_jax.objectives import masked
from mdm_jax.objectives import config as objectives
from mdm_jax.objectives.base import Ratio
from mdm_jax.objectives.noise import SCHEDULES, Polynomial
from mdm_jax.sampling.order import ORDERS, Known
from mdm_jax.training.optimizer import OPTIMIZERS


def counted(rest, tally, form):
  for i in range(int(rest)):
    yield Document(f"number {i}", f"the number {i} is after {i - 1} . " * 9)


CORPORA.register("counted", Corpus(counted, "NUMBER"))


class Halves(Tokenizer):
  """Two ids a byte."""

  kind = "halves"

  def __init__(self):
    pieces = (b"",) * 16 + tuple(bytes([i]) for i in range(256))
    super().__init__(pieces, json.dumps({"kind": "halves"}).encode())

  def encode_batch(self, texts):
    return [np.array([16 + b for b in t.encode()], np.int32) for t in texts]


TOKENIZERS.register(
  "halves",
  Kind(
    build=lambda config, texts: Halves(),
    load=lambda fields: Halves(),
    planned=lambda config: Halves().vocab,
  ),
)


@SCHEDULES.register("steep")
def steep(config):
  return Polynomial(2 * config.exponent)


@ORDERS.register("outward")
@Known
def outward(key, step, length):
  return -jnp.abs(jnp.linspace(-1, 1, length))


@OPTIMIZERS.register("plain")
def plain(config, schedule):
  return optax.sgd(schedule)


@KERNELS.register("own")
class Own(Reference):
  """Counts itself among the kernels."""


@text_metrics.metric("mean_length", "length of a text", "characters")
def mean_length(texts):
  return text_metrics.mean([len(t) for t in texts], texts.documents)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HintsConfig(objectives.MaskedConfig):
  hints: float = fields.field(0.0, "share of masked tokens shown", "[0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hints(masked.Masked):
  """The masked objective where some of what is asked may be seen."""

  hints: float = 0.0

  def examples(self, batch, draws):
    posed = super().examples(batch, draws)
    shown = jnp.roll(posed.asked, 1, axis=-1) & (self.hints > 0)
    tokens = jnp.where(shown, posed.targets, posed.tokens)
    return dataclasses.replace(posed, tokens=tokens)

  def summaries(self, examples, aux):
    shown = (examples.asked & (examples.tokens == examples.targets)).sum()
    own = {"shown": Ratio(shown * 1.0, examples.asked.sum() * 1.0)}
    return super().summaries(examples, aux) | own


def build(config, *args):
  made = masked.build(config, *args)
  told = {f.name: getattr(made, f.name) for f in dataclasses.fields(made)}
  return Hints(**told, hints=config.hints)


objectives.OBJECTIVES.register(
  "hints", objectives.Kind(HintsConfig, objectives.MaskedStage, build)
)
'''
CONFIG = """
from mdm_jax import config as config_lib


def get_config(arg=""):
  config = config_lib.default_config("own_pieces")
  config.data.update(corpus="counted:40", batch_size=4)
  config.tokenizer.kind = "halves"
  config.model.update(num_layers=1, embed_dim=16, num_heads=2, attention="own")
  config.noise.schedule = "steep"
  config.objective.update(name="hints", hints=0.5)
  config.optimizer.update(name="plain", warmup_steps=1)
  config.stages = (config_lib.stage(length=16, updates=4),)
  config.eval.update(rows=4, final_rows=4, masks_per_row=2, samples=2)
  config.train.log_every = 2
  config.sample.update(order="outward", num_steps=4)
  return config_lib.apply_arg(config, arg)
"""
OWN = "--modules=own_pieces"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A folder with the two files and a run, and its environment."""
  folder = tmp_path_factory.mktemp("own")
  (folder / "own_pieces.py").write_text(PIECES)
  (folder / "own.py").write_text(CONFIG)
  env = environment(folder / "cache")
  done = call(folder, env, "--config=own.py", "--workdir=w")
  assert done.returncode == 0, done.stdout + done.stderr
  return folder, env


def test_a_run_of_ones_own_pieces_is_measured(run):
  folder, _ = run
  saved = json.loads((folder / "w" / "config.json").read_text())
  assert saved["modules"] == ["own_pieces"]
  assert (saved["objective"]["name"], saved["objective"]["hints"]) == (
    "hints",
    0.5,
  )
  lines = (folder / "w" / "metrics.jsonl").read_text().splitlines()
  assert any(json.loads(line).get("train/shown", 0) > 0 for line in lines)
  results = json.loads((folder / "w" / "results.json").read_text())
  assert results["text_metrics"]["sampling"]["mean_length"]["value"] > 0


def test_it_goes_on_from_its_folder(run):
  folder, env = run
  more = "--workdir=w", "--config.stages[0].updates=6"
  check_mistake(call(folder, env, *more), "own_pieces", OWN)
  done = call(folder, env, *more, OWN)
  assert done.returncode == 0, done.stdout + done.stderr
  lines = (folder / "w" / "metrics.jsonl").read_text().splitlines()
  assert max(json.loads(line)["step"] for line in lines) == 6


def test_it_is_sampled_from_its_folder(run):
  folder, env = run
  args = "--mode=sample", "--workdir=w", "--num_samples=1", "--json", OWN
  done = call(folder, env, *args)
  assert done.returncode == 0, done.stdout + done.stderr
  assert json.loads(done.stdout.splitlines()[-1])
