"""Detection of gradient-norm spikes, relative to the last applied updates.

The window holds the norms of applied updates only. A spike in it would raise
the mean and deviation that later norms are compared with, and hide their spikes
for as long as the window is.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# The guard's part of the train state. It is an empty dict if the guard is off,
# since checkpoints can't hold an array without elements.
Norms = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class SpikeGuard:
  """Calls a norm a spike if it exceeds mean + sigmas * deviation of a window.

  Attributes:
    sigmas: the threshold, in standard deviations; None turns the guard off.
    window: number of applied updates in the window. Nothing is a spike until it
      is half full.
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
    """Returns whether a norm is a spike, given the window's norms."""
    if self.sigmas is None:
      return jnp.zeros((), bool)
    filled = jnp.minimum(seen["count"], self.window)
    valid = jnp.arange(self.window) < filled
    number = jnp.maximum(filled, 1).astype(jnp.float32)
    mean = jnp.where(valid, seen["norms"], 0.0).sum() / number
    # Two passes: E[x^2] - E[x]^2 cancels in float32 if the norms are close.
    off = jnp.where(valid, seen["norms"] - mean, 0.0)
    deviation = jnp.sqrt(jnp.square(off).sum() / number)
    far = norm > mean + self.sigmas * deviation
    return far & (2 * filled >= self.window)

  def remember(
    self, seen: Norms, norm: Float[Array, ""], applied: Bool[Array, ""]
  ) -> Norms:
    """Returns the window, with the oldest norm replaced if `applied`."""
    if self.sigmas is None:
      return {}
    # A ring buffer: `count` keeps growing, its remainder is the oldest entry.
    here = jnp.arange(self.window) == seen["count"] % self.window
    return {
      "norms": jnp.where(here & applied, norm, seen["norms"]),
      "count": seen["count"] + applied.astype(jnp.int32),
    }
