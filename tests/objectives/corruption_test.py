"""Masks: how many tokens, which positions, and rates stratified over rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.core import rng
from mdm_jax.objectives import corruption, noise

MASK = 99
num_masked = jax.jit(corruption.num_masked)
uniforms = jax.jit(corruption.stratified_uniforms, static_argnums=1)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def corrupt(rate, rows=64, length=50, padding=0, seed=0):
  x0 = jnp.arange(rows * length).reshape(rows, length) % 90
  real = jnp.broadcast_to(jnp.arange(length) < length - padding, x0.shape)
  keys = rng.per_row(rng.stream(seed, "mask"), jnp.arange(rows))
  rate = jnp.broadcast_to(jnp.asarray(rate, jnp.float32), (rows,))
  return x0, real, corruption.corrupt(keys, x0, real, rate, MASK)


def test_time_zero_is_the_identity():
  x0, _, out = corrupt(1 - noise.cosine(jnp.zeros(())))
  np.testing.assert_array_equal(out.xt, x0)
  assert not out.masked.any()


@pytest.mark.parametrize("padding", [0, 7])
def test_time_one_masks_every_real_token_and_no_padding(padding):
  x0, real, out = corrupt(1 - noise.linear(jnp.ones(())), padding=padding)
  np.testing.assert_array_equal(out.masked, real)
  np.testing.assert_array_equal(out.xt, jnp.where(real, MASK, x0))


@pytest.mark.parametrize(
  "schedule", [noise.linear, noise.cosine, noise.polynomial(2.0)]
)
def test_realised_rate_is_one_minus_alpha(schedule):
  rows, length = 64, 1000
  for t in (0.03, 0.3, 0.5, 0.9):
    rate = 1 - schedule(jnp.asarray(t))
    _, _, out = corrupt(rate, rows, length)
    sigma = float(jnp.sqrt(rate * (1 - rate) / (rows * length)))
    # Rounding a count up adds at most 1 / length, half of that on average.
    assert abs(out.masked.mean() - rate) < 3 * sigma + 1 / length


def test_positions_are_masked_equally_often():
  _, _, out = corrupt(0.3, rows=4000, length=20)
  share = out.masked.mean(axis=0)
  sigma = np.sqrt(0.3 * 0.7 / 4000)
  assert abs(share - 0.3).max() < 4.5 * sigma


def test_at_least_one_token_is_masked():
  _, _, out = corrupt(1e-6)
  np.testing.assert_array_equal(out.masked.sum(axis=1), 1)


def test_counts_are_uniform_when_rates_are():
  """r ~ U(0, 1) must ask for 1, 2, ..., n masked tokens equally often."""
  rates = jnp.linspace(0, 1, 5001)[1:] - 0.5 / 5000
  counts = num_masked(rates, jnp.full(5000, 10))
  np.testing.assert_array_equal(jnp.bincount(counts, length=11)[1:], 500)


def test_whole_counts_are_not_rounded_up():
  rates = np.arange(1, 21, dtype=np.float32) / 20
  counts = num_masked(rates, np.full(20, 20))
  np.testing.assert_array_equal(counts, np.arange(1, 21))


def test_a_rows_mask_depends_on_its_key_alone():
  _, _, whole = corrupt(0.4)
  _, _, part = corrupt(0.4, rows=8)
  np.testing.assert_array_equal(whole.masked[:8], part.masked)
  _, _, other = corrupt(0.4, seed=1)
  assert (whole.masked != other.masked).any()


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 12, 16])
def test_strata_are_a_permutation(rows):
  assert sorted(corruption.strata(rows)) == list(range(rows))


def test_aligned_runs_spread_over_the_strata():
  for run in corruption.strata(16).reshape(4, 4):
    assert sorted(run // 4) == [0, 1, 2, 3]


def test_uniforms_fall_one_in_each_stratum():
  u = np.asarray(uniforms(rng.stream(0, "rate", 3), 16))
  assert u.min() > 0 and u.max() <= 1
  np.testing.assert_array_equal(np.ceil(u * 16) - 1, corruption.strata(16))


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_uniform_rates_mask_half_of_every_group_of_rows(groups):
  """Two neighbours' rates always add up to the same: no room is needed."""
  rates = noise.RateRange(0.0, 1.0)
  u = uniforms(rng.stream(0, "rate", 1), 16)
  pairs = np.asarray(u).reshape(8, 2).sum(axis=1)
  strata = corruption.strata(16).reshape(8, 2).sum(axis=1)
  np.testing.assert_allclose(pairs, (strata + 1) / 16, rtol=1e-6)
  bound = corruption.max_masked(rates, 16, 4096, groups)
  half = (strata + 1).reshape(groups, -1).sum(axis=1).max() / 16 * 4096
  spare = 16 / groups * (4096 / 16 / corruption._INTERVALS + 1)
  assert half <= bound <= half + spare


@pytest.mark.parametrize("groups", [1, 2, 4, 16])
@pytest.mark.parametrize(
  "rates",
  [noise.RateRange(0.05, 0.2, 0.25), noise.ScheduledRates(noise.cosine)],
)
def test_bound_on_masked_tokens_holds_and_is_near(rates, groups):
  bound = corruption.max_masked(rates, 16, 640, groups)
  offsets = np.append(np.linspace(0.001, 1, 200), 0.5).astype(np.float32)
  stratum = corruption.strata(16).astype(np.float32)

  @jax.jit
  @jax.vmap
  def counts(offset):
    u = (stratum + corruption._offsets(offset, 16)) / 16
    return corruption.num_masked(rates.rate(u), jnp.full(16, 640))

  by_group = np.asarray(counts(offsets)).reshape(len(offsets), groups, -1)
  most = by_group.sum(axis=2).max()
  assert 0.98 * bound <= most <= bound


def test_the_bounds_offsets_are_those_that_are_drawn():
  key = rng.stream(0, "rate", 5)
  offset = 1 - jax.random.uniform(key)
  u = (corruption.strata(16) + np.asarray(corruption._offsets(offset, 16))) / 16
  np.testing.assert_allclose(
    corruption.stratified_uniforms(key, 16), u, rtol=1e-6
  )


def test_streams_differ_by_name_and_counters():
  keys = [
    rng.stream(0, "mask", 1),
    rng.stream(0, "mask", 2),
    rng.stream(0, "rate", 1),
    rng.stream(1, "mask", 1),
  ]
  data = {tuple(np.asarray(jax.random.key_data(k))) for k in keys}
  assert len(data) == len(keys)
