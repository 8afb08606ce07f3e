"""Which checkpoints are kept: the newest N, the best, and every N-th."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Retention:
  """The rule for whole steps; damaged ones are neither counted nor deleted.

  Attributes:
    latest: number of newest steps to keep.
    every: steps divisible by this are always kept (None: no such steps).
  """

  latest: int
  every: int | None = None

  def kept(self, steps: Sequence[int], ranked: Sequence[int]) -> set[int]:
    """Returns the steps to keep.

    Args:
      steps: all whole steps, in increasing order.
      ranked: the evaluated ones among them, the best first.
    """
    keep = set(steps[-self.latest :]) | set(ranked[:1])
    return keep | {s for s in steps if self.every and s % self.every == 0}
