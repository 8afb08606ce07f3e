"""The training loop: from a config and a workdir to a measured model.

The state saved under update k is the state after k updates; batch, masks and
learning rate of the next one follow from k alone, so a resumed run continues
exactly where it was. A state is saved before it is evaluated: whatever happens
there loses nothing, and is done again. Keep the order inside the loop: dispatch
an update, and only then read the numbers of the one before (the log does, in
`on_metrics`), so the device never waits. All processes of several take the same
turns.

Look into `start.py` for what comes before the loop, into `training/hooks.py`
for who hears what it does.
"""

from collections.abc import Iterable
from typing import Any

from mdm_jax.config import Config
from mdm_jax.core.errors import Stopped
from mdm_jax.runtime.goodput import Cause
from mdm_jax.start import open_run
from mdm_jax.training.hooks import Hook
from mdm_jax.training.saving import Saving
from mdm_jax.training.state import TrainState
from mdm_jax.training.trainer import Trainer
from mdm_jax.workdir import Workdir


def train_and_evaluate(
  config: Config, workdir: Workdir, hooks: Iterable[Hook] = ()
) -> dict[str, Any]:
  """Trains all stages, or what is left of them, and returns the results.

  Args:
    config: of the run.
    workdir: its folder; a run that was begun there is resumed.
    hooks: what else is to hear of every update; see `training/hooks.py`.

  Raises:
    UserError: the config, the data or the workdir can't be used.
    StorageError: the workdir can't be written, is full, or is damaged.
    NumericsError: losses or gradients stayed without a finite value.
    CrashLoop: the last attempts all died without saving anything new.
    Aborted: another process is gone.
    Stopped: a signal came; the same command resumes.
  """
  with open_run(config, workdir) as run:
    if run.is_finished:
      results = run.read_results()
      if results is not None:
        return results
    else:
      state = run.restore_or_init()
      with run.subscribed(hooks) as (subscribed, saving):
        subscribed.on_start(state)
        if run.is_evaluated_late:
          _evaluate(run.done, state, subscribed)
        train(run.trainer, state, run.updates, subscribed, saving)
    return run.measure_best()


def train(
  trainer: Trainer, state: TrainState, until: int, hooks: Hook, saving: Saving
) -> TrainState:
  """Makes what is left of the first `until` updates; returns the state then.

  The state it is given is consumed.

  Raises:
    Stopped: a hook asked for it, and all that was done is saved.
  """
  stage = None
  for update in range(int(state.step), until):
    done = update + 1
    if trainer.curriculum.stage_at(update) is not stage:
      stage = trainer.curriculum.stage_at(update)
      hooks.on_stage(stage, update)

    if trainer.passes_over(update):
      state = trainer.pass_over(state)
    else:
      with hooks.during(Cause.DATA, update):
        batch = trainer.batch(stage, update)
      with hooks.during(Cause.TRAIN, update):
        state, metrics = trainer.checked_update(state, update, batch)
        hooks.on_metrics(done, metrics)
    hooks.on_update(done, state)

    why = hooks.should_stop(done)
    wanted = hooks.wants_state(done)
    if wanted or why or saving.is_due(done):
      with hooks.during(Cause.SAVE, update):
        kept = {}
        hooks.on_save(done, state, kept)
        saving.save(done, state, kept)
    if wanted and not why:
      _evaluate(done, state, hooks)
    if why and done < trainer.curriculum.updates:
      with hooks.during(Cause.SAVE, update):
        saving.wait()
      raise Stopped(
        f"{why}: saved update {done} of {trainer.curriculum.updates}; the same"
        " command resumes"
      )
  hooks.on_end(state)
  return state


def _evaluate(done: int, state: TrainState, hooks: Hook) -> None:
  with hooks.during(Cause.EVAL, done - 1):
    hooks.on_evaluate(done, state)
