import pytest

from mdm_jax import plan
from mdm_jax.core.config import Config, StageConfig
from mdm_jax.core.progress import duration
from mdm_jax.model.denoiser import Denoiser


def stages(*rates, rehearsal=0.0):
  return Config(
    stages=tuple(StageConfig(mask_rate=r, rehearsal=rehearsal) for r in rates)
  )


def test_rates_that_no_stage_trains_are_named():
  config = stages((0.75, 0.9), (0.4, 0.6), (0.05, 0.2))
  (warning,) = plan.uncovered_rates(config)
  assert "0.00-0.05, 0.20-0.40, 0.60-0.75, 0.90-1.00" in warning
  assert "rehearsal" in warning


@pytest.mark.parametrize(
  "config",
  [
    stages(None),
    stages((0.05, 0.2), rehearsal=0.1),
    stages((0.0, 0.5), (0.4, 1.0)),
  ],
)
def test_full_coverage_is_no_warning(config):
  assert plan.uncovered_rates(config) == []


def test_parameters_are_counted(mesh, tiny_model):
  denoiser = Denoiser(tiny_model, vocab_size=32, num_real=28)
  width, layers, hidden = 16, 2, 64
  attention = 4 * width * width + 2 * (width // 2)
  block = attention + 3 * width * hidden + 2 * width
  assert plan.num_params(denoiser) == 32 * width + layers * block + width


@pytest.mark.parametrize(
  "seconds, text",
  [(0.0, "0:00"), (65.9, "1:05"), (3723.0, "1:02:03"), (-1.0, "0:00")],
)
def test_durations(seconds, text):
  assert duration(seconds) == text
