"""Which checkpoints are kept: the newest few, the best one, some for good."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Retention:
  """A rule for steps that are whole; damaged ones are neither kept nor deleted.

  Attributes:
    latest: newest steps that are kept.
    every: steps divisible by this are kept for good (None: none are).
  """

  latest: int
  every: int | None = None

  def kept(self, steps: Sequence[int], ranked: Sequence[int]) -> set[int]:
    """Returns the steps to keep.

    Args:
      steps: all that are whole, rising.
      ranked: those of them that were evaluated, the best one first.
    """
    keep = set(steps[-self.latest :]) | set(ranked[:1])
    return keep | {s for s in steps if self.every and s % self.every == 0}
