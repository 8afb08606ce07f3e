"""Fits how much repeated text is worth, to measured losses.

  L(U, E) = floor + scale / D'^exponent,
  D' = U + U R* (1 - exp(-(E - 1) / R*)),

for U unique tokens read E times: the form of Muennighoff et al. 2023 (arXiv
2305.16264) for a model of one size. `scaling_laws.py` has published values.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

# What is tried; a best R* at either end means that the data don't decide it.
_LEAST, _MOST = 1.0, 10_000.0
_R_STARS = np.geomspace(_LEAST, _MOST, 161)
_EXPONENTS = np.linspace(0.02, 1.5, 75)
_FEWEST = 8  # points
_UNKNOWNS = 4
_ABOUT_AS_GOOD = 1.1  # times the smallest error
_WIDEST = 4.0  # ratio of the ends of a range that still says something


@dataclasses.dataclass(frozen=True)
class ReuseFit:
  """A fit of the law.

  Attributes:
    r_star: R*, in epochs.
    low: the smallest R* that fits about as well: within two standard errors,
      or 10 % of the smallest error if that is more.
    high: the largest.
    exponent: of the effective tokens.
    floor: the loss with endless text.
    error: root of the mean squared residual, in the unit of the losses.
    points: number of losses.
  """

  r_star: float
  low: float
  high: float
  exponent: float
  floor: float
  error: float
  points: int

  @property
  def is_decided(self) -> bool:
    """Whether the data bound R* from both sides, to a factor of 4."""
    inside = self.low > _LEAST and self.high < _MOST
    return inside and self.high <= _WIDEST * self.low


def fit(points: Sequence[tuple[float, float, float]]) -> ReuseFit | None:
  """Fits the law by least squares.

  Args:
    points: unique tokens U, epochs E of at least 1, and the loss. Leave out
      losses that rise again: the law has no overfitting.

  Returns:
    The fit, or None with too few points or with one U only, which can't tell
    the value of repeated text from that of fresh text.
  """
  columns = np.array(points, np.float64).reshape(-1, 3).T
  unique, epochs, loss = columns
  if len(loss) < _FEWEST or len(np.unique(unique)) < 2:
    return None
  repeats, r = (epochs - 1)[None], _R_STARS[:, None]
  effective = unique * (1 - r * np.expm1(-repeats / r))
  # [R*, exponent, point]; relative to the largest, so that powers stay near 1.
  x = (effective / effective.max())[:, None] ** -_EXPONENTS[:, None]
  # For each pair of R* and exponent the other two unknowns are linear.
  mean = x.mean(axis=-1, keepdims=True)
  slope = ((x - mean) * (loss - loss.mean())).sum(axis=-1)
  slope = slope / np.maximum(((x - mean) ** 2).sum(axis=-1), 1e-12)
  floor = loss.mean() - slope * mean[..., 0]
  residual = loss - floor[..., None] - slope[..., None] * x
  error = np.sqrt((residual**2).mean(axis=-1))
  # A loss has no negative floor, and does not rise with more text.
  error = np.where((floor >= 0) & (slope >= 0), error, np.inf)
  if not np.isfinite(error).any():
    return None
  best = np.unravel_index(error.argmin(), error.shape)
  # Two standard errors of one unknown, if the residuals were independent; those
  # of one curve are not, so the range is never narrower than 10 %.
  wider = np.sqrt(1 + 4 / (len(loss) - _UNKNOWNS))
  most = max(wider, _ABOUT_AS_GOOD) * error.min() + 1e-12
  good = _R_STARS[error.min(axis=1) <= most]
  return ReuseFit(
    r_star=float(_R_STARS[best[0]]),
    low=float(good.min()),
    high=float(good.max()),
    exponent=float(_EXPONENTS[best[1]]),
    floor=float(floor[best]),
    error=float(error.min()),
    points=len(loss),
  )
