"""What an update minimises, and on which noise."""

import dataclasses
from typing import Literal

from mdm_jax.core.fields import field, fixed


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseConfig:
  """The noise schedule alpha(t), used where rates come from t ~ U(0, 1)."""

  schedule: str = fixed(
    "linear",
    "shape of alpha(t), from 1 at t=0 to 0 at t=1",
    registry="mdm_jax.objectives.noise:SCHEDULES",
  )
  exponent: float = fixed(
    2.0, "of the polynomial schedule 1 - t**exponent", "[0.01, 100]"
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
  """What a training step minimises."""

  weighting: Literal["masked_ce", "nelbo"] = fixed(
    "masked_ce",
    "mean cross-entropy over masked tokens, or the unbiased likelihood bound",
  )
  label_smoothing: float = field(
    0.0, "training loss only; uniform over real tokens", "[0, 0.9]"
  )
