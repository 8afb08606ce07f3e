"""The losses of a short run equal those kept in a file.

Packed rows, dropout, smoothing, weights of the bound, rehearsal and two
microbatches, on one device and on eight (alike to 1e-7). After a change that is
meant to alter the losses, write them anew and say so in the commit:

  PYTHONPATH=tests python tests/training/golden_losses_test.py
"""

import json

import jax
import numpy as np
import pytest
from mesh_harness import MESHES, make_mesh
from paths import GOLDEN

from mdm_jax.benchmarks.workload import one_byte_a_token
from mdm_jax.blueprint import make_trainer
from mdm_jax.config import Config
from mdm_jax.data import tokenizer as tokenizers
from mdm_jax.data.config import DataConfig, StageConfig, TokenizerConfig
from mdm_jax.data.prepared import PreparedData
from mdm_jax.data.rows import Rows
from mdm_jax.model.config import ModelConfig
from mdm_jax.objectives.config import MaskedConfig, MaskedStage
from mdm_jax.training.config import OptimizerConfig

PATH = GOLDEN / "losses.json"
UPDATES = 20
CONFIG = Config(
  seed=3,
  data=DataConfig(batch_size=8),
  tokenizer=TokenizerConfig(kind="byte"),
  model=ModelConfig(num_layers=2, embed_dim=16, num_heads=2, dropout=0.1),
  objective=MaskedConfig(weighting="nelbo", label_smoothing=0.1),
  stages=(
    StageConfig(
      length=32,
      updates=UPDATES,
      objective=MaskedStage(mask_rate=(0.4, 0.6), rehearsal=0.25),
    ),
  ),
  # A large eps: near zero gradients Adam would turn rounding into steps.
  optimizer=OptimizerConfig(
    learning_rate=1e-2, warmup_steps=4, accumulation=2, eps=1e-3
  ),
)


def make_rows():
  """Rows of one to three texts, most with padding; letters are uneven."""
  draw = np.random.default_rng(5)
  tokens = (256 * draw.random((64, 32)) ** 3).astype(np.int32)
  segments = np.ones_like(tokens)
  segments[::2, 11:] = 2
  segments[::4, 23:] = 3
  segments[::3, 29:] = 0
  tokenizer = tokenizers.build(CONFIG.tokenizer, [])
  rows = Rows(np.where(segments, tokens, tokenizer.vocab.pad), segments)
  held = one_byte_a_token(rows)
  return PreparedData(tokenizer, (rows,), held, held, {})


def losses(mesh):
  """Returns the loss of every update."""
  with jax.set_mesh(mesh):
    trainer = make_trainer(CONFIG, make_rows(), mesh)
    state, found = trainer.init(), []
    for update in range(UPDATES):
      state, metrics = trainer.update(state, update)
      found.append(float(metrics["loss"]))
  return found


@pytest.mark.parametrize("mesh", MESHES)
def test_losses_are_the_recorded_ones(mesh):
  expected = json.loads(PATH.read_text())
  found = losses(make_mesh(mesh))
  np.testing.assert_allclose(
    found, expected, rtol=1e-5, err_msg=f"see how {__file__} writes them"
  )


if __name__ == "__main__":
  PATH.write_text(json.dumps(losses(make_mesh("1x1")), indent=0) + "\n")
