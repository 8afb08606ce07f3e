"""Ways to draw masks: all estimate the bound, and how far they spread."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.core import rng
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.model.config import ModelConfig
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.studies import variance
from mdm_jax.studies.mask_ways import LIBRARY, WAYS
from mdm_jax.studies.variance import Moments, Size

N = 3  # tokens that may be masked, and one of padding
DRAWS = 1 << 14
PATTERNS = [p for p in itertools.product((0, 1), repeat=N) if any(p)]


def _drawn(way, rows=1, seed=0):
  """Masks [D, C, R, N] and weights [D, C, R] of many draws."""
  real = jnp.arange(N + 1)[None].repeat(rows, 0) < N
  keys = jax.random.split(jax.random.key(seed), DRAWS)
  draw = jax.jit(jax.vmap(lambda key: _parts(way.draw(key, real))))
  masked, weight = map(np.asarray, draw(keys))
  assert not masked[..., N].any()  # padding
  return masked[..., :N], weight


def _parts(drawn):
  return drawn.masked, drawn.weight


@pytest.mark.parametrize("name", WAYS)
def test_each_set_of_masked_tokens_has_its_weight_in_the_bound(name):
  # The bound is a sum over sets of masked tokens. A set of k of n has the
  # weight n / k x 1 / n / C(n, k): then its expectation is the bound.
  masked, weight = _drawn(WAYS[name])
  for pattern in PATTERNS:
    k = sum(pattern)
    is_it = (masked == np.array(pattern)).all(axis=-1)
    each = np.where(is_it, weight, 0).sum(axis=(1, 2))
    expected = 1 / k / [1, N, 3, 1][k]
    error = each.std() / DRAWS**0.5
    assert abs(each.mean() - expected) < 4 * error + 1e-3, pattern


@pytest.mark.parametrize("name", [n for n in WAYS if "complements" in n])
def test_complements_mask_each_token_once(name):
  masked, _ = _drawn(WAYS[name], rows=2)
  np.testing.assert_array_equal(masked.sum(axis=1), 1)


def _spread(name, cost, rows=8):
  """Standard deviation of a way's estimate, if the cost is this."""
  masked, weight = _drawn(WAYS[name], rows)
  share = masked.mean(axis=-1)
  total = (weight * cost(share) * masked.sum(axis=-1)).sum(axis=(1, 2))
  return (total / rows / N).std()


def test_exact_counts_have_no_variance_if_all_rates_cost_the_same():
  same = lambda share: 1.0
  assert _spread("counts", same) < 1e-6
  assert _spread("coins", same) > 0.1
  assert _spread("complements", same) > 0.01


def test_stratified_and_paired_rates_spread_less():
  # A cost that rises with the share of masked tokens, as a model's does.
  rises = lambda share: share
  alone, stratified = _spread("counts", rises), _spread(LIBRARY, rises)
  assert stratified < alone / 2
  paired = _spread("r and 1 - r", rises)
  assert paired < alone / 2


def test_moments_are_those_of_the_estimates_gradients(mesh):
  config = ModelConfig(num_layers=1, embed_dim=8, num_heads=2)
  denoiser = Denoiser(config, Vocabulary(8, forbidden=((5, 8),)))
  params = jax.jit(denoiser.init)(rng.stream(0, "init"))
  rows = np.arange(8).reshape(2, 4) % 5
  way = WAYS[LIBRARY]
  one = lambda p, *drawn: variance.estimate(denoiser, 6, way, p, *drawn)
  keys = jax.random.split(jax.random.key(0), 5)
  again = jnp.asarray(np.tile(rows, (5, 1, 1)), jnp.int32)
  drawn = again, jnp.ones_like(again)
  run = jax.jit(variance.moments, static_argnums=0)
  found = run(one, params, keys, drawn)
  each = jax.jit(jax.value_and_grad(one))
  values, gradients = zip(
    *(each(params, k, again[0], drawn[1][0]) for k in keys), strict=True
  )
  flat = np.stack(
    [
      np.concatenate([x.ravel() for x in map(np.asarray, jax.tree.leaves(g))])
      for g in gradients
    ]
  )
  noise = flat.var(axis=0, ddof=1).sum()
  signal = (flat.mean(axis=0) ** 2).sum() - noise / 5
  expected = np.mean(values), np.var(values, ddof=1), noise, signal
  np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_estimates_read_as_many_rows_in_all():
  size = Size(rows=4, draws=3, repeats=2)
  shape = lambda calls, kind: variance._choose(20, size, calls, kind, 0).shape
  assert shape(1, "same") == shape(1, "other") == (3, 8)
  assert shape(2, "same") == shape(2, "other") == (3, 4)
  once = variance._choose(20, size, 1, "same", 0)
  assert len(set(once.ravel().tolist())) == 4
  assert len(set(variance._choose(20, size, 1, "other", 0)[0].tolist())) == 8


def test_the_table_compares_with_the_library():
  moments = lambda variance, noise: [Moments(1.0, variance, noise, 1.0)] * 2
  both = lambda *args: {kind: moments(*args) for kind in ("same", "other")}
  lines = variance.cells({"coins": both(0.04, 6.0), LIBRARY: both(0.01, 2.0)})
  assert lines[0][:3] == ["coins", "0.200 ± 0.000", "3.00 ± 0.00"]
  assert lines[1][2] == "1.00 ± 0.00"


def test_too_few_rows_are_refused():
  Size(4, 2, 2).check(8)
  with pytest.raises(variance.UserError, match="set --rows=3"):
    Size(4, 2, 2).check(7)
