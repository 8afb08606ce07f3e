"""How long an update of each stage takes on the devices at hand, by trying."""

import time

import jax

from mdm_jax.training.curriculum import StagePlan
from mdm_jax.training.state import TrainState
from mdm_jax.training.trainer import Trainer

_SECONDS = 1.0  # of trying a stage, if its updates are short
_MOST_UPDATES = 10


def update_seconds(trainer: Trainer, after: int = 0) -> dict[int, float]:
  """Returns seconds an update of every stage that has updates past `after`.

  The stages' programs are compiled on the way, and the run will use them. The
  state is a throwaway one: call this before there is another.
  """
  left = [s for s in trainer.curriculum.stages if s.end > after]
  state = trainer.init()
  seconds = {}
  for stage in left:
    state, seconds[stage.index] = _time_stage(trainer, state, stage)
  return seconds


def _time_stage(
  trainer: Trainer, state: TrainState, stage: StagePlan
) -> tuple[TrainState, float]:
  state = _update(trainer, state, stage)  # compiles
  count, began = 0, time.monotonic()
  while count < _MOST_UPDATES and time.monotonic() - began < _SECONDS:
    state = _update(trainer, state, stage)
    count += 1
  return state, (time.monotonic() - began) / count


def _update(trainer: Trainer, state: TrainState, stage: StagePlan):
  state, _ = trainer.update(state, stage.start)
  return jax.block_until_ready(state)
