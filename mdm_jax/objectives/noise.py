"""Noise schedules alpha(t), and distributions of mask rates.

Time t runs from 0 (clean) to 1 (all masked); alpha(t), the share of tokens
kept, falls from 1 to 0. The mask rate is r = 1 - alpha(t). Substituting r for t
in the continuous-time bound

  NELBO = E_t[ -alpha'(t) / (1 - alpha(t)) * sum over masked of CE ]

(Shi et al. 2024, arXiv 2406.04329, eq. 6; Sahoo et al. 2024, arXiv 2406.07524,
eq. 10) gives the integral over r in (0, 1) of length * mean CE per masked
token. So a loss depends on the schedule only through the density of the mask
rates: see `RateDistribution`.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mdm_jax.core.registry import Registry
from mdm_jax.objectives.config import MaskedStage, NoiseConfig

# The share of tokens kept, alpha(t), a differentiable function of t in [0, 1].
Alpha = Callable[[Float[Array, "*B"]], Float[Array, "*B"]]

# Name -> function that returns alpha, given the config section `noise`.
SCHEDULES: Registry[Callable[[NoiseConfig], Alpha]] = Registry(
  "noise schedule", "noise.schedule"
)


def linear(t: Float[Array, "*B"]) -> Float[Array, "*B"]:
  """Returns alpha(t) = 1 - t."""
  return 1 - t


def cosine(t: Float[Array, "*B"]) -> Float[Array, "*B"]:
  """Returns alpha(t) = 1 - cos(pi/2 (1 - t)) (Shi et al. 2024, table 1)."""
  # sin(pi/2 t), not cos(pi/2 (1 - t)): exact at both ends in float32.
  return 1 - jnp.sin(jnp.pi / 2 * t)


def polynomial(exponent: float) -> Alpha:
  """Returns alpha(t) = 1 - t**exponent (Shi et al. 2024, table 1)."""
  return lambda t: 1 - t**exponent


SCHEDULES.register("linear", lambda config: linear)
SCHEDULES.register("cosine", lambda config: cosine)
SCHEDULES.register("polynomial", lambda config: polynomial(config.exponent))


@runtime_checkable
class RateDistribution(Protocol):
  """A distribution of mask rates, sampled by inverse transform of u ~ U(0, 1).

  Uniforms in, not keys, so that the rates of an update can be stratified.
  """

  def rate(self, u: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Returns the rate at u in [0, 1], non-decreasing in u."""
    ...

  def inverse_density(self, u: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Returns 1 / p(r) at r = rate(u), the importance weight of a row."""
    ...


@dataclasses.dataclass(frozen=True)
class RateRange:
  """A mixture: r ~ U(low, high), or r ~ U(0, 1) with probability `rehearsal`.

  The density p(r) = rehearsal + (1 - rehearsal) [low <= r <= high] / (high -
  low) is at least `rehearsal`, so weights 1 / p are at most 1 / rehearsal.
  """

  low: float
  high: float
  rehearsal: float = 0.0

  def rate(self, u: Float[Array, "*B"]) -> Float[Array, "*B"]:
    # The inverse of a piecewise linear distribution function.
    first, last = self._inside()
    inside = self.low + (u - first) / self._density_inside()
    # Without rehearsal no u is outside; this only avoids dividing by 0.
    outside = max(self.rehearsal, 1e-9)
    below, above = u / outside, self.high + (u - last) / outside
    return jnp.where(u < first, below, jnp.where(u <= last, inside, above))

  def inverse_density(self, u: Float[Array, "*B"]) -> Float[Array, "*B"]:
    first, last = self._inside()
    is_inside = (first <= u) & (u <= last)
    outside = max(self.rehearsal, 1e-9)
    return jnp.where(is_inside, 1 / self._density_inside(), 1 / outside)

  def _inside(self) -> tuple[float, float]:
    """Returns the distribution function at `low` and `high`."""
    return self.rehearsal * self.low, 1 - self.rehearsal * (1 - self.high)

  def _density_inside(self) -> float:
    return self.rehearsal + (1 - self.rehearsal) / (self.high - self.low)


@dataclasses.dataclass(frozen=True)
class ScheduledRates:
  """Mask rates r = 1 - alpha(t) with t ~ U(0, 1)."""

  alpha: Alpha

  def rate(self, u: Float[Array, "*B"]) -> Float[Array, "*B"]:
    return 1 - self.alpha(u)

  def inverse_density(self, u: Float[Array, "*B"]) -> Float[Array, "*B"]:
    return -jax.jvp(self.alpha, (u,), (jnp.ones_like(u),))[1]


def stage_rates(stage: MaskedStage, noise: NoiseConfig) -> RateDistribution:
  """Returns the distribution of mask rates that a stage trains on."""
  if stage.mask_rate is None:
    return ScheduledRates(SCHEDULES[noise.schedule](noise))
  return RateRange(*stage.mask_rate, stage.rehearsal)
