"""Hooks: what the training loop tells while it goes on, to whoever subscribes.

  class Norms(Hook):
    def on_update(self, done, state):
      if done % 100 == 0:
        print(done, optax.tree.norm(state.params))

  train_and_evaluate(config, workdir, hooks=[Norms()])

The library's own come first (the session, the log, the limit of updates that
were not applied, saving, the evaluation), then yours, in the order given; all
of them hear of one thing before any hears of the next:

  on_start
  each update:  on_stage (if one begins), during DATA, during TRAIN with
                on_metrics in it, on_update, should_stop, wants_state,
                if it is saved: during SAVE with on_save in it,
                if it is wanted: during EVAL with on_evaluate in it
  on_end

Every process of several calls its own hooks. What runs on all devices, or waits
for the other processes, must do so equally often everywhere, never by a clock.
"""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from mdm_jax.runtime.goodput import Cause
from mdm_jax.training.curriculum import StagePlan
from mdm_jax.training.state import TrainState
from mdm_jax.training.step import Metrics


class Hook:
  """Hears what the loop does; a subclass takes what it needs.

  `done` counts updates from the start of the run: the state given with it is
  the one after so many. The next update consumes its arrays: keep numbers of
  it, not the state.
  """

  def on_start(self, state: TrainState) -> None:
    """Hears that updates begin, from a new or a restored state."""

  def on_stage(self, stage: StagePlan, update: int) -> None:
    """Hears of the stage that `update` and those after it belong to."""

  def during(self, cause: Cause, update: int) -> AbstractContextManager[None]:
    """Surrounds a part of the loop: DATA, TRAIN, SAVE or EVAL.

    Args:
      cause: what is done, as the ledger of the run's time calls it.
      update: the number of the update it is done for, from 0.
    """
    return contextlib.nullcontext()

  def on_metrics(self, done: int, metrics: Metrics) -> None:
    """Hears that an update was dispatched.

    Args:
      done: updates, with this one.
      metrics: its numbers. They may still be computed: to read them at once
        keeps the device waiting for the next update.
    """

  def on_update(self, done: int, state: TrainState) -> None:
    """Hears that an update was made, or passed over."""

  def should_stop(self, done: int) -> str | None:
    """Returns why to stop here, in a word; the same on every process.

    What was done is saved first, and the same command resumes.
    """

  def wants_state(self, done: int) -> bool:
    """Returns whether to save this state and then to call `on_evaluate`."""
    return False

  def on_save(self, done: int, state: TrainState, kept: dict[str, Any]) -> None:
    """Hears that a state is going to be saved.

    Args:
      done: updates.
      state: the state after them.
      kept: is saved beside it; what is added has to be plain JSON values.
    """

  def on_evaluate(self, done: int, state: TrainState) -> None:
    """Takes a saved state that it wanted."""

  def on_end(self, state: TrainState) -> None:
    """Hears that there are no more updates; not of a stop or an error."""


class Hooks(Hook):
  """Several hooks as one."""

  def __init__(self, *hooks: Hook):
    self._hooks = hooks

  def on_start(self, state: TrainState) -> None:
    for hook in self._hooks:
      hook.on_start(state)

  def on_stage(self, stage: StagePlan, update: int) -> None:
    for hook in self._hooks:
      hook.on_stage(stage, update)

  @contextlib.contextmanager
  def during(self, cause: Cause, update: int) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
      for hook in self._hooks:
        stack.enter_context(hook.during(cause, update))
      yield

  def on_metrics(self, done: int, metrics: Metrics) -> None:
    for hook in self._hooks:
      hook.on_metrics(done, metrics)

  def on_update(self, done: int, state: TrainState) -> None:
    for hook in self._hooks:
      hook.on_update(done, state)

  def should_stop(self, done: int) -> str | None:
    # All are asked: one may have to answer together with other processes.
    reasons = [hook.should_stop(done) for hook in self._hooks]
    return next(filter(None, reasons), None)

  def wants_state(self, done: int) -> bool:
    return any([hook.wants_state(done) for hook in self._hooks])

  def on_save(self, done: int, state: TrainState, kept: dict[str, Any]) -> None:
    for hook in self._hooks:
      hook.on_save(done, state, kept)

  def on_evaluate(self, done: int, state: TrainState) -> None:
    for hook in self._hooks:
      if hook.wants_state(done):
        hook.on_evaluate(done, state)

  def on_end(self, state: TrainState) -> None:
    for hook in self._hooks:
      hook.on_end(state)
