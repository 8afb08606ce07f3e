"""Noise schedules and the distribution of mask rates in each stage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.config import Config
from mdm_jax.objectives import noise
from mdm_jax.objectives.config import MaskedStage, NoiseConfig

SCHEDULES = [noise.linear, noise.cosine, noise.polynomial(3.0)]
RANGES = [
  noise.RateRange(0.05, 0.2, 0.25),
  noise.RateRange(0.75, 0.9, 0.5),
  noise.RateRange(0.0, 1.0, 0.3),
  noise.RateRange(0.3, 0.6, 1.0),
]
UNIFORMS = (np.arange(200_000, dtype=np.float32) + 0.5) / 200_000


def _drawn(rates):
  """Rates at evenly spaced uniforms, and their inverse densities."""
  both = jax.jit(lambda u: (rates.rate(u), rates.inverse_density(u)))
  return map(np.asarray, both(UNIFORMS))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_alpha_runs_from_one_to_zero(schedule):
  alpha = np.asarray(jax.jit(schedule)(np.linspace(0, 1, 101, dtype="f4")))
  np.testing.assert_allclose(alpha[[0, -1]], [1, 0], atol=1e-6)
  assert (np.diff(alpha) < 0).all()


@pytest.mark.parametrize(
  "schedule, slope",
  [
    (noise.linear, lambda t: -np.ones_like(t)),
    (noise.cosine, lambda t: -np.pi / 2 * np.cos(np.pi / 2 * t)),
    (noise.polynomial(3.0), lambda t: -3 * t**2),
  ],
)
def test_the_inverse_density_of_rates_is_the_slope_of_alpha(schedule, slope):
  t = np.linspace(0.01, 0.99, 50, dtype=np.float32)
  found = jax.jit(noise.ScheduledRates(schedule).inverse_density)(t)
  np.testing.assert_allclose(found, -slope(t), rtol=1e-5)


@pytest.mark.parametrize("rates", RANGES)
def test_rates_follow_the_mixture(rates):
  u = np.linspace(0, 1, 100_001, dtype=np.float32)
  r = np.asarray(jax.jit(rates.rate)(u))
  assert r.min() >= 0 and r.max() <= 1
  assert (np.diff(r) >= -1e-6).all()
  inside = ((r >= rates.low) & (r <= rates.high)).mean()
  width = rates.high - rates.low
  expected = rates.rehearsal * width + 1 - rates.rehearsal
  np.testing.assert_allclose(inside, expected, atol=1e-3)


@pytest.mark.parametrize("rates", RANGES)
def test_inverse_density_makes_rates_uniform(rates):
  """Weighted by 1/p, every test function has its mean over U(0, 1)."""
  r, w = _drawn(rates)
  assert w.max() <= 1 / rates.rehearsal + 1e-4
  for power in range(4):
    mean = (w * r**power).mean()
    np.testing.assert_allclose(mean, 1 / (power + 1), atol=2e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_scheduled_rates_are_one_minus_alpha(schedule):
  r, w = _drawn(noise.ScheduledRates(schedule))
  alpha = np.asarray(jax.jit(schedule)(UNIFORMS))
  np.testing.assert_allclose(r, 1 - alpha, rtol=1e-6)
  mean = (w * r**2).mean()
  np.testing.assert_allclose(mean, 1 / 3, atol=2e-3)


def test_no_rehearsal_stays_inside_the_range():
  rates = noise.RateRange(0.05, 0.2)
  r = rates.rate(jnp.array([0.0, 1e-7, 0.5, 1.0]))
  np.testing.assert_allclose(r, [0.05, 0.05, 0.125, 0.2], atol=1e-6)
  np.testing.assert_allclose(
    rates.inverse_density(jnp.array([0.0, 1.0])), 0.15, rtol=1e-5
  )


def test_stage_rates_reads_the_config():
  stage = MaskedStage(mask_rate=(0.4, 0.6), rehearsal=0.1)
  got = noise.stage_rates(stage, NoiseConfig())
  assert got == noise.RateRange(0.4, 0.6, 0.1)
  free = noise.stage_rates(MaskedStage(), NoiseConfig(schedule="cosine"))
  assert free == noise.ScheduledRates(noise.cosine)
  poly = NoiseConfig(schedule="polynomial", exponent=3.0)
  rates = noise.stage_rates(MaskedStage(), poly)
  assert rates.rate(jnp.float32(0.5)) == 0.5**3


def test_a_schedule_of_a_users_own_is_found_by_its_name():
  @noise.SCHEDULES.register("steep")
  def steep(config):
    return noise.polynomial(2 * config.exponent)

  config = NoiseConfig(schedule="steep", exponent=3.0)
  rates = noise.stage_rates(MaskedStage(), config)
  assert rates.rate(jnp.float32(0.5)) == 0.5**6
  assert Config(noise=config).noise.schedule == "steep"
