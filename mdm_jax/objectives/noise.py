"""Noise schedules, and the distributions that mask rates are drawn from.

Time runs from 0 (clean) to 1 (all masked); alpha(t), the share of tokens kept,
falls from 1 to 0. A mask rate is r = 1 - alpha(t). The continuous-time bound

  NELBO = E_t[ -alpha'(t) / (1 - alpha(t)) * sum over masked of CE ]

(Shi et al. 2024, arXiv 2406.04329, eq. 6; Sahoo et al. 2024, arXiv 2406.07524,
eq. 10) is, with r in place of t, the integral over r in (0, 1) of the mean CE
per masked token times the length. So all a loss needs to know of a schedule is
how densely it draws each rate: see `RateDistribution`.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from mdm_jax.core.registry import Registry
from mdm_jax.objectives.config import MaskedStage, NoiseConfig


@runtime_checkable
class NoiseSchedule(Protocol):
  """alpha(t) and its derivative, for t in [0, 1]."""

  def alpha(self, t: Float[Array, "*B"]) -> Float[Array, "*B"]: ...

  def dalpha(self, t: Float[Array, "*B"]) -> Float[Array, "*B"]: ...


@dataclasses.dataclass(frozen=True)
class Linear:
  """alpha(t) = 1 - t."""

  def alpha(self, t: Float[Array, "*B"]) -> Float[Array, "*B"]:
    return 1 - t

  def dalpha(self, t: Float[Array, "*B"]) -> Float[Array, "*B"]:
    return -jnp.ones_like(t)


@dataclasses.dataclass(frozen=True)
class Cosine:
  """alpha(t) = 1 - cos(pi/2 (1 - t)) (Shi et al. 2024, table 1)."""

  def alpha(self, t: Float[Array, "*B"]) -> Float[Array, "*B"]:
    # sin(pi/2 t), not cos(pi/2 (1 - t)): exact at both ends in float32.
    return 1 - jnp.sin(jnp.pi / 2 * t)

  def dalpha(self, t: Float[Array, "*B"]) -> Float[Array, "*B"]:
    return -jnp.pi / 2 * jnp.cos(jnp.pi / 2 * t)


@dataclasses.dataclass(frozen=True)
class Polynomial:
  """alpha(t) = 1 - t**exponent (Shi et al. 2024, table 1)."""

  exponent: float

  def alpha(self, t: Float[Array, "*B"]) -> Float[Array, "*B"]:
    return 1 - t**self.exponent

  def dalpha(self, t: Float[Array, "*B"]) -> Float[Array, "*B"]:
    return -self.exponent * t ** (self.exponent - 1)


# Each makes a schedule from its settings.
SCHEDULES: Registry[Callable[[NoiseConfig], NoiseSchedule]] = Registry(
  "noise schedule", "noise.schedule"
)
SCHEDULES.register("linear", lambda config: Linear())
SCHEDULES.register("cosine", lambda config: Cosine())
SCHEDULES.register("polynomial", lambda config: Polynomial(config.exponent))


def make_schedule(config: NoiseConfig) -> NoiseSchedule:
  """Returns the configured schedule."""
  return SCHEDULES[config.schedule](config)


def loss_weight(
  schedule: NoiseSchedule, t: Float[Array, "*B"]
) -> Float[Array, "*B"]:
  """Returns -alpha'(t) / (1 - alpha(t)), the weight of the bound at t > 0."""
  return -schedule.dalpha(t) / (1 - schedule.alpha(t))


@runtime_checkable
class RateDistribution(Protocol):
  """How a row's mask rate is drawn, by inverse transform."""

  def rate(self, u: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Maps u in [0, 1] to a rate, non-decreasing."""
    ...

  def inverse_density(self, u: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Returns 1 / p(r) at r = rate(u), the importance weight."""
    ...


@dataclasses.dataclass(frozen=True)
class RateRange:
  """r ~ U(low, high), but r ~ U(0, 1) for the share `rehearsal` of the rows.

  The density p(r) = rehearsal + (1 - rehearsal) [low <= r <= high] / (high -
  low) is at least `rehearsal`, so 1 / p is bounded by 1 / rehearsal.
  """

  low: float
  high: float
  rehearsal: float = 0.0

  def rate(self, u: Float[Array, "*B"]) -> Float[Array, "*B"]:
    first, last = self._inside()
    inside = self.low + (u - first) / self._density_inside()
    outside = max(self.rehearsal, 1e-9)  # never reached where it is 0
    below, above = u / outside, self.high + (u - last) / outside
    return jnp.where(u < first, below, jnp.where(u <= last, inside, above))

  def inverse_density(self, u: Float[Array, "*B"]) -> Float[Array, "*B"]:
    first, last = self._inside()
    is_inside = (first <= u) & (u <= last)
    outside = max(self.rehearsal, 1e-9)
    return jnp.where(is_inside, 1 / self._density_inside(), 1 / outside)

  def _inside(self) -> tuple[float, float]:
    """The values of u, the distribution function, at low and high."""
    return self.rehearsal * self.low, 1 - self.rehearsal * (1 - self.high)

  def _density_inside(self) -> float:
    return self.rehearsal + (1 - self.rehearsal) / (self.high - self.low)


@dataclasses.dataclass(frozen=True)
class ScheduledRates:
  """r = 1 - alpha(t) with t ~ U(0, 1)."""

  schedule: NoiseSchedule

  def rate(self, u: Float[Array, "*B"]) -> Float[Array, "*B"]:
    return 1 - self.schedule.alpha(u)

  def inverse_density(self, u: Float[Array, "*B"]) -> Float[Array, "*B"]:
    return -self.schedule.dalpha(u)


def stage_rates(stage: MaskedStage, noise: NoiseConfig) -> RateDistribution:
  """Returns the distribution of mask rates a stage trains on."""
  if stage.mask_rate is None:
    return ScheduledRates(make_schedule(noise))
  return RateRange(*stage.mask_rate, stage.rehearsal)
