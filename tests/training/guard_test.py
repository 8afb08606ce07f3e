"""The spike guard: a window of norms, and what never gets into it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.training.config import TrainConfig
from mdm_jax.training.guard import SpikeGuard

GUARD = SpikeGuard(sigmas=3.0, window=8)


@functools.partial(jax.jit, static_argnums=0)
def see(guard, seen, norm):
  """What the train step does with a norm."""
  spike = jnp.isfinite(norm) & guard.is_spike(seen, norm)
  applied = jnp.isfinite(norm) & ~spike
  return guard.remember(seen, norm, applied), spike


def run(norms, guard=GUARD, seen=None):
  seen = guard.init() if seen is None else seen
  spikes = []
  for norm in norms:
    seen, spike = see(guard, seen, jnp.float32(norm))
    spikes.append(bool(spike))
  return jax.device_get(seen), spikes


def reference(norms, sigmas=3.0, window=8):
  """The same in float64, with a list."""
  kept, spikes = [], []
  for norm in norms:
    last = kept[-window:]
    spike = (
      np.isfinite(norm)
      and 2 * len(last) >= window
      and norm > np.mean(last) + sigmas * np.std(last)
    )
    spikes.append(bool(spike))
    if np.isfinite(norm) and not spike:
      kept.append(norm)
  return kept[-window:], spikes


@pytest.mark.parametrize("window", [1, 2, 7, 8])
def test_a_spike_is_by_definition(window):
  """Against a list, with spikes, infinities and NaN strewn in."""
  draw = np.random.default_rng(window)
  norms = np.exp(draw.normal(size=120)).astype(np.float32)
  norms[draw.integers(0, 120, 12)] = np.nan
  norms[draw.integers(0, 120, 6)] = np.inf
  guard = SpikeGuard(1.5, window)
  seen, spikes = run(norms, guard)
  kept, want = reference(norms.astype(np.float64), 1.5, window)
  assert spikes == want and any(spikes)
  assert sorted(seen["norms"]) == sorted(np.float32(kept))


def test_there_is_no_spike_before_the_window_is_half_full():
  assert run([1, 1, 1, 1e6])[1] == [False] * 4
  assert run([1, 1, 1, 1, 1e6])[1] == [False] * 4 + [True]


def test_what_is_not_applied_never_enters_the_window():
  seen, _ = run([1.0, 1.1, 0.9, 1.0, 1.05])
  again, spikes = run([np.nan, np.inf, -np.inf, 1e9], seen=seen)
  assert spikes == [False, False, False, True]
  for name in seen:
    np.testing.assert_array_equal(again[name], seen[name])
  # One that slipped in would hide every spike, for as long as the window is.
  assert run([1e9], seen=again)[1] == [True]


def test_the_oldest_norm_goes_first():
  seen, _ = run(np.linspace(1, 2, 8))
  np.testing.assert_allclose(seen["norms"], np.linspace(1, 2, 8), rtol=1e-6)
  seen, _ = run([1.5, 1.25], seen=seen)
  np.testing.assert_allclose(seen["norms"][:2], [1.5, 1.25])
  np.testing.assert_allclose(seen["norms"][2:], np.linspace(1, 2, 8)[2:])


def test_deviations_survive_large_norms():
  """The mean of squares less the squared mean would be rounding alone."""
  norms = 1e6 + np.array([0, 1, 2, 3, 0, 1, 2, 3])
  assert run([*norms, 1e6 + 4])[1][-1] is False
  assert run([*norms, 1e6 + 6])[1][-1] is True


def test_switched_off_it_carries_nothing():
  guard = SpikeGuard(TrainConfig().spike_sigmas)
  seen = guard.init()
  assert seen == {} and jax.tree.leaves(seen) == []
  assert not guard.is_spike(seen, jnp.float32(np.inf))
  assert guard.remember(seen, jnp.float32(1), jnp.bool_(True)) == {}


def test_switched_on_it_has_a_window():
  assert SpikeGuard(6.0, 32).init()["norms"].shape == (32,)
