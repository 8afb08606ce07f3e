"""When each stage of the curriculum runs, counted in optimizer updates."""

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
  """One stage's place in the run.

  Attributes:
    index: position in `config.stages`.
    config: the stage.
    rows: prepared rows the stage draws from.
    start: its first optimizer update.
    end: one past its last.
  """

  index: int
  config: StageConfig
  rows: int
  start: int
  end: int

  @property
  def updates(self) -> int:
    """Optimizer updates of this stage."""
    return self.end - self.start


@dataclasses.dataclass(frozen=True)
class Curriculum:
  """The stages, one after the other.

  Attributes:
    stages: in the order they are run.
    passed_over: half-open ranges of updates that are not done.
  """

  stages: tuple[StagePlan, ...]
  passed_over: tuple[tuple[int, int], ...] = ()

  @property
  def updates(self) -> int:
    """Optimizer updates of the whole run."""
    return self.stages[-1].end

  def stage_at(self, update: int) -> StagePlan:
    """Returns the stage that an update belongs to; the last one after it."""
    ends = [stage.end for stage in self.stages]
    at = bisect.bisect_right(ends, update)
    return self.stages[min(at, len(ends) - 1)]

  def passes_over(self, update: int) -> bool:
    """Returns whether an update is skipped on purpose, with its rows."""
    return any(start <= update < end for start, end in self.passed_over)


def make_curriculum(
  stages: Sequence[StageConfig],
  rows: Sequence[int],
  rows_per_update: int,
  skip_updates: str = "",
) -> Curriculum:
  """Lays the stages out in updates.

  Args:
    stages: in the order they are run.
    rows: prepared for each.
    rows_per_update: the effective batch.
    skip_updates: updates to pass over, as `1200:1500,1800:1810`.

  Raises:
    UserError: they are more updates than can be counted.
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
        f" {count:,} rows, updates={stage.updates}); the stages together may"
        f" have {_MOST_UPDATES:,}"
      )
  return Curriculum(tuple(plans), update_ranges(skip_updates))
