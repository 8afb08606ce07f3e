"""Whether a gradient's norm is a spike, by the norms of the last updates.

Only what was applied is remembered: a norm that is not finite, or that was a
spike itself, would move the very mean that the next ones are held against.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mdm_jax.training.config import TrainConfig

# What a state carries for the guard; an empty dict where it is off, since
# checkpoints can't hold an array without elements.
Norms = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class SpikeGuard:
  """A spike is so many deviations above the mean of a window of norms.

  Attributes:
    sigmas: deviations; None switches the guard off.
    window: norms of applied updates that are remembered. Nothing is a spike
      before half of them are there.
  """

  sigmas: float | None = None
  window: int = 1

  def init(self) -> Norms:
    """Returns an empty window."""
    if self.sigmas is None:
      return {}
    return {
      "norms": jnp.zeros(self.window, jnp.float32),
      "count": jnp.zeros((), jnp.int32),
    }

  def is_spike(self, seen: Norms, norm: Float[Array, ""]) -> Bool[Array, ""]:
    """Returns whether a norm, finite or not, is far above those seen."""
    if self.sigmas is None:
      return jnp.zeros((), bool)
    filled = jnp.minimum(seen["count"], self.window)
    valid = jnp.arange(self.window) < filled
    number = jnp.maximum(filled, 1).astype(jnp.float32)
    mean = jnp.where(valid, seen["norms"], 0.0).sum() / number
    # In two passes: the difference of two large numbers would be none.
    off = jnp.where(valid, seen["norms"] - mean, 0.0)
    deviation = jnp.sqrt(jnp.square(off).sum() / number)
    far = norm > mean + self.sigmas * deviation
    return far & (2 * filled >= self.window)

  def remember(
    self, seen: Norms, norm: Float[Array, ""], applied: Bool[Array, ""]
  ) -> Norms:
    """Returns the window, the oldest norm replaced if this one was applied."""
    if self.sigmas is None:
      return {}
    here = jnp.arange(self.window) == seen["count"] % self.window
    return {
      "norms": jnp.where(here & applied, norm, seen["norms"]),
      "count": seen["count"] + applied.astype(jnp.int32),
    }


def make_guard(config: TrainConfig) -> SpikeGuard:
  """Returns the guard that a config asks for."""
  return SpikeGuard(config.spike_sigmas, config.spike_window)
