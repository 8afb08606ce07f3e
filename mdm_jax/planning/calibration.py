"""How long an update of each stage takes on the devices at hand, by trying."""

import time

import jax

from mdm_jax.core import distributed
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
  began = time.monotonic()
  state = _update(trainer, state, stage)
  # Each process by its own clock would do another number of updates, and wait
  # for the others in one that they don't do.
  more = distributed.broadcast(_fit(time.monotonic() - began))
  for _ in range(more):
    state = _update(trainer, state, stage)
  seconds = (time.monotonic() - began) / (1 + more)
  return state, distributed.broadcast(seconds)


def _fit(seconds: float) -> int:
  """Returns how many updates there is time for beside one that took so long."""
  return min(int(_SECONDS / max(seconds, 1e-9)), _MOST_UPDATES - 1)


def _update(trainer: Trainer, state: TrainState, stage: StagePlan):
  state, _ = trainer.update(state, stage.start)
  return jax.block_until_ready(state)
