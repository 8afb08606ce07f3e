"""Published values; each comment names the table or the file it stands in."""

import math

import numpy as np
import pytest

from mdm_jax.planning import scaling_laws as laws

BOTH_R_STARS = [laws.DIFFUSION_R_STAR, laws.AR_R_STAR]

# Quokka, table 4: unique tokens, parameters, epochs.
QUOKKA_TABLE_4 = [
  (1e7, 41e6, 247),
  (1e8, 95e6, 356),
  (1e9, 222e6, 569),
  (1e10, 518e6, 910),
]


def lowest_loss(unique_tokens):
  """The parameters with the lowest loss at their own best epochs."""
  sizes = np.geomspace(1e7, 2e9, 150)
  losses = [
    laws.diffusion_loss(n, unique_tokens, laws.best_epochs(n, unique_tokens))
    for n in sizes
  ]
  return sizes[np.argmin(losses)], min(losses)


def test_training_flops():
  # Prabhudesai et al., table 4: 140M x 50 and 425M x 500 epochs of 100M tokens.
  assert laws.training_flops(140e6, 50 * 1e8) == pytest.approx(4.32e18, rel=0.1)
  assert laws.training_flops(425e6, 500 * 1e8) == pytest.approx(
    1.24e20, rel=0.1
  )
  assert laws.training_flops(2, 3) == 36


@pytest.mark.parametrize(
  "unique_tokens, flops",
  [
    (1e5, 1.42e13),
    (1e6, 2.12e15),
    (25e6, 2.32e18),
    (50e6, 1.05e19),
    (100e6, 4.72e19),
    (500e6, 1.56e21),
  ],
)
def test_critical_flops_take_raw_tokens(unique_tokens, flops):
  assert laws.critical_flops(unique_tokens) == pytest.approx(flops, rel=5e-3)


def test_critical_flops_agree_with_the_revised_paper():
  # log10 U = 0.460 log10 C - 1.050, and C = 2.12 * 10^1.956 U^2.174.
  for u in (25e6, 50e6, 100e6):
    c = laws.critical_flops(u)
    assert 0.460 * math.log10(c) - 1.050 == pytest.approx(
      math.log10(u), abs=1e-3
    )
    assert c == pytest.approx(2.12 * 10**1.956 * u**2.174, rel=1e-3)


def test_critical_flops_in_epochs():
  at_787 = laws.training_flops(100e6, 787 * 100e6)
  assert at_787 == pytest.approx(laws.critical_flops(100e6), rel=2e-3)
  book = laws.training_flops(85e6, 525 * 1e5)
  assert book == pytest.approx(2.7e16, rel=0.01)
  assert book / laws.critical_flops(1e5) == pytest.approx(1900, rel=0.01)


def test_fitted_range():
  inside = [laws.in_fitted_range(u) for u in (25e6, 50_000_000, 100e6)]
  outside = [laws.in_fitted_range(u) for u in (1e5, 24.9e6, 100.1e6, 25, 100)]
  assert all(inside) and not any(outside)


@pytest.mark.parametrize(
  "epochs, r_star, ratio",
  [(100, 512.85, 91.0), (100, 31.93, 31.5), (525, 512.85, 329)]
  + [(525, 31.93, 32.9)],
)
def test_effective_tokens(epochs, r_star, ratio):
  assert r_star in BOTH_R_STARS
  got = laws.effective_tokens(1e6, epochs, r_star) / 1e6
  assert got == pytest.approx(ratio, rel=2e-3)


@pytest.mark.parametrize("r_star", BOTH_R_STARS)
def test_effective_tokens_at_the_ends(r_star):
  assert laws.effective_tokens(7_000, 1, r_star) == 7_000
  assert laws.effective_tokens(7_000, 0.25, r_star) == 7_000 / 4
  assert laws.effective_tokens(7_000, 1e9, r_star) == pytest.approx(
    7_000 * (1 + r_star)
  )


@pytest.mark.parametrize("r_star", BOTH_R_STARS)
def test_effective_tokens_grow_and_are_at_most_those_read(r_star):
  epochs = np.geomspace(0.01, 1000, 200)
  got = [laws.effective_tokens(1000, e, r_star) for e in epochs]
  assert (np.diff(got) > 0).all()
  assert (np.array(got) <= 1000 * epochs * (1 + 1e-12)).all()


@pytest.mark.parametrize(
  "params, tokens, loss",
  [(6.34e9, 242e9, 2.2256440889984477), (8.67e9, 178e9, 2.2269634075087867)],
)
def test_ar_loss_matches_its_authors_code(params, tokens, loss):
  # README of huggingface/datablations, 25e9 unique tokens.
  got = laws.ar_loss(params, 25e9, tokens / 25e9)
  assert got == pytest.approx(loss, rel=1e-14)


def test_ar_loss_falls_and_saturates():
  size = 5.1e-2 * 1e8  # what 100M tokens can fill, by the paper's G = 0.2258
  epochs = [laws.ar_loss(size, 1e8, e) for e in np.geomspace(0.1, 100, 50)]
  sizes = [laws.ar_loss(n, 1e8, 10) for n in np.geomspace(1e5, 1e8, 50)]
  assert (np.diff(epochs) < 0).all() and (np.diff(sizes) < 0).all()
  # 1 + R*_N = 6.31 times that size is all that a model can ever use.
  infinite = laws.ar_loss(1e15, 1e8, 1)
  enough = laws.ar_loss(0.2258**2 * 1e8, 1e8, 1)
  excess = 520.8 / (0.2258**2 * 1e8) ** 0.3526596
  assert enough - infinite == pytest.approx(
    excess * (1 - 6.309743**-0.3526596), rel=1e-3
  )


def test_one_epoch_diffusion_loss_has_the_published_optimum():
  # N = 0.0216 C^0.514 and D = 7.7 C^0.486, from the paper's other approach.
  for c in (1e19, 1e20, 1e21):
    sizes = np.geomspace(1e7, 1e10, 400)
    losses = [laws.one_epoch_diffusion_loss(n, c / 6 / n) for n in sizes]
    published = laws.one_epoch_diffusion_loss(0.0216 * c**0.514, 7.7 * c**0.486)
    assert sizes[np.argmin(losses)] == pytest.approx(
      0.0216 * c**0.514, rel=0.12
    )
    assert published == pytest.approx(min(losses), abs=2e-3)


def test_one_epoch_diffusion_loss_by_hand():
  # Powers of 10 leave the exponents bare.
  got = laws.one_epoch_diffusion_loss(1e8, 1e10)
  assert got == pytest.approx(2.413 + 798.6e-3 / 10**0.032 + 0.46049 * 10**0.22)
  gap = laws.one_epoch_diffusion_loss(1e8, 1e8) - laws.diffusion_loss(
    1e8, 1e8, 1
  )
  assert gap == pytest.approx(1.9, abs=0.05)


def test_the_laws_near_the_measured_best_runs():
  # Prabhudesai et al., figure 2: diffusion 3.55, autoregressive 3.71.
  assert laws.diffusion_loss(416.9e6, 1e8, 500) == pytest.approx(3.53, abs=5e-3)
  assert laws.ar_loss(140e6, 1e8, 50) == pytest.approx(3.89, abs=5e-3)


def test_diffusion_loss_at_one_epoch_and_below():
  expected = 1535.23 / 1e8**0.42 + 54.21 / 1e6**0.13
  assert laws.diffusion_loss(1e8, 1e6, 1) == pytest.approx(expected)
  assert laws.diffusion_loss(1e8, 4e6, 0.25) == pytest.approx(expected)
  assert laws.ar_loss(1e8, 4e6, 0.25) == laws.ar_loss(1e8, 1e6, 1)


def test_diffusion_loss_is_a_valley_around_the_best_epochs():
  best = laws.best_epochs(85e6, 1e8)
  down = [laws.diffusion_loss(85e6, 1e8, e) for e in np.geomspace(2, best)]
  up = [laws.diffusion_loss(85e6, 1e8, best * x) for x in np.geomspace(1, 100)]
  assert (np.diff(down) < 0).all() and (np.diff(up) > 0).all()


@pytest.mark.parametrize(
  "params, epochs",
  [(4e8, (70, 175, 430)), (1e9, (42, 105, 260)), (1e10, (11, 29, 73))],
)
def test_best_epochs_against_table_3(params, epochs):
  """Within 8 %, or 1.2 epochs where the paper has 11: rounded coefficients."""
  got = [laws.best_epochs(params, u) for u in (1e7, 1e8, 1e9)]
  for mine, published in zip(got, epochs, strict=True):
    assert mine == pytest.approx(published, rel=0.08, abs=1.2)


def test_best_epochs_against_the_abstract():
  # A 10B model on 1T tokens tolerates about 1,100 epochs.
  assert laws.best_epochs(1e10, 1e12) == pytest.approx(1100, rel=0.08)


@pytest.mark.parametrize("unique_tokens, params, epochs", QUOKKA_TABLE_4)
def test_best_epochs_against_table_4(unique_tokens, params, epochs):
  got = laws.best_epochs(params, unique_tokens)
  assert got == pytest.approx(epochs, rel=0.05)


@pytest.mark.parametrize(
  "row, flops",
  list(zip(QUOKKA_TABLE_4[:3], (6.07e17, 2.04e19, 7.59e20), strict=True)),
)
def test_training_flops_against_table_4(row, flops):
  unique_tokens, params, epochs = row
  got = laws.training_flops(params, unique_tokens * epochs)
  assert got == pytest.approx(flops, rel=0.01)


@pytest.mark.parametrize(
  "row, off", list(zip(QUOKKA_TABLE_4, (0.08, 0.14, 0.20, 0.26), strict=True))
)
def test_table_4_lies_at_the_bottom_of_the_valley(row, off):
  """A flat one: the loss agrees, though its place is up to a quarter off."""
  unique_tokens, params, epochs = row
  size, loss = lowest_loss(unique_tokens)
  assert size == pytest.approx(params, rel=off)
  published = laws.diffusion_loss(params, unique_tokens, epochs)
  assert 0 <= published - loss < 2e-3


def test_lowest_loss_with_the_printed_coefficients():
  """They put the first row of table 4, 41M and 247, at 43M and 231."""
  size, _ = lowest_loss(1e7)
  assert size == pytest.approx(43e6, rel=0.03)
  assert laws.best_epochs(size, 1e7) == pytest.approx(231, rel=0.02)


@pytest.mark.parametrize(
  "unique_tokens, epochs", [(1e5, (84, 45, 25)), (1e6, (209, 114, 63))]
)
def test_best_epochs_of_one_book(unique_tokens, epochs):
  got = [laws.best_epochs(n, unique_tokens) for n in (10e6, 30e6, 85e6)]
  np.testing.assert_allclose(got, epochs, atol=0.6)


def test_best_epochs_are_a_multiple_of_the_scale():
  for params, unique_tokens in ((1e7, 1e9), (1e8, 1e10)):
    scale = laws.overfitting_scale(params, unique_tokens)
    ratio = laws.best_epochs(params, unique_tokens) / scale
    assert ratio == pytest.approx(26.8, rel=5e-3)
  assert laws.overfitting_scale(1e10, 1e10) == pytest.approx(
    254.35 * 10 ** (3.9 - 5.5)
  )


def test_one_epoch_is_best_where_repeats_never_pay():
  for params in (1e9, 1e12):
    assert laws.best_epochs(params, 1e5) == 1
    later = [laws.diffusion_loss(params, 1e5, e) for e in (1.1, 3, 9, 30)]
    assert min(later) > laws.diffusion_loss(params, 1e5, 1)


def test_crossover_is_where_the_laws_meet():
  for params, unique_tokens in ((85e6, 1e8), (30e6, 5e7)):
    at = laws.crossover_epochs(params, unique_tokens)
    assert 1 < at < laws.best_epochs(params, unique_tokens)
    assert laws.diffusion_wins(params, unique_tokens, at)
    assert not laws.diffusion_wins(params, unique_tokens, at / 1.01)


def test_crossover_at_the_ends():
  assert laws.crossover_epochs(85e6, 1e6) == pytest.approx(1)
  assert laws.crossover_epochs(1e5, 1e8) == math.inf


def test_crossover_is_the_last_one():
  """Here the laws meet three times: diffusion wins, loses, wins."""
  wins = [laws.diffusion_wins(1e9, 1e8, e) for e in (1, 2, 10)]
  assert wins == [True, False, True]
  assert 4 < laws.crossover_epochs(1e9, 1e8) < 10


def test_diffusion_loses_again_when_it_overfits():
  wins = [laws.diffusion_wins(417e6, 1e8, e) for e in (2, 500, 3000)]
  assert wins == [False, True, False]


def test_forecast():
  got = laws.forecast(85_000_000, 100_000_000, 100)
  assert got == dict(
    flops=laws.training_flops(85e6, 1e10),
    critical_flops=laws.critical_flops(1e8),
    past_critical_flops=False,
    effective_tokens_diffusion=laws.effective_tokens(1e8, 100, 512.85),
    effective_tokens_ar=laws.effective_tokens(1e8, 100, 31.93),
    overfitting_scale=laws.overfitting_scale(85e6, 1e8),
    best_epochs=laws.best_epochs(85e6, 1e8),
    crossover_epochs=laws.crossover_epochs(85e6, 1e8),
    diffusion_loss=laws.diffusion_loss(85e6, 1e8, 100),
    ar_loss=laws.ar_loss(85e6, 1e8, 100),
    diffusion_wins=True,
    losses_in_reach=True,
    in_fitted_range=True,
  )


def test_forecast_of_one_book():
  got = laws.forecast(85e6, 1e5, 525)
  assert got["past_critical_flops"] and not got["in_fitted_range"]
  assert got["best_epochs"] < 525 / 20


@pytest.mark.parametrize("bad", [0, -1, -0.5, math.nan])
@pytest.mark.parametrize(
  "call, arguments",
  [
    (laws.training_flops, "params tokens"),
    (laws.critical_flops, "unique_tokens"),
    (laws.overfitting_scale, "params unique_tokens"),
    (laws.one_epoch_diffusion_loss, "params tokens"),
    (laws.diffusion_loss, "params unique_tokens epochs"),
    (laws.ar_loss, "params unique_tokens epochs"),
  ],
)
def test_numbers_must_be_positive(call, arguments, bad):
  names = arguments.split()
  for name in names:
    with pytest.raises(ValueError, match=f"^{name}=.* must be positive"):
      call(**{n: bad if n == name else 1e6 for n in names})
