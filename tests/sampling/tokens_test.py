"""Drawing tokens, against distributions and truncations computed by numpy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from mdm_jax.core import rng
from mdm_jax.sampling import confidence, tokens
from mdm_jax.sampling.config import SampleConfig
from mdm_jax.sampling.tokens import Settings

ALL = Settings()


@pytest.fixture
def small_blocks(monkeypatch):
  """Blocks of three tokens, the last one of two or one."""
  monkeypatch.setattr(confidence, "_BLOCK", 3)


@pytest.fixture(params=["candidates", "bisection"])
def any_top_k(request, monkeypatch):
  """Top-k by `lax.top_k`, then by bisection (where 32 k > V)."""
  if request.param == "bisection":
    monkeypatch.setattr(tokens, "_FEW", 0)


def keys_of(count, seed=0):
  return rng.per_row(rng.stream(seed, "draw"), jnp.arange(count))


def log(probs):
  with np.errstate(divide="ignore"):
    return jnp.asarray(np.log(np.asarray(probs, np.float64)), jnp.float32)


@jax.jit
def draw(row_keys, logits, settings):
  """Rows of positions, each with a key that follows from its row's."""
  positions = jnp.arange(logits.shape[1])
  keys = jax.vmap(rng.per_row, (0, None))(row_keys, positions)
  return tokens.draw(keys, logits, settings)


def _draws(keys, logits, settings, _patched):
  one = functools.partial(tokens._draw_one, settings)
  many = jax.vmap(one, in_axes=(0, None))
  return (jax.vmap(many, (None, 0)) if logits.ndim > 1 else many)(keys, logits)


_few = jax.jit(_draws, static_argnums=3)
# With XLA's optimisations, where running takes longer than compiling.
_many = jax.jit(
  _draws,
  static_argnums=3,
  compiler_options={
    "xla_backend_optimization_level": 2,
    "xla_llvm_disable_expensive_passes": False,
  },
)


def draws(logits, settings=ALL, count=20_000, seed=0):
  """Draws of one distribution, or of each; their masses are summed once."""
  patched = confidence._BLOCK, tokens._FEW  # not to be found compiled
  long = settings.top_p is not None or count > 20_000
  run = _many if long and count * logits.size > 2_000_000 else _few
  return np.asarray(run(keys_of(count, seed), logits, settings, patched))


def order_of(logits):
  """The tokens that can be drawn, likelier first, then the lower id."""
  order = np.argsort(-logits, kind="stable")
  return order[np.isfinite(logits[order])]


def softmax(logits):
  weights = np.exp(logits - logits.max())
  return weights / weights.sum()


def reference(logits, settings):
  """The distribution after the cuts, by sorting, in float64."""
  logits = np.asarray(logits, np.float64) / settings.temperature
  order = order_of(logits)[: settings.top_k]
  probs = softmax(logits[order])
  kept = probs >= (settings.min_p or 0) * probs[0]
  order, probs = order[kept], softmax(logits[order[kept]])
  if settings.top_p is not None:
    kept = np.cumsum(probs) - probs < settings.top_p
    kept[0] = True
    order, probs = order[kept], softmax(logits[order[kept]])
  result = np.zeros(len(logits))
  result[order] = probs
  return result


def chi_square(drawn, probs):
  """Pearson's statistic in standard deviations over its degrees of freedom."""
  counts = np.bincount(np.ravel(drawn), minlength=len(probs))
  assert counts[probs == 0].sum() == 0
  expected = probs * counts.sum()
  often = expected > 5
  counts = np.append(counts[often], counts[~often].sum())
  expected = np.append(expected[often], expected[~often].sum())
  kept = expected > 0
  freedom = max(kept.sum() - 1, 1)
  statistic = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
  return (statistic - freedom) / np.sqrt(2 * freedom)


def random_probs(vocab, seed=0, zeros=0.2):
  numbers = np.random.default_rng(seed)
  probs = numbers.gamma(0.7, size=vocab) * (numbers.random(vocab) >= zeros)
  probs[0] += 0.01
  return probs / probs.sum()


# MARK: the distribution


@pytest.mark.parametrize("vocab", [1, 2, 5, 127, 128, 129, 300, 1000])
def test_draws_have_the_distribution_of_the_logits(vocab):
  probs = random_probs(vocab, seed=vocab)
  assert abs(chi_square(draws(log(probs)), probs)) < 4


@pytest.mark.parametrize("vocab", [2, 3, 4, 7, 11])
def test_it_does_not_matter_where_blocks_end(small_blocks, vocab):
  probs = random_probs(vocab, seed=vocab, zeros=0.3)
  assert abs(chi_square(draws(log(probs)), probs)) < 4


@pytest.mark.parametrize(
  "settings",
  [
    Settings(temperature=0.5),
    pytest.param(Settings(temperature=3.0), marks=pytest.mark.slow),
    Settings(top_k=40),
    pytest.param(Settings(top_k=200), marks=pytest.mark.slow),
    Settings(min_p=0.2),
    Settings(top_p=0.3),
    pytest.param(Settings(top_p=0.9), marks=pytest.mark.slow),
    pytest.param(
      Settings(0.7, top_k=50, min_p=0.1, top_p=0.8), marks=pytest.mark.slow
    ),
    Settings(0.7, top_k=200, min_p=0.1, top_p=0.8),
  ],
  ids=str,
)
def test_what_is_left_keeps_its_proportions(settings):
  logits = log(random_probs(300))
  probs = reference(logits, settings)
  assert 5 < (probs > 0).sum() < 250
  assert abs(chi_square(draws(logits, settings), probs)) < 4


def test_positions_of_a_row_are_independent():
  probs = np.array([0.5, 0.3, 0.2])
  logits = jnp.broadcast_to(log(probs), (30_000, 2, 3))
  drawn = np.asarray(draw(keys_of(30_000), logits, ALL))
  pairs = np.outer(probs, probs).ravel()
  assert abs(chi_square(3 * drawn[:, 0] + drawn[:, 1], pairs)) < 4


def deviations(drawn, probs):
  """Entropy and tail masses of draws, in standard errors from the truth."""
  surprise = -np.log(probs)
  mean = (probs * surprise).sum()
  spread = np.sqrt((probs * (surprise - mean) ** 2).sum())
  result = [(surprise[drawn].mean() - mean) / spread]
  for rank in (1_000, 10_000, 30_000):
    mass = probs[rank:].sum()
    error = (drawn >= rank).mean() - mass
    result.append(error / np.sqrt(mass * (1 - mass)))
  return np.array(result) * np.sqrt(len(drawn))


ZIPF = 1 / np.arange(1, 50_258)
ZIPF = ZIPF / ZIPF.sum()


def test_the_tail_of_a_large_vocabulary_is_drawn():
  drawn = draws(log(ZIPF), count=100_000)
  assert (abs(deviations(drawn, ZIPF)) < 3).all()


def one_step_posterior(probs, unmasked, rows, spacing):
  """Draws "stay masked" or a token at once, and returns the tokens.

  Every token's Gumbel has to beat the mask's, whose weight is near 1. Only
  those high enough to do so are drawn here, from uniform numbers that are
  multiples of `spacing` (0: any).
  """
  numbers = np.random.default_rng(0)
  mask = np.log1p(-unmasked) - np.log(numbers.exponential(size=rows))
  lowest = mask.min() - np.log(unmasked * probs.max())
  share = -np.expm1(-np.exp(-lowest))  # of the Gumbels that are above it
  count = numbers.binomial(rows * len(probs), share)
  row, token = numbers.integers((rows, len(probs)), size=(count, 2)).T
  below_one = numbers.random(count) * share
  if spacing:
    below_one = np.ceil(below_one / spacing) * spacing
  score = np.log(unmasked * probs[token]) - np.log(-np.log1p(-below_one))
  wins = np.flatnonzero(score > mask[row])
  wins = wins[np.argsort(score[wins])]
  best = dict(zip(row[wins], token[wins], strict=True))  # the last one stays
  return np.array(list(best.values()))


def test_a_mask_among_the_candidates_would_cut_the_tail_off():
  """Why positions are chosen first, and why Gumbels are not the default ones.

  The usual ancestral step draws from [u p, 1 - u] at once. JAX's default
  float32 Gumbel is made of a uniform number with steps of 2^-23 and ends at
  15.9, so a token of u p < 1e-7 never beats the mask: of 1024 steps, those
  beyond rank 10,000, 14 % of the mass, unmask nothing.
  """
  gumbels = np.asarray(jax.random.gumbel(jax.random.key(0), (2**20,)))
  assert gumbels.max() < 15.95
  steps = -np.expm1(-np.exp(-gumbels[gumbels > 7].astype(np.float64))) * 2**23
  np.testing.assert_allclose(steps, np.round(steps), atol=0.01)

  drawn = one_step_posterior(ZIPF, 1 / 1024, 100_000, 2.0**-23)
  assert abs(deviations(drawn, ZIPF)).max() > 5
  assert (drawn < 10_000).all()
  fine = one_step_posterior(ZIPF, 1 / 1024, 100_000, 0)
  assert (abs(deviations(fine, ZIPF)) < 3).all()


def test_probabilities_are_right_far_into_the_tail():
  """A block's share times a token's share of its block, down to 1e-12."""
  numbers = np.random.default_rng(0)
  logits = numbers.uniform(-27, 0, 50_257).astype(np.float32)
  logits[7] = 3.0
  blocks = tokens._Blocks(jnp.asarray(logits), ALL)
  masses = np.asarray(blocks.masses(None), np.float64)
  want = softmax(logits.astype(np.float64))
  assert want.min() < 1e-12
  ends = np.arange(0, len(logits), confidence._BLOCK)
  of_block = np.add.reduceat(want, ends)
  np.testing.assert_allclose(masses / masses.sum(), of_block, rtol=1e-5)


def test_gumbels_are_of_the_kind_that_reaches_the_tail(monkeypatch):
  modes = []
  original = jax.random.categorical

  def spy(key, logits, mode=None):
    modes.append(mode)
    return original(key, logits, mode=mode)

  monkeypatch.setattr(jax.random, "categorical", spy)
  for settings in (ALL, Settings(top_k=2)):
    jax.eval_shape(tokens.draw, keys_of(1), jnp.zeros((1, 4)), settings)
  assert modes == ["high"] * 3


# MARK: what is kept


def random_weights(cases, vocab, seed):
  """Small whole numbers: many ties, and some tokens without a chance."""
  numbers = np.random.default_rng(seed)
  weights = numbers.integers(0, 4, (cases, vocab))
  weights[np.arange(cases), numbers.integers(0, vocab, cases)] = 3
  return weights


def check_kept(settings):
  """Compares the sets over many distributions, each drawn from often."""
  cases, vocab = 200, 8
  weights = random_weights(cases, vocab, seed=(settings.top_k or 0))
  drawn = draws(log(weights), settings, count=400)
  kept = np.zeros((cases, vocab), bool)
  kept[np.arange(cases)[:, None], drawn] = True
  want = [reference(np.asarray(log(w)), settings) > 0 for w in weights]
  np.testing.assert_array_equal(kept, want)


# No sum of weights is such a share of another one, so rounding can't matter.
@pytest.mark.parametrize("top_p", [None, 0.0, 0.37, 0.61, 0.83, 1.0])
@pytest.mark.parametrize("min_p", [None, 0.4])
def test_min_p_and_top_p_keep_what_sorting_keeps(min_p, top_p, small_blocks):
  check_kept(Settings(min_p=min_p, top_p=top_p))


@pytest.mark.parametrize(
  "settings",
  [
    *(Settings(top_k=k) for k in (1, 2, 3, 5, 8, 9)),
    Settings(top_k=5, min_p=0.7),
    Settings(top_k=3, top_p=0.61),
    Settings(top_k=5, top_p=0.0),
    Settings(top_k=5, min_p=0.4, top_p=0.37),
    Settings(0.5, top_k=6, min_p=0.2, top_p=0.83),
  ],
  ids=str,
)
def test_top_k_keeps_what_sorting_keeps(settings, any_top_k, small_blocks):
  check_kept(settings)


def kept(probs, **settings):
  return sorted(set(draws(log(probs), Settings(**settings), 2_000)))


def test_top_k_keeps_the_k_likeliest(any_top_k):
  assert kept([0.1, 0.4, 0.2, 0.3], top_k=2) == [1, 3]
  assert kept([0.1, 0.4, 0.2, 0.3], top_k=9) == [0, 1, 2, 3]


def test_of_equally_likely_tokens_top_k_keeps_the_lower_ids(any_top_k):
  assert kept([0.2, 0.3, 0.2, 0.3], top_k=3) == [0, 1, 3]
  assert kept([0.25] * 4, top_k=3) == [0, 1, 2]


def test_of_equally_likely_tokens_top_p_keeps_the_lower_ids():
  assert kept([0.2, 0.3, 0.2, 0.3], top_p=0.7) == [0, 1, 3]
  assert kept([0.25] * 4, top_p=0.7) == [0, 1, 2]
  assert kept([1e-3] * 1000, top_p=1e-9) == [0]


def test_min_p_is_a_share_of_the_likeliest():
  probs = [0.5, 0.3, 0.15, 0.05]
  assert kept(probs, min_p=0.7) == [0]
  assert kept(probs, min_p=0.5) == [0, 1]
  assert kept(probs, min_p=0.2) == [0, 1, 2]
  assert kept(probs, min_p=0.0) == [0, 1, 2, 3]
  assert kept([0.3, 0.3, 0.2, 0.2], min_p=1.0) == [0, 1]


def test_top_p_keeps_the_token_that_crosses_it():
  probs = [0.5, 0.3, 0.15, 0.05]
  assert kept(probs, top_p=0.4) == [0]
  assert kept(probs, top_p=0.6) == [0, 1]
  assert kept(probs, top_p=0.96) == [0, 1, 2, 3]
  assert kept(probs, top_p=0.0) == [0]


def test_a_top_p_of_one_keeps_the_last_token():
  """Where a sum in float32 is 1 long before the last one."""
  logits = jnp.array([0.0] + [-20.0] * 127 + [-40.0] * 128)
  end = tokens._Blocks(logits, Settings(top_p=1.0)).end()
  assert end is None
  assert tokens._limit(Settings(top_p=1.0), jnp.float32(2)) == np.inf


def test_the_order_is_temperature_top_k_min_p_top_p(any_top_k):
  probs = [0.4, 0.3, 0.2, 0.1]
  # Of the two kept by top-k, the first has 0.57 of the mass.
  assert kept(probs, top_k=2, top_p=0.55) == [0]
  assert kept(probs, top_p=0.55) == [0, 1]
  # The same after min-p has left the two.
  assert kept(probs, min_p=0.6, top_p=0.55) == [0]
  # A high temperature flattens before anything is counted.
  assert kept(probs, temperature=100.0, top_p=0.55) == [0, 1, 2]
  assert kept(probs, temperature=100.0, min_p=0.6) == [0, 1, 2, 3]
  assert kept(probs, temperature=100.0, top_k=2) == [0, 1]


# MARK: temperature


def test_a_temperature_divides_the_logits():
  logits = jax.random.normal(jax.random.key(0), (20, 30, 200)) * 3
  for filters in ({}, {"top_k": 9}, {"top_p": 0.7}):
    plain = draw(keys_of(20), logits, Settings(**filters))
    scaled = draw(keys_of(20), logits * 4, Settings(4.0, **filters))
    np.testing.assert_array_equal(plain, scaled)


@pytest.mark.parametrize("temperature", [1e-3, 1e-300])
@pytest.mark.parametrize(
  "filters",
  [{}, {"top_k": 9}, {"top_k": 150, "min_p": 0.1}, {"top_p": 0.7}],
  ids=str,
)
def test_near_zero_the_likeliest_is_drawn(temperature, filters):
  logits = 100 * jax.random.normal(jax.random.key(0), (20, 30, 200))
  logits = logits.at[..., -3:].set(-jnp.inf)
  drawn = draw(keys_of(20), logits, Settings(temperature, **filters))
  np.testing.assert_array_equal(drawn, logits.argmax(axis=-1))


def test_near_zero_equally_likely_tokens_are_drawn_alike():
  logits = jnp.array([1.0, 3.0, 2.0, 3.0])
  drawn = draws(logits, Settings(temperature=1e-30))
  assert abs(chi_square(drawn, np.array([0, 0.5, 0, 0.5]))) < 4


@pytest.mark.parametrize("temperature", [1e20, 1e300])
def test_a_huge_temperature_is_uniform_over_what_can_be_drawn(temperature):
  logits = jnp.array([-5.0, 30.0, -jnp.inf, 2.0, -jnp.inf])
  drawn = draws(logits, Settings(temperature))
  assert abs(chi_square(drawn, np.array([1, 1, 0, 1, 0]) / 3)) < 4


@pytest.mark.parametrize(
  "asked, limits, used",
  [
    (0.6, (0.3, 0.8), 0.6),
    (1.0, (0.3, 0.8), 0.8),
    (0.1, (0.3, 0.8), 0.3),
    (1.0, None, 1.0),
  ],
)
def test_temperature_is_clamped_and_says_so(monkeypatch, asked, limits, used):
  said = []
  monkeypatch.setattr(logging, "warning", lambda *a: said.append(a))
  config = SampleConfig(temperature=asked, temperature_range=limits)
  assert tokens.effective_settings(config).temperature == used
  assert bool(said) == (asked != used)


def test_a_new_temperature_compiles_nothing():
  logits = jax.random.normal(jax.random.key(0), (20, 300)) * 3
  run = jax.jit(tokens.draw)
  for temperature, top_p in ((1.0, 0.9), (0.2, 1.0), (5.0, 0.1)):
    settings = Settings(temperature, top_k=20, min_p=0.01, top_p=top_p)
    want = draw(keys_of(1), logits[None], settings)[0]
    keys = rng.per_row(keys_of(1)[0], jnp.arange(20))
    np.testing.assert_array_equal(run(keys, logits, settings), want)
  assert run._cache_size() == 1


def test_settings_are_the_configs():
  config = SampleConfig(temperature=0.5, top_k=3, min_p=0.25, top_p=0.75)
  want = Settings(temperature=0.5, top_k=3, min_p=0.25, top_p=0.75)
  assert tokens.effective_settings(config) == want


# MARK: keys, and what can't be drawn

ROWS = 8
EVERY = [
  ALL,
  Settings(top_k=20),
  Settings(top_k=180),
  Settings(min_p=0.01),
  Settings(top_p=0.6),
  Settings(0.8, top_k=180, min_p=0.01, top_p=0.6),
]


@pytest.mark.parametrize("settings", EVERY, ids=str)
def test_a_row_depends_on_its_key_only(settings):
  keys, others = keys_of(ROWS), keys_of(ROWS, seed=1)
  logits = jax.random.normal(jax.random.key(0), (ROWS, 5, 300))
  whole = np.asarray(draw(keys, logits, settings))
  np.testing.assert_array_equal(whole, draw(keys, logits, settings))
  turned = draw(jnp.roll(keys, 2), jnp.roll(logits, 2, axis=0), settings)
  np.testing.assert_array_equal(np.roll(whole, 2, axis=0), turned)
  assert (whole != draw(others, logits, settings)).any()
  other = draw(others.at[3].set(keys[3]), logits.at[:3].set(0.0), settings)
  np.testing.assert_array_equal(whole[3], other[3])


@pytest.mark.parametrize("settings", EVERY, ids=str)
def test_rows_and_positions_are_drawn_apart(settings):
  row = jax.random.normal(jax.random.key(0), (1, 1, 300))
  logits = jnp.broadcast_to(row, (ROWS, 5, 300))
  drawn = np.asarray(draw(keys_of(ROWS), logits, settings))
  assert len({tuple(row) for row in drawn}) == ROWS
  assert len({tuple(column) for column in drawn.T}) == 5


@pytest.mark.parametrize("settings", EVERY, ids=str)
def test_what_has_no_chance_is_never_drawn(settings):
  """PAD, MASK and the padding of the vocabulary: a whole block of them."""
  numbers = np.random.default_rng(0)
  for share in (0.0, 0.3, 0.9, 0.99):
    shape = ROWS, 5, 300
    logits = 3 * numbers.normal(size=shape).astype(np.float32)
    hidden = numbers.random(shape) < share
    hidden[..., 170:], hidden[..., 9] = True, False
    logits[hidden] = -np.inf
    drawn = np.asarray(draw(keys_of(ROWS), logits, settings))
    assert not np.take_along_axis(hidden, drawn[..., None], axis=-1).any()


@pytest.mark.parametrize("settings", EVERY, ids=str)
def test_a_single_candidate_is_drawn(settings):
  logits = np.full((ROWS * 5, 300), -np.inf, np.float32)
  where = 7 * np.arange(ROWS * 5)
  logits[np.arange(ROWS * 5), where] = np.linspace(-1e30, 1e30, ROWS * 5)
  drawn = draw(keys_of(ROWS), logits.reshape(ROWS, 5, 300), settings)
  np.testing.assert_array_equal(np.ravel(drawn), where)


@pytest.mark.parametrize("settings", EVERY, ids=str)
def test_a_broken_model_does_not_hang(settings):
  logits = np.zeros((ROWS, 5, 300), np.float32)
  logits[0], logits[1, :, 3], logits[2, :, 3] = np.nan, np.nan, np.inf
  logits[3] = -np.inf
  healthy = draw(keys_of(ROWS), np.zeros_like(logits), settings)[4:]
  drawn = draw(keys_of(ROWS), logits, settings)[4:]
  np.testing.assert_array_equal(drawn, healthy)


@pytest.mark.parametrize("settings", EVERY[-2:], ids=str)
def test_draws_inside_a_loop_are_the_same(settings):
  logits = jax.random.normal(jax.random.key(0), (ROWS, 5, 300))
  keys = jnp.stack([keys_of(ROWS, seed) for seed in range(3)])
  step = lambda i, drawn: drawn.at[i].set(draw(keys[i], logits, settings))
  start = jnp.zeros((3, ROWS, 5), jnp.int32)
  looped = jax.jit(lambda: jax.lax.fori_loop(0, 3, step, start))()
  alone = [draw(keys[i], logits, settings) for i in range(3)]
  np.testing.assert_array_equal(looped, jnp.stack(alone))


@pytest.mark.parametrize(
  "settings", [Settings(top_k=50, min_p=0.1, top_p=0.5), EVERY[-1]], ids=str
)
def test_the_vocabulary_is_never_sorted(settings):
  logits = jax.ShapeDtypeStruct((2, 3, 4224), jnp.float32)
  program = draw.lower(keys_of(2), logits, settings).compile().as_text()
  assert " sort(" not in program


@pytest.mark.parametrize(
  "call",
  [
    lambda x: tokens.draw(keys_of(1), x[0], ALL),
    confidence.top_two,
    confidence.entropy,
  ],
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_logits_are_refused(call, dtype):
  with pytest.raises(AssertionError):
    call(jnp.zeros((1, 1, 4), dtype))


# MARK: how sure a distribution is

top_two, entropy = jax.jit(confidence.top_two), jax.jit(confidence.entropy)


@pytest.mark.parametrize("vocab", [1, 2, 5, 128, 129, 300, 1000])
@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
def test_scores_are_numpys(vocab, scale):
  numbers = np.random.default_rng(vocab)
  logits = (numbers.normal(size=(6, 5, vocab)) * scale).astype(np.float32)
  logits[:, 1:, 1:][numbers.random((6, 4, vocab - 1)) < 0.3] = -np.inf
  probs = np.array([[softmax(x.astype(np.float64)) for x in r] for r in logits])
  first, second = top_two(logits)
  ranked = np.sort(np.append(probs, np.zeros((6, 5, 1)), axis=-1), axis=-1)
  np.testing.assert_allclose(first, ranked[..., -1], rtol=1e-5)
  np.testing.assert_allclose(second, ranked[..., -2], rtol=1e-5, atol=1e-37)
  with np.errstate(divide="ignore", invalid="ignore"):
    want = -np.where(probs > 0, probs * np.log(probs), 0).sum(axis=-1)
  np.testing.assert_allclose(entropy(logits), want, rtol=1e-5, atol=1e-6)


def test_two_equally_likely_tokens_have_no_margin(small_blocks):
  for one, other in itertools.combinations(range(7), 2):
    logits = np.zeros(7, np.float32)
    logits[[one, other]] = 2.0
    first, second = confidence.top_two(jnp.asarray(logits))
    assert first == second > 0.2


def test_a_certain_token_has_no_entropy():
  logits = jnp.full(300, -jnp.inf).at[140].set(5.0)
  first, second = confidence.top_two(logits)
  assert (first, second, confidence.entropy(logits)) == (1, 0, 0)


def test_the_entropy_of_a_uniform_distribution_is_its_logarithm():
  logits = jnp.full((2, 50_257), -3.0)
  np.testing.assert_allclose(
    confidence.entropy(logits), np.log(50_257), rtol=1e-6
  )
