"""Measures how long an update of each stage takes on the devices at hand."""

import time

import jax

from mdm_jax.core import distributed
from mdm_jax.training.curriculum import StagePlan
from mdm_jax.training.state import TrainState
from mdm_jax.training.trainer import Trainer

_SECONDS = 1.0  # of timing per stage, if its updates are short
_MOST_UPDATES = 10


def update_seconds(trainer: Trainer, after: int = 0) -> dict[int, float]:
  """Returns the seconds per update of every stage that has updates left.

  The stages' programs are compiled here, and the run uses them later. The trial
  needs a training state of its own, which is freed at the end: call this before
  the run's state exists.

  Args:
    trainer: makes the updates; called on its mesh.
    after: updates already made; stages that end by then are left out.

  Returns:
    Seconds by index of the stage.
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
  state = _update(trainer, state, stage)  # compiles: not timed
  began = time.monotonic()
  state = _update(trainer, state, stage)
  # Process 0 decides: with clocks of their own, processes would make different
  # numbers of updates, and hang in the collectives of the last one.
  more = distributed.broadcast(_fit(time.monotonic() - began))
  for _ in range(more):
    state = _update(trainer, state, stage)
  seconds = (time.monotonic() - began) / (1 + more)
  return state, distributed.broadcast(seconds)


def _fit(seconds: float) -> int:
  """Returns how many more updates fit into the trial, from the time of one."""
  return min(int(_SECONDS / max(seconds, 1e-9)), _MOST_UPDATES - 1)


def _update(trainer: Trainer, state: TrainState, stage: StagePlan):
  state, _ = trainer.update(state, stage.start)
  return jax.block_until_ready(state)
