"""The training loop: from a config and a workdir to an evaluated model.

The state saved at update k is the state after k updates. The batch, the masks
and the learning rate of the next one depend on k alone, so a resumed run
continues exactly where it was. A state is saved before it is evaluated: if the
evaluation dies, no update is lost, and it is repeated.

Keep the order inside the loop: dispatch an update first, and only then read the
metrics of the one before (the log does, in `on_metrics`), so that the device
never waits. All processes take the same branches, because updates, saves and
evaluations are collective.

See `start.py` for what comes before the loop, and `training/hooks.py` for what
is called from it.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from ml_collections import config_dict

from mdm_jax.config import Config, from_config_dict
from mdm_jax.core.errors import Stopped
from mdm_jax.runtime.goodput import Cause
from mdm_jax.start import open_run
from mdm_jax.training.hooks import Hook
from mdm_jax.training.read_ahead import read_ahead
from mdm_jax.training.saving import Saving
from mdm_jax.training.state import TrainState
from mdm_jax.training.trainer import Trainer
from mdm_jax.workdir import Workdir


def train_and_evaluate(
  config: Config | config_dict.ConfigDict,
  workdir: Workdir | str,
  hooks: Iterable[Hook] = (),
) -> dict[str, Any]:
  """Trains all stages, or what is left of them, and evaluates the best model.

  Example:
    config = mdm_jax.config.default_config()
    config.data.corpus = "text:~/books/**/*.txt"
    results = mdm_jax.train(config, "runs/mine")

  Args:
    config: the run's config, or one as config files build it.
    workdir: the run's folder; a run that is in there is resumed.
    hooks: more to call at every update; see `training/hooks.py`.

  Returns:
    The results of the final evaluation, as in results.json.

  Raises:
    UserError: the config, the data or the workdir can't be used.
    StorageError: the workdir can't be written, is full, or is damaged.
    NumericsError: too many updates in a row could not be applied.
    CrashLoop: the last attempts all died without saving anything new.
    Aborted: another process is gone.
    Stopped: a signal came; the same command resumes.
  """
  if isinstance(config, config_dict.ConfigDict):
    config = from_config_dict(config)
  workdir = Workdir(workdir) if isinstance(workdir, str) else workdir
  with open_run(config, workdir) as run:
    if run.is_finished:
      results = run.read_results()
      if results is not None:
        return results
    else:
      state = run.restore_or_init()
      with run.subscribed(hooks) as (subscribed, saving):
        subscribed.on_start(state)
        # Which checkpoint is best depends on this evaluation.
        if run.is_evaluated_late:
          _evaluate(run.origin.done, state, subscribed)
        train(run.trainer, state, run.updates, subscribed, saving)
    # Also for a finished run whose results are out of date.
    return run.measure_best()


def train(
  trainer: Trainer, state: TrainState, until: int, hooks: Hook, saving: Saving
) -> TrainState:
  """Makes the updates from `state.step` up to `until`.

  Args:
    trainer: makes the updates.
    state: where to start; it is donated, so don't use it again.
    until: number of the update to end after.
    hooks: called at every step of the loop.
    saving: the one of them that saves.

  Returns:
    The state after `until` updates.

  Raises:
    Stopped: a hook asked to stop; the state has been saved.
  """
  stage, skips = None, trainer.curriculum.skips
  read = (u for u in range(int(state.step), until) if not skips(u))
  with read_ahead(trainer, read) as batches:
    for update in range(int(state.step), until):
      done = update + 1
      if trainer.curriculum.stage_at(update) is not stage:
        stage = trainer.curriculum.stage_at(update)
        hooks.on_stage(stage, update)

      # train.skip_updates: the update counts, but its rows are left out.
      if skips(update):
        state = dataclasses.replace(state, step=state.step + 1)
      else:
        with hooks.during(Cause.DATA, update):
          batch = batches.take()
        with hooks.during(Cause.TRAIN, update):
          state, metrics = trainer.checked_update(state, update, batch)
          batches.read_next()
          # Dispatched, perhaps not computed yet: a hook that reads these
          # metrics now makes the device wait for the host.
          hooks.on_metrics(done, metrics)
      hooks.on_update(done, state)

      # Hooks are asked at every update, whatever else is due: their answers may
      # need all processes.
      why = hooks.should_stop(done)
      wanted = hooks.wants_state(done)
      if wanted or why or saving.is_due(done):
        with hooks.during(Cause.SAVE, update):
          # Hooks add what a resume needs and the state doesn't have, such as
          # tokens and seconds so far.
          kept = {}
          hooks.on_save(done, state, kept)
          saving.save(done, state, kept)
      # A stop does not wait for the evaluation; the next attempt makes up for
      # it (`Run.is_evaluated_late`).
      if wanted and not why:
        _evaluate(done, state, hooks)
      # After the last update there is nothing left to stop.
      if why and done < trainer.curriculum.updates:
        with hooks.during(Cause.SAVE, update):
          # Saves run in the background; "saved" must be true when it is said.
          saving.wait()
        raise Stopped(
          f"{why}: saved update {done} of {trainer.curriculum.updates}; the"
          " same command resumes"
        )
  hooks.on_end(state)
  return state


def _evaluate(done: int, state: TrainState, hooks: Hook) -> None:
  with hooks.during(Cause.EVAL, done - 1):
    hooks.on_evaluate(done, state)
