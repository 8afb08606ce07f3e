"""The training loop: from a config and a workdir to a measured model.

  prepare data -> tell the plan -> restore or initialise
  -> update, log, save, evaluate -> final evaluation and samples

The state saved under update k is the state after k updates; batch, masks and
learning rate of the next one follow from k alone, so a resumed run continues
exactly where it was. A state is saved before it is evaluated: whatever happens
there loses nothing, and is done again. Keep the order inside the loop:
dispatch an update, and only then read the numbers of the one before, so the
device never waits.
"""

import dataclasses
import hashlib
import json
import time
from typing import Any

import jax

from mdm_jax import config as config_lib
from mdm_jax import config_changes, preview
from mdm_jax import evaluate as evaluate_lib
from mdm_jax import plan as plan_lib
from mdm_jax.checkpoints.checkpoint import Checkpoints
from mdm_jax.config import Config
from mdm_jax.core import determinism, distributed
from mdm_jax.core.errors import NumericsError, Stopped
from mdm_jax.core.progress import ProgressLine, console, duration
from mdm_jax.data.prepared import prepare_on_all
from mdm_jax.evaluation import tables
from mdm_jax.model.placement import training_mesh
from mdm_jax.objectives.measured import evaluation
from mdm_jax.resume import Origin, find_origin
from mdm_jax.runtime.goodput import Cause
from mdm_jax.runtime.session import ROLL_SECONDS, Session
from mdm_jax.trained_model import averaged_params
from mdm_jax.training import incident
from mdm_jax.training.run_log import RunLog
from mdm_jax.training.state import TrainState
from mdm_jax.training.trainer import Trainer
from mdm_jax.training.writers import Writers
from mdm_jax.workdir import Workdir

_EVALUATION = "validation/", "samples/"  # names of what an evaluation writes


def train_and_evaluate(config: Config, workdir: Workdir) -> dict[str, Any]:
  """Trains all stages, or what is left of them, and returns the results.

  Raises:
    UserError: the config, the data or the workdir can't be used.
    StorageError: the workdir can't be written, is full, or is damaged.
    NumericsError: losses or gradients stayed without a finite value.
    CrashLoop: the last attempts all died without saving anything new.
    Aborted: another process is gone.
    Stopped: a signal came; the same command resumes.
  """
  workdir.create()
  train = config.train
  with (
    Session(
      workdir.path, _sha256(config), train.max_attempts, train.watchdog_seconds
    ) as session,
    Checkpoints(
      workdir.path,
      train.keep_latest,
      train.keep_every,
      on_sealed=session.attempt.commit,
    ) as checkpoints,
  ):
    with session.attempt.ledger.spend(Cause.RESTORE):
      latest = distributed.first_alone(checkpoints.latest)
      session.attempt.begin(latest or 0)
      origin = distributed.first_alone(
        lambda: find_origin(config, workdir, checkpoints, latest)
      )
      distributed.agree("the checkpoint to go on from", origin.update)
      session.attempt.begin(origin.done)
    data = prepare_on_all(config.rows, workdir.path)
    distributed.agree("the prepared data", data.manifest["files"])
    workdir.check_tokenizer(data.tokenizer.sha256)
    if origin.update is not None:
      workdir.check_data(data.manifest)
    determinism.check(train.deterministic == "true")
    mesh = training_mesh(config.mesh, config.model)
    session.check()
    with jax.set_mesh(mesh), distributed.naming_peers(ROLL_SECONDS):
      trainer = Trainer(config, data, mesh)
      run = Run(trainer, workdir, checkpoints, session, origin)
      return run.train() or run.finish()


class Run:
  """One attempt at a run: what it is made of, and the loop."""

  def __init__(
    self,
    trainer: Trainer,
    workdir: Workdir,
    checkpoints: Checkpoints,
    session: Session,
    origin: Origin | None = None,
  ):
    """Puts an attempt together; without an origin it starts anew."""
    self.trainer, self.workdir = trainer, workdir
    self.checkpoints, self.session = checkpoints, session
    self.config, self.data = trainer.config, trainer.data
    self.curriculum = trainer.curriculum
    self.measures = evaluate_lib.Measures(
      self.config, self.data, trainer.denoiser, trainer.mesh, session.check
    )
    self._origin, self._attempt = origin or Origin(), session.attempt
    self._saved_at = time.monotonic()

  def train(self) -> dict[str, Any] | None:
    """Makes every update that is left.

    Returns:
      The results, where all is made and measured; None where that is to do.

    Raises:
      UserError: more updates are made than the stages have.
    """
    done = self._origin.done
    self._origin.check_not_beyond(
      self.curriculum.updates, self.workdir, self.checkpoints
    )
    if done == self.curriculum.updates and self._origin.measured:
      return self._read_final()
    # First what is only looked at: a config that can't resume the run must
    # leave it as it is, and the calibration's state must be gone before ours.
    if self._origin.update is not None:
      self.checkpoints.check(done, self.trainer.abstract())
    preview.show(self.config, self.data)
    with self._spend(Cause.COMPILE):
      plan_lib.show(plan_lib.make_plan(self.trainer, done))
    self.session.check()
    with self._spend(Cause.RESTORE):
      self.checkpoints.set_aside_after(self._origin.update)
      state = self._restore_or_init()
    self._write_what_it_is()
    with (
      self._writers() as writers,
      ProgressLine(self.curriculum.updates) as line,
    ):
      log = RunLog(self.trainer, writers, line, self._attempt, self._progress())
      self._tell_start(log)
      self.advance(state, self.curriculum.updates, log)
    return None

  def advance(self, state: TrainState, until: int, log: RunLog) -> TrainState:
    """Does what is left of the first `until` updates; returns the state then.

    Logs, saves and evaluates on the way. The state it is given is consumed.

    Raises:
      Stopped: a signal came, and all that was done is saved.
      NumericsError: too many updates in a row could not be applied.
    """
    stage, done = None, int(state.step)
    if self._is_evaluated_late(done):
      self._evaluate(done, state, log)
    for update in range(done, until):
      if self.curriculum.stage_at(update) is not stage:
        stage = self.curriculum.stage_at(update)
        log.start_stage(stage, update)
      state = self._update(state, update, log)
      self._attempt.update = update + 1
      self._after_update(update + 1, state, log)
    log.flush()
    self._check_applied(state, log)
    return state

  def finish(self) -> dict[str, Any]:
    """Measures the best checkpoint and writes the results."""
    with self._spend(Cause.EVAL):
      step, params = averaged_params(self.checkpoints, self.trainer.denoiser)
      return evaluate_lib.evaluate_params(
        self.workdir, self.measures, self.checkpoints, step, params
      )

  def _read_final(self) -> dict[str, Any] | None:
    """Returns the results, if they are what the final evaluation would give."""
    told = f"{self.workdir.path} is finished: nothing to train"
    results = self.measures.read_final(self.workdir, self.checkpoints)
    if results is None:
      told += "; its results are of another update, text or setting, or missing"
      self._write_what_it_is()
    console.print(told, soft_wrap=True)
    return results

  # MARK: an update and what follows

  def _update(self, state: TrainState, update: int, log: RunLog) -> TrainState:
    if self.trainer.passes_over(update):
      return self.trainer.pass_over(state)
    try:
      with self._spend(Cause.DATA):
        batch = self.trainer.batch(self.curriculum.stage_at(update), update)
      with self._spend(Cause.TRAIN):
        every = self.config.train.recheck_every
        twice = every and (update + 1) % every == 0
        make = self.trainer.update_twice if twice else self.trainer.update
        state, metrics = make(state, update, batch)
        log.add(update + 1, metrics)
    except Exception:
      # Of this update or, being read late, of the one before.
      self._attempt.rows = self.trainer.row_numbers(update).tolist()
      raise
    return state

  def _after_update(self, done: int, state: TrainState, log: RunLog) -> None:
    """Saves and evaluates where that is due, and stops where it was asked."""
    self._check_applied(state, log)
    self.checkpoints.check_save()
    stop = self.session.poll()
    last = done == self.curriculum.updates
    evaluate = self._is_evaluated_at(done)
    if evaluate or stop or self._is_saved_at(done):
      with self._spend(Cause.SAVE):
        self._save(state, log)
    if evaluate and not stop:
      self._evaluate(done, state, log)
    if stop and not last:
      with self._spend(Cause.SAVE):
        self.checkpoints.wait()
      raise Stopped(
        f"{self.session.stop.name}: saved update {done} of"
        f" {self.curriculum.updates}; the same command resumes"
      )

  def _is_evaluated_at(self, done: int) -> bool:
    every = self.config.eval.every
    return done == self.curriculum.updates or bool(
      every and done and done % every == 0
    )

  def _is_evaluated_late(self, done: int) -> bool:
    """Whether an earlier attempt saved this update, but did not measure it."""
    due = done == self._origin.update and self._is_evaluated_at(done)
    return due and not self._origin.measured

  def _is_saved_at(self, done: int) -> bool:
    train = self.config.train
    if done % train.checkpoint_every == 0:
      return True
    if not train.checkpoint_minutes or done % train.log_every:
      return False
    # By one clock: processes that disagree would wait for each other for ever.
    minutes = (time.monotonic() - self._saved_at) / 60
    return distributed.broadcast(minutes >= train.checkpoint_minutes)

  def _save(self, state: TrainState, log: RunLog) -> None:
    log.flush()
    self._check_applied(state, log)
    log.writers.flush()
    self.checkpoints.save(int(state.step), state, log.progress())
    self._saved_at = time.monotonic()

  def _evaluate(self, done: int, state: TrainState, log: RunLog) -> None:
    """Measures the averaged parameters on a few validation rows."""
    began = time.monotonic()
    with self._spend(Cause.EVAL):
      measured, sizes = self.measures.validation(state.ema_params)
      samples = self.measures.sample(state.ema_params)
    found = measured.scalars() | sizes
    scalars = {f"validation/{name}": x for name, x in found.items()}
    texts = {f"samples/{i}": text for i, text in enumerate(samples.texts)}
    log.writers.write_scalars(done, scalars)
    log.writers.write_texts(done, texts)
    log.writers.flush()
    self.checkpoints.record(done, evaluation(measured) | sizes)
    log.line.say(
      f"update {done}: validation {tables.in_a_line(measured)}"
      f" ({duration(log.seconds)})"
    )
    log.not_counted(began)

  def _check_applied(self, state: TrainState, log: RunLog) -> None:
    """Ends a run whose updates can't be applied any more.

    Raises:
      NumericsError: there were too many in a row; a folder tells of each.
    """
    failed = log.failed
    if len(failed) < self.config.train.max_skipped:
      return
    updates = [update - 1 for update in failed]
    folder = self.workdir.path / "numerics_report"
    incident.write_report(folder, self.trainer, state, updates)
    last = self.checkpoints.latest()
    raise NumericsError(
      f"updates {failed[0]} to {failed[-1]} were not applied, being not finite"
      f" or spikes; {folder} tells what they read. The last checkpoint is"
      f" {last}. To pass over them: --config.train.skip_updates="
      f"{updates[0]}:{updates[-1] + 1}"
    )

  # MARK: the start

  def _restore_or_init(self) -> TrainState:
    update = self._origin.update
    if update is None:
      return self._start()
    console.print(f"resuming {self.workdir.path} at update {update}")
    return self.checkpoints.restore(update, self.trainer.abstract())

  def _start(self) -> TrainState:
    source = self.config.init_from
    if not source:
      return self.trainer.init()
    with Checkpoints(source) as finished:
      step, params = averaged_params(finished, self.trainer.denoiser)
    console.print(f"starting from the parameters of {source}, update {step}")
    return self.trainer.init_from(params)

  def _progress(self) -> dict[str, Any] | None:
    update = self._origin.update
    return None if update is None else self.checkpoints.progress(update)

  def _write_what_it_is(self) -> None:
    self.workdir.write_config(self.config, self.data.tokenizer.sha256)
    self.workdir.write_data(self.data.manifest)
    if distributed.is_first():
      self.data.tokenizer.save(self.workdir.path)

  def _writers(self) -> Writers:
    update = self._origin.update
    if update is None:
      return Writers(self.workdir.path, after=-1)
    redo = _EVALUATION if self._is_evaluated_late(update) else ()
    return Writers(self.workdir.path, after=update, redo=redo)

  def _tell_start(self, log: RunLog) -> None:
    """Writes what the run is, or what has changed since it began."""
    update = self._origin.update
    if update is None:
      log.writers.write_texts(0, {"config": _as_text(self.config)})
      texts = preview.describe(self.config, self.data)
      log.writers.write_texts(0, {f"data/{k}": v for k, v in texts.items()})
    elif self._origin.changes:
      table = config_changes.table(self._origin.changes)
      text = f"other settings from update {update} on:\n{table}"
      log.line.say(f"warning: {text}")
      self._attempt.changes = text
      log.writers.write_texts(update, {"config_changes": text})

  def _spend(self, cause: Cause):
    return self._attempt.ledger.spend(cause)


def _as_text(config: Config) -> str:
  return "\n".join(f"{k}: {v}" for k, v in dataclasses.asdict(config).items())


def _sha256(config: Config) -> str:
  plain = json.dumps(config_lib.to_dict(config), sort_keys=True)
  return hashlib.sha256(plain.encode()).hexdigest()[:16]
