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
_R_STARS = np.geomspace(1.0, 10_000.0, 161)
_EXPONENTS = np.linspace(0.02, 1.5, 75)
_FEWEST = 8  # points; the law has four unknowns
_ABOUT_AS_GOOD = 1.1  # times the smallest error


@dataclasses.dataclass(frozen=True)
class ReuseFit:
  """A fit of the law.

  Attributes:
    r_star: R*, in epochs.
    low: the smallest R* that fits about as well, to 10 % of the error.
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
    """Whether the data bound R* from both sides."""
    return self.low > _R_STARS[0] and self.high < _R_STARS[-1]


def fit(points: Sequence[tuple[float, float, float]]) -> ReuseFit | None:
  """Fits the law by least squares.

  Args:
    points: unique tokens U, epochs E of at least 1, and the loss. Leave out
      losses that rise again: the law has no overfitting.

  Returns:
    The fit, or None with too few points or with one U only, which can't tell
    the value of repeated text from that of fresh text.
  """
  unique, epochs, loss = (
    (np.array(x, np.float64) for x in zip(*points, strict=True))
    if (points)
    else (np.zeros(0),) * 3
  )
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
  good = _R_STARS[error.min(axis=1) <= _ABOUT_AS_GOOD * error.min() + 1e-12]
  return ReuseFit(
    r_star=float(_R_STARS[best[0]]),
    low=float(good.min()),
    high=float(good.max()),
    exponent=float(_EXPONENTS[best[1]]),
    floor=float(floor[best]),
    error=float(error.min()),
    points=len(loss),
  )
