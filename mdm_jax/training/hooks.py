"""Hooks: callbacks of the training loop.

  class Norms(Hook):
    def on_update(self, done, state):
      if done % 100 == 0:
        print(done, optax.tree.norm(state.params))

  train_and_evaluate(config, workdir, hooks=[Norms()])

The library's own hooks are called first (session, log, limit of skipped
updates, saving, evaluation), then yours, in the order given. Each event is
passed to all hooks before the next one:

  on_start
  each update:  on_stage (if one begins), during DATA, during TRAIN with
                on_metrics in it, on_update, should_stop, wants_state,
                if the state is saved: during SAVE with on_save in it,
                if a hook wants it: during EVAL with on_evaluate in it
  on_end

In a multi-process run every process calls its own hooks. Whatever runs on all
devices or waits for other processes must happen at the same updates everywhere:
decide by the update's number, never by a clock, or the processes deadlock.
"""

import contextlib
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from mdm_jax.runtime.goodput import Cause
from mdm_jax.training.curriculum import StagePlan
from mdm_jax.training.state import TrainState
from mdm_jax.training.step import Metrics


class Hook:
  """Callbacks that do nothing; override the ones you need.

  `done` is the number of updates since the start of the run, and `state` the
  state after them. The next update donates its arrays: keep numbers computed
  from a state, not the state.
  """

  def on_start(self, state: TrainState) -> None:
    """Called once before the first update, with a new or restored state."""

  def on_stage(self, stage: StagePlan, update: int) -> None:
    """Called before `update`, the first one of this process in a stage."""

  def during(self, cause: Cause, update: int) -> AbstractContextManager[None]:
    """Returns a context manager around a phase of the loop.

    Args:
      cause: DATA, TRAIN, SAVE or EVAL.
      update: index of the update that it belongs to, from 0.
    """
    return contextlib.nullcontext()

  def on_metrics(self, done: int, metrics: Metrics) -> None:
    """Called when an update has been dispatched.

    Args:
      done: number of updates, including this one.
      metrics: the update's metrics. The device may still be computing them:
        reading them right here delays the dispatch of the next update. Read
        them one update later, as `run_log.RunLog` does.
    """

  def on_update(self, done: int, state: TrainState) -> None:
    """Called after an update was dispatched, or skipped by the config."""

  def should_stop(self, done: int) -> str | None:
    """Returns the reason to stop here, in a word, or None.

    Must agree on all processes. The state is saved first, and running the same
    command again resumes.
    """

  def wants_state(self, done: int) -> bool:
    """Returns whether to save this state and then call `on_evaluate`."""
    return False

  def on_save(self, done: int, state: TrainState, kept: dict[str, Any]) -> None:
    """Called before a state is saved.

    Args:
      done: number of updates.
      state: the state after them.
      kept: saved with the checkpoint; add plain JSON values to it.
    """

  def on_evaluate(self, done: int, state: TrainState) -> None:
    """Called with a saved state, if this hook's `wants_state` was True."""

  def on_end(self, state: TrainState) -> None:
    """Called after the last update; not after a stop or an error."""


class Hooks(Hook):
  """Passes every call on to several hooks, in order."""

  def __init__(self, *hooks: Hook):
    self._hooks = hooks

  def _each(self, event: str, *args: Any) -> None:
    for hook in self._hooks:
      getattr(hook, event)(*args)

  on_start = functools.partialmethod(_each, "on_start")
  on_stage = functools.partialmethod(_each, "on_stage")
  on_metrics = functools.partialmethod(_each, "on_metrics")
  on_update = functools.partialmethod(_each, "on_update")
  on_save = functools.partialmethod(_each, "on_save")
  on_end = functools.partialmethod(_each, "on_end")

  @contextlib.contextmanager
  def during(self, cause: Cause, update: int) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
      for hook in self._hooks:
        stack.enter_context(hook.during(cause, update))
      yield

  def should_stop(self, done: int) -> str | None:
    # Ask all hooks, without a short circuit: one may need to exchange messages
    # with other processes at every call.
    reasons = [hook.should_stop(done) for hook in self._hooks]
    return next(filter(None, reasons), None)

  def wants_state(self, done: int) -> bool:
    # A list, so that here too all hooks are asked.
    return any([hook.wants_state(done) for hook in self._hooks])

  def on_evaluate(self, done: int, state: TrainState) -> None:
    for hook in self._hooks:
      # It may be another hook that wanted the state.
      if hook.wants_state(done):
        hook.on_evaluate(done, state)
