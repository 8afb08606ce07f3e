"""Published scaling laws for models that are trained on repeated data.

Throughout: `params` is the number of parameters N; `unique_tokens` is the size
of the corpus U, in tokens, never in millions; `epochs` E is how often it is
read, and a fraction below 1 reads a smaller corpus once; losses are in nats per
token. Functions raise ValueError where one of these numbers is not positive.
All laws were fitted on English web text (C4) in GPT-2 tokens: for another
corpus or vocabulary they give an order of magnitude, not a prediction.

Sources: Prabhudesai et al. 2025 (arXiv 2507.15857), Muennighoff et al. 2023
(arXiv 2305.16264) and Quokka (Ni et al. 2025, arXiv 2510.03280).
"""

import math

import numpy as np

Number = int | float

# The decay constant of repeats (Prabhudesai et al. 2025, section 3.2; their
# table 1b says 493.89 and 31.19).
DIFFUSION_R_STAR = 512.85
AR_R_STAR = 31.93

# Loss per token of uniform guessing, in the GPT-2 tokens of the laws.
UNIFORM_LOSS = math.log(50_257)

# Range of unique tokens in the runs that R* and the critical compute were
# fitted to.
FITTED_UNIQUE_TOKENS = (25e6, 100e6)

# Muennighoff et al. 2023, appendix A; alpha = beta in their fit.
_AR_FLOOR, _AR_A, _AR_B = map(math.exp, (0.6254804, 6.255414, 7.3049974))
_AR_ALPHA = 0.3526596
_AR_TOKENS_R_STAR = 15.387756
_AR_PARAMS_R_STAR = 5.309743

# Quokka, eq. 15: the exponents of the gain and of the decay with epochs.
_GAIN, _DECAY = 1.49, 0.40


def training_flops(params: Number, tokens: Number) -> float:
  """Returns C = 6 N D, the FLOPs of training on D tokens, repeats included."""
  _check_positive(params=params, tokens=tokens)
  return 6.0 * params * tokens


def critical_flops(unique_tokens: Number) -> float:
  """Returns the training FLOPs past which diffusion beats autoregression.

  C = 2.12e15 U^2.174 (Prabhudesai et al. 2025), with U in millions of tokens.
  The paper's first version leaves the unit out, and raw tokens would make it
  1e13 times too large; so the argument is raw tokens, converted inside.
  """
  _check_positive(unique_tokens=unique_tokens)
  return 2.12e15 * (unique_tokens / 1e6) ** 2.174


def in_fitted_range(unique_tokens: Number) -> bool:
  """Returns whether R* and the critical compute were fitted on such corpora."""
  low, high = FITTED_UNIQUE_TOKENS
  return low <= unique_tokens <= high


def effective_tokens(
  unique_tokens: Number, epochs: Number, r_star: float
) -> float:
  """Returns how many fresh tokens reading a corpus `epochs` times is worth.

  D' = U + U R* (1 - exp(-(E - 1) / R*)) (Prabhudesai et al. 2025, after
  Muennighoff et al. 2023), never more than the tokens read. R* is a number of
  repeats: the R*-th repeat is worth 1/e of a fresh pass. It does not say when
  to stop.

  Args:
    unique_tokens: U.
    epochs: E.
    r_star: `DIFFUSION_R_STAR` or `AR_R_STAR`.
  """
  fresh, passes = _fresh(unique_tokens, epochs)
  return _saturating(fresh, passes - 1, r_star)


def ar_loss(params: Number, unique_tokens: Number, epochs: Number) -> float:
  """Returns the loss of an autoregressive model (Muennighoff et al. 2023).

  More epochs never increase it: runs that overfitted were left out of the fit.
  """
  _check_positive(params=params)
  fresh, passes = _fresh(unique_tokens, epochs)
  # What U tokens can fill, (U G)^(beta / alpha) G, written for alpha = beta.
  useful = min(params, fresh * (_AR_A / _AR_B) ** (1 / _AR_ALPHA))
  n = _saturating(useful, params / useful - 1, _AR_PARAMS_R_STAR)
  d = _saturating(fresh, passes - 1, _AR_TOKENS_R_STAR)
  return _AR_FLOOR + _AR_A / n**_AR_ALPHA + _AR_B / d**_AR_ALPHA


def one_epoch_diffusion_loss(params: Number, tokens: Number) -> float:
  """Returns the bound of masked diffusion on fresh tokens (Quokka, eq. 13).

  A fit for plentiful data; don't compare it with `diffusion_loss`: for 100M
  parameters and tokens it is 1.9 nats above that law's first epoch.
  """
  _check_positive(params=params, tokens=tokens)
  return 2.413 + 798.6 / params**0.379 + 4604.9 / tokens**0.378


def diffusion_loss(
  params: Number, unique_tokens: Number, epochs: Number
) -> float:
  """Returns the bound of masked diffusion on repeated data (Quokka, eq. 15).

  Its D' = U E^1.49 exp(-((E - 1) / e_p)^0.40) falls again after `best_epochs`,
  and may exceed the tokens read: it is a term of a fit, unlike
  `effective_tokens`.
  """
  fresh, passes = _fresh(unique_tokens, epochs)
  repeats = (passes - 1) / overfitting_scale(params, unique_tokens)
  d = fresh * passes**_GAIN * math.exp(-(repeats**_DECAY))
  return 1535.23 / params**0.42 + 54.21 / d**0.13


def overfitting_scale(params: Number, unique_tokens: Number) -> float:
  """Returns e_p = 254.35 U^0.39 / N^0.55 of Quokka's eq. 15, in epochs.

  A decay constant: overfitting sets in near 26.8 e_p, see `best_epochs`.
  """
  _check_positive(params=params, unique_tokens=unique_tokens)
  return 254.35 * unique_tokens**0.39 / params**0.55


def best_epochs(params: Number, unique_tokens: Number) -> float:
  """Returns the number of epochs, at least 1, with the lowest `diffusion_loss`.

  The paper's tables 3 and 4 lie 3 % below to 8 % above (12 % at 11 epochs),
  because its coefficients are printed rounded. Its authors say that the fit
  allows more epochs than their runs did.
  """
  scale, epochs = overfitting_scale(params, unique_tokens), math.inf
  # The derivative of log D' is zero where E - 1 = e_p (3.725 (1 - 1 / E))^2.5.
  # From above, this iteration converges to the largest such E: a local maximum,
  # but one epoch may still be better.
  for _ in range(50):
    level = _GAIN / _DECAY * (1 - 1 / epochs)
    epochs = 1 + scale * level ** (1 / _DECAY)
  return min(
    1.0, epochs, key=lambda e: diffusion_loss(params, unique_tokens, e)
  )


def diffusion_wins(
  params: Number, unique_tokens: Number, epochs: Number
) -> bool:
  """Returns whether `diffusion_loss` is below `ar_loss` at equal compute.

  Differences under 0.2 nats mean nothing: for the best runs of Prabhudesai et
  al. 2025 the laws give 3.53 (diffusion) and 3.89, where 3.55 and 3.71 were
  measured. One side is a bound, the other an exact likelihood.
  """
  run = params, unique_tokens, epochs
  return diffusion_loss(*run) < ar_loss(*run)


def crossover_epochs(params: Number, unique_tokens: Number) -> float:
  """Returns the epochs from which on diffusion wins, to 1 %; inf if never.

  It wins from there until it overfits. Past `best_epochs` diffusion gets worse
  and autoregression better, so a run that does not win by then never will.
  """
  start = math.inf
  last = best_epochs(params, unique_tokens)
  for epochs in np.geomspace(last, 1.0, 1001).tolist():
    if not diffusion_wins(params, unique_tokens, epochs):
      break
    start = epochs
  return start


def forecast(
  params: Number, unique_tokens: Number, epochs: Number
) -> dict[str, float | bool]:
  """Returns everything that the laws predict for one run.

  Returns:
    flops: training compute, FLOPs.
    critical_flops: compute past which diffusion should win, FLOPs.
    past_critical_flops: whether `flops` exceeds `critical_flops`.
    effective_tokens_diffusion: fresh tokens the run is worth to diffusion.
    effective_tokens_ar: the same for an autoregressive model.
    overfitting_scale: e_p of Quokka's law, in epochs.
    best_epochs: epochs after which Quokka's law turns upwards.
    crossover_epochs: epochs from which diffusion wins, until it overfits.
    diffusion_loss: Quokka's law, nats per token.
    ar_loss: Muennighoff's law, nats per token.
    diffusion_wins: whether `diffusion_loss` is the lower of the two.
    losses_in_reach: whether both are below uniform guessing; a law that
      predicts more was fitted on far larger corpora and does not apply to this
      one.
    in_fitted_range: whether R* and `critical_flops` were fitted on such
      corpora.
  """
  run, read = (params, unique_tokens, epochs), (unique_tokens, epochs)
  flops = training_flops(params, unique_tokens * epochs)
  critical = critical_flops(unique_tokens)
  diffusion, ar = diffusion_loss(*run), ar_loss(*run)
  return {
    "flops": flops,
    "critical_flops": critical,
    "past_critical_flops": flops > critical,
    "effective_tokens_diffusion": effective_tokens(*read, DIFFUSION_R_STAR),
    "effective_tokens_ar": effective_tokens(*read, AR_R_STAR),
    "overfitting_scale": overfitting_scale(params, unique_tokens),
    "best_epochs": best_epochs(params, unique_tokens),
    "crossover_epochs": crossover_epochs(params, unique_tokens),
    "diffusion_loss": diffusion,
    "ar_loss": ar,
    "diffusion_wins": diffusion < ar,
    "losses_in_reach": max(diffusion, ar) < UNIFORM_LOSS,
    "in_fitted_range": in_fitted_range(unique_tokens),
  }


def _fresh(unique_tokens: Number, epochs: Number) -> tuple[Number, Number]:
  """Returns the tokens read at least once, and how often they are read."""
  _check_positive(unique_tokens=unique_tokens, epochs=epochs)
  # Below 1 epoch: a part of the corpus, read once.
  return unique_tokens * min(1, epochs), max(1, epochs)


def _saturating(first: Number, repeats: Number, r_star: float) -> float:
  return first - first * r_star * math.expm1(-repeats / r_star)


def _check_positive(**numbers: Number) -> None:
  for name, number in numbers.items():
    if not number > 0:
      raise ValueError(f"{name}={number}: must be positive")
