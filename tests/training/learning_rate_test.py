"""The learning rate of every update."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.config import Config
from mdm_jax.data.config import DataConfig, StageConfig
from mdm_jax.training.config import OptimizerConfig
from mdm_jax.training.curriculum import make_curriculum
from mdm_jax.training.learning_rate import (
  learning_rate_schedule,
  warmup_updates,
)

LR = OptimizerConfig(learning_rate=1e-3, warmup_steps=10, min_lr_ratio=0.05)
STAGES = tuple(
  StageConfig(updates=n, lr_factor=f)
  for n, f in ((40, 1.0), (50, 0.8), (60, 0.5))
)


def curriculum(stages=STAGES):
  config = Config(stages=stages, data=DataConfig(batch_size=8))
  return make_curriculum(
    config.stages, [100] * len(stages), config.rows_per_update
  )


@pytest.fixture
def rates():
  schedule = learning_rate_schedule(LR, curriculum())
  return np.asarray(jax.vmap(schedule)(jnp.arange(150)))


def test_warmup_is_linear_and_happens_once(rates):
  np.testing.assert_allclose(
    rates[:10], 1e-3 * np.arange(1, 11) / 10, rtol=1e-5
  )
  np.testing.assert_allclose(rates[10], 1e-3, rtol=1e-5)


@pytest.mark.parametrize("start, factor", [(40, 0.8), (90, 0.5)])
def test_every_stage_starts_at_its_own_peak(rates, start, factor):
  """The guide's origin applied its factors to the first stage only."""
  np.testing.assert_allclose(rates[start], factor * 1e-3, rtol=1e-5)


def test_every_cycle_ends_at_the_floor_and_never_jumps_back(rates):
  """The origin's rate went back to its peak before each stage's end."""
  for start, end in ((10, 40), (40, 90), (90, 150)):
    assert (np.diff(rates[start:end]) <= 1e-12).all()
    np.testing.assert_allclose(rates[end - 1], 5e-5, rtol=1e-4)


def test_a_warmup_past_the_first_stage_ramps_to_the_stage_it_ends_in():
  stages = tuple(StageConfig(updates=n) for n in (5, 200))
  rates = np.asarray(
    jax.vmap(learning_rate_schedule(LR, curriculum(stages)))(jnp.arange(205))
  )
  assert (np.diff(rates[:10]) > 0).all()
  np.testing.assert_allclose(rates[10], 1e-3, rtol=1e-5)
  np.testing.assert_allclose(rates[-1], 5e-5, rtol=1e-4)


def test_a_warmup_longer_than_the_run_is_cut():
  config = OptimizerConfig(warmup_steps=1500)
  assert warmup_updates(config, curriculum()) == 150 // 4
  assert warmup_updates(LR, curriculum()) == 10


def test_updates_follow_from_epochs():
  stages = (StageConfig(epochs=2.5), StageConfig(epochs=0.01))
  config = Config(stages=stages, data=DataConfig(batch_size=8))
  plan = make_curriculum(config.stages, [100, 100], config.rows_per_update)
  assert [(s.start, s.end) for s in plan.stages] == [(0, 32), (32, 33)]
  assert plan.stage_at(31).index == 0
  assert plan.stage_at(32).index == plan.stage_at(99).index == 1
