"""Clipped mask rates: what is drawn, and how noisy its loss is."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from mdm_jax.config import Config
from mdm_jax.core import rng
from mdm_jax.core.errors import UserError
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data.config import DataConfig, StageConfig
from mdm_jax.data.rows import Rows
from mdm_jax.model.config import ModelConfig
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.objectives.config import (
  AutoregressiveConfig,
  BlockConfig,
  BlockStage,
)
from mdm_jax.studies import clipped
from mdm_jax.studies.variance import Moments

VOCAB = Vocabulary(8, forbidden=((5, 8),), mask=6, pad=7)
CONFIG = Config(
  data=DataConfig(batch_size=2),
  model=ModelConfig(num_layers=1, embed_dim=8, num_heads=2),
  objective=BlockConfig(name="block", block_length=4, weighting="nelbo"),
  stages=(StageConfig(length=8, objective=BlockStage()),),
)
ROWS = Rows(
  np.arange(48, dtype=np.uint8).reshape(6, 8) % 5, np.ones((6, 8), np.uint16)
)


def test_a_uniform_model_has_the_loss_of_its_clip_and_no_variance(mesh):
  """Each masked token costs log 5, whatever else is masked."""
  denoiser = Denoiser(CONFIG.model, VOCAB)
  params = jax.jit(denoiser.init)(rng.stream(0, "init"))
  params = jax.tree.map(lambda p: 0 * p, params)
  low, high = clip = 0.25, 0.75
  found = clipped.measure(CONFIG, denoiser, params, ROWS, (clip,), 3, 2)
  for one in found[clip]:
    # With the weights of the bound: its integral over the clip.
    assert one.estimate == pytest.approx((high - low) * math.log(5), rel=1e-5)
    assert one.variance < 1e-10


def test_rates_are_those_of_the_clip():
  objective, plan = clipped.clipped(CONFIG, VOCAB, (0.5, 1.0))
  assert (objective.rates.low, objective.rates.high) == (0.5, 1.0)
  assert objective.rates.rehearsal == 0 and objective.block == 4
  assert plan.rows == 2


def test_gradients_are_compared_with_the_first_clips():
  moments = lambda noise: [Moments(1.0, 0.04, noise, 1.0)] * 2
  found = {(0.0, 1.0): moments(2.0), (0.5, 1.0): moments(3.0)}
  first, line = clipped.cells(found)
  assert line[:3] == ["0.5 to 1", "1.000 ± 0.000", "0.200 ± 0.000"]
  assert (first[3], line[3]) == ("1.00 ± 0.00", "1.50 ± 0.00")


def test_what_has_no_clip_is_refused():
  assert clipped.parsed(["0:1", "0.3:0.8"]) == ((0.0, 1.0), (0.3, 0.8))
  for word in ("0.8:0.3", "0.3", "a:1", "0:2"):
    with pytest.raises(UserError, match="--clips: .* 0.3:0.8"):
      clipped.parsed([word])
  ours = dataclasses.replace(
    CONFIG,
    objective=AutoregressiveConfig(name="autoregressive"),
    stages=(StageConfig(length=8),),
  )
  stage = dataclasses.replace(ours.stages[0], objective=None)
  ours = dataclasses.replace(ours, stages=(stage,))
  with pytest.raises(UserError, match="has no mask rates to clip"):
    clipped.clipped(ours, VOCAB, (0.0, 1.0))
