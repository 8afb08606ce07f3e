"""Schedules as tables of whole numbers, and what a budget allows."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampling_harness as harness
from hypothesis import given, settings
from hypothesis import strategies as st

from mdm_jax.core.errors import UserError
from mdm_jax.objectives.measured import Curve
from mdm_jax.sampling import schedule
from mdm_jax.sampling.config import SampleConfig

within = jax.jit(schedule.within_entropy, static_argnums=1)
KINDS = {"linear": schedule.linear, "cosine": schedule.cosine}


def losses(length, seed=0):
  """A curve that falls, not evenly."""
  drops = np.random.default_rng(seed).gamma(0.5, size=length)
  return drops[::-1].cumsum()[::-1].copy()


# MARK: shares


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 2, 3, 20, 25])
def test_shares_rise_from_none_to_all(kind, steps):
  shares = KINDS[kind](steps)
  assert (shares[0], shares[-1], len(shares)) == (0, 1, steps + 1)
  assert (np.diff(shares) > 0).all()


def test_linear_is_even_and_cosine_is_slow_at_first():
  np.testing.assert_allclose(np.diff(schedule.linear(20)), 1 / 20)
  np.testing.assert_allclose(
    schedule.cosine(3), [0, 1 - np.sqrt(3) / 2, 0.5, 1], atol=1e-12
  )


# MARK: tables


def plain_spread(counts):
  """What `without_idle_steps` promises, for the counts of one row."""
  steps, free = len(counts) - 1, counts[-1]
  if free <= steps:
    return [max(0, free - (steps - i)) for i in range(steps + 1)]
  result = [0]
  for i in range(1, steps + 1):
    result.append(max(counts[i], result[-1] + 1))
  return [min(c, free - (steps - i)) for i, c in enumerate(result)]


@given(
  kind=st.sampled_from(["linear", "cosine", "optimal", "random"]),
  steps=st.integers(1, 40),
  length=st.integers(1, 90),
  seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_every_row_is_revealed_step_by_step(kind, steps, length, seed):
  if kind == "random":
    cuts = np.random.default_rng(seed).random(steps - 1)
    shares = np.concatenate([[0.0], np.sort(cuts), [1.0]])
  elif kind == "optimal":
    shares = schedule.optimal(losses(length, seed), steps)
  else:
    shares = KINDS[kind](steps)
  counts = schedule.table(shares, length)
  np.testing.assert_array_equal(counts[0], 0)
  np.testing.assert_array_equal(counts[-1], np.arange(length + 1))
  spread = schedule.without_idle_steps(counts)
  assert spread.shape == (steps + 1, length + 1)
  for n in range(length + 1):
    each = np.diff(spread[:, n])
    assert (spread[0, n], spread[-1, n]) == (0, n)
    assert each.min(initial=1) >= (1 if n >= steps else 0)
    assert n > steps or each.max(initial=0) <= 1
    assert spread[:, n].tolist() == plain_spread(counts[:, n].tolist())
    if np.diff(counts[:, n]).min() > 0:
      np.testing.assert_array_equal(spread[:, n], counts[:, n])


@pytest.mark.parametrize("steps", range(1, 41))
def test_a_linear_table_is_exact_in_whole_numbers(steps):
  """Also where a share times a length is whole but for rounding."""
  counts = schedule.table(schedule.linear(steps), 200)
  i, n = np.arange(steps + 1)[:, None], np.arange(201)
  np.testing.assert_array_equal(counts, i * n // steps)


def test_an_optimal_table_keeps_its_parts():
  for length, steps in itertools.product([5, 64, 100, 127], [1, 3, 20, 64]):
    shares = schedule.optimal(losses(length), steps)
    bounds = np.round(shares * length).astype(int)
    counts = schedule.table(shares, length)[:, length]
    np.testing.assert_array_equal(counts, bounds)
    np.testing.assert_allclose(shares * length, bounds, atol=1e-9)


def test_a_pace_is_the_table_of_its_schedule():
  for kind, steps in itertools.product(KINDS, [1, 7, 20]):
    config = SampleConfig(schedule=kind, num_steps=steps)
    pace = schedule.pace(config, 30)
    counts = schedule.table(KINDS[kind](steps), 30)
    want = schedule.without_idle_steps(counts)
    np.testing.assert_array_equal(pace.revealed, want)
    assert pace.put_back.shape == (steps, 31)
    assert (pace.put_back == 0).all()


def test_an_optimal_pace_follows_from_a_curve():
  config = SampleConfig(schedule="optimal", num_steps=5)
  curve = Curve((0.1, 0.5, 1.0), (1.0, 2.0, 6.0), "loss")
  pace = schedule.pace(config, 30, curve)
  shares = schedule.optimal(schedule.losses_by_revealed(curve, 30), 5)
  np.testing.assert_array_equal(
    pace.revealed[:, 30], np.round(shares * 30).astype(int)
  )
  with pytest.raises(UserError, match="--mode=eval") as error:
    schedule.pace(config, 30, None)
  assert "\n" not in str(error.value)


# MARK: the expected divergence


def test_the_divergence_is_what_each_step_does_not_see():
  h = np.array([5.0, 3.0, 2.0, 2.0])
  cost = lambda *bounds: harness.expected_divergence(h, np.array(bounds))
  assert cost(0, 1, 2, 3, 4) == 0
  assert cost(0, 4) == 0 + 2 + 3 + 3
  assert cost(0, 2, 4) == (0 + 2) + (0 + 0)
  assert cost(0, 1, 4) == 0 + (0 + 1 + 1)
  assert cost(0, 0, 2, 2, 4) == cost(0, 2, 4)


@pytest.mark.parametrize("length", [1, 2, 5, 9])
@pytest.mark.parametrize("seed", range(3))
def test_optimal_is_the_least_over_all_schedules(length, seed):
  h = losses(length, seed)
  for steps in range(1, length + 3):
    shares = schedule.optimal(h, steps)
    assert len(shares) == steps + 1
    bounds = np.round(shares * length).astype(np.int64)
    inner = itertools.combinations(range(1, length), min(steps, length) - 1)
    costs = [
      harness.expected_divergence(h, np.array([0, *cuts, length]))
      for cuts in inner
    ]
    got = harness.expected_divergence(h, bounds)
    np.testing.assert_allclose(got, min(costs), atol=1e-12)
    assert bounds[0] == 0 and bounds[-1] == length


def test_optimal_is_no_worse_than_the_others():
  for seed in range(5):
    h = losses(128, seed)
    cost = lambda shares, h=h: harness.expected_divergence(
      h, schedule.table(shares, 128)[:, 128].astype(np.int64)
    )
    best = cost(schedule.optimal(h, 20))
    assert best < min(cost(schedule.linear(20)), cost(schedule.cosine(20)))


def test_losses_lie_between_the_measured_rates():
  curve = Curve((0.2, 0.6, 1.0), (1.0, 3.0, 4.0), "loss")
  got = schedule.losses_by_revealed(curve, 10)
  # masked: 1.0, 0.9, ..., 0.1
  want = [4, 3.75, 3.5, 3.25, 3, 2.5, 2, 1.5, 1, 1]
  np.testing.assert_allclose(got, want)


def test_losses_never_rise_with_what_is_revealed():
  curve = Curve((0.1, 0.5, 0.9, 1.0), (2.0, 1.0, 5.0, 4.0), "loss")
  got = schedule.losses_by_revealed(curve, 10)
  assert (np.diff(got) <= 0).all()
  assert (got[0], got[-1]) == (4.0, 1.0)


# MARK: budgets


def plain_within(entropies, bound):
  kept = [
    sum(entropies[: n + 1]) - max(entropies[: n + 1]) <= bound
    for n in range(len(entropies))
  ]
  first = kept.index(False) if False in kept else len(kept)
  return [n < first for n in range(len(kept))]


def some_entropies(rows=200, length=9):
  """Eighths, whose sums have no rounding; every row by another measure."""
  numbers = np.random.default_rng(0)
  most = numbers.integers(1, 20, (rows, 1))
  return numbers.integers(0, most, (rows, length)).astype(np.float32) / 8


@pytest.mark.parametrize("bound", [0.0, 0.25, 1.0, 3.0, 100.0])
def test_a_bound_takes_the_longest_prefix_of_each_row(mesh, bound):
  entropies = some_entropies()
  got = within(jnp.asarray(entropies), bound)
  want = [plain_within(row, bound) for row in entropies.tolist()]
  np.testing.assert_array_equal(got, want)


def test_a_bound_of_nothing_takes_one_token_and_certain_ones(mesh):
  entropies = jnp.array([[0.7, 0.1, 0.3], [0.0, 0.0, 0.4], [0.5, 0.0, 0.1]])
  got = within(entropies, 0.0)
  want = [[1, 0, 0], [1, 1, 1], [1, 1, 0]]
  np.testing.assert_array_equal(got, np.array(want, bool))


def test_a_larger_bound_takes_no_fewer(mesh):
  entropies = jnp.asarray(some_entropies())
  bounds = np.linspace(0, 5, 6).tolist()
  counts = [np.asarray(within(entropies, b)).sum(axis=1) for b in bounds]
  assert (np.diff(counts, axis=0) >= 0).all()
  assert (counts[0] >= 1).all()
  assert (counts[-1] > counts[0]).any()


def test_positions_that_were_not_scored_are_never_taken(mesh):
  entropies = jnp.array([[0.1, 0.1, jnp.inf, jnp.inf], [jnp.inf] * 4])
  got = np.asarray(within(entropies, 10.0))
  np.testing.assert_array_equal(got[0], [True, True, False, False])
  assert not got[1].any()
