"""The curriculum: which updates belong to which stage."""

import bisect
import dataclasses
import math
from collections.abc import Sequence

from mdm_jax.core.errors import UserError
from mdm_jax.data.config import StageConfig
from mdm_jax.training.config import update_ranges

_MOST_UPDATES = 2**31 - 1  # an update's number has 32 bits


@dataclasses.dataclass(frozen=True)
class StagePlan:
  """The range of updates that a stage covers.

  Attributes:
    index: position in `config.stages`.
    config: the stage's config.
    rows: number of prepared rows that the stage draws from.
    start: its first update, counted from 0.
    end: one past its last update.
  """

  index: int
  config: StageConfig
  rows: int
  start: int
  end: int

  @property
  def updates(self) -> int:
    """Number of updates of this stage."""
    return self.end - self.start


@dataclasses.dataclass(frozen=True)
class Curriculum:
  """All stages of a run, in order.

  Attributes:
    stages: in the order of training.
    skipped: half-open ranges of updates to skip (`train.skip_updates`).
  """

  stages: tuple[StagePlan, ...]
  skipped: tuple[tuple[int, int], ...] = ()

  @property
  def updates(self) -> int:
    """Number of updates of the whole run."""
    return self.stages[-1].end

  def stage_at(self, update: int) -> StagePlan:
    """Returns the stage of an update; after the end of the run, the last."""
    ends = [stage.end for stage in self.stages]
    at = bisect.bisect_right(ends, update)
    return self.stages[min(at, len(ends) - 1)]

  def skips(self, update: int) -> bool:
    """Returns whether the config skips an update, and with it its rows."""
    return any(start <= update < end for start, end in self.skipped)


def make_curriculum(
  stages: Sequence[StageConfig],
  rows: Sequence[int],
  rows_per_update: int,
  skip_updates: str = "",
) -> Curriculum:
  """Returns the curriculum of some stages.

  Args:
    stages: in the order of training.
    rows: number of prepared rows of each stage.
    rows_per_update: the effective batch size, over all microbatches.
    skip_updates: updates to skip, such as "1200:1500,1800:1810".

  Raises:
    UserError: the updates don't fit an int32 counter.
  """
  plans, start = [], 0
  for index, (stage, count) in enumerate(zip(stages, rows, strict=True)):
    updates = stage.updates or max(
      1, math.ceil(stage.epochs * count / rows_per_update)
    )
    plans.append(StagePlan(index, stage, count, start, start + updates))
    start += updates
    if start > _MOST_UPDATES:
      raise UserError(
        f"stages[{index}] is {updates:,} updates (epochs={stage.epochs:g} of"
        f" {count:,} rows, updates={stage.updates}); all stages together may"
        f" have {_MOST_UPDATES:,}"
      )
  return Curriculum(tuple(plans), update_ranges(skip_updates))
