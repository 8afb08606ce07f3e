"""Starts or resumes a run: everything before the first update.

lock the workdir -> choose the checkpoint to resume from -> prepare the data ->
build the trainer -> print the plan -> restore or initialise the state
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from mdm_jax import config as config_lib
from mdm_jax import evaluate as evaluate_lib
from mdm_jax import plan as plan_lib
from mdm_jax import preview
from mdm_jax.blueprint import make_trainer
from mdm_jax.checkpoints.checkpoint import Checkpoints
from mdm_jax.config import Config
from mdm_jax.core import determinism, distributed
from mdm_jax.core.progress import ProgressLine, console
from mdm_jax.data.prepared import PreparedData, prepare_on_all
from mdm_jax.huggingface import folder as folders
from mdm_jax.model.denoiser import Params
from mdm_jax.model.placement import training_mesh
from mdm_jax.resume import Origin, find_origin
from mdm_jax.runtime.goodput import Cause
from mdm_jax.runtime.session import PEER_SECONDS, Session
from mdm_jax.training.hooks import Hook, Hooks
from mdm_jax.training.platform_status import PlatformStatus
from mdm_jax.training.run_log import RunLog
from mdm_jax.training.saving import Saving
from mdm_jax.training.skip_limit import SkipLimit
from mdm_jax.training.state import TrainState
from mdm_jax.training.supervision import Supervision
from mdm_jax.training.trainer import Trainer
from mdm_jax.training.writers import Writers
from mdm_jax.validation import WRITTEN, Validation, is_evaluated_at
from mdm_jax.weights import (
  averaged_params,
  check_base,
  start_params,
  write_base,
)
from mdm_jax.workdir import Workdir


@contextlib.contextmanager
def open_run(config: Config, workdir: Workdir) -> Iterator["Run"]:
  """Yields a run that only this program works on, with its mesh set.

  Raises:
    UserError: the config, the data or the workdir can't be used.
    StorageError: the workdir can't be written, or is damaged.
    CrashLoop: the last attempts all died without saving anything new.
    Aborted: another process is gone.
    Stopped: a signal came.
  """
  workdir.create()
  # Before the lock is taken: a folder of another version stays as it is.
  for path in (workdir.path, config.init_from):
    if path and not folders.is_named(str(path)):
      Workdir(path).check_format()
  train = config.train
  with (
    Session(
      workdir.path, _sha256(config), train.max_attempts, train.watchdog_seconds
    ) as session,
    Checkpoints(
      workdir.path,
      train.keep_latest,
      train.keep_every,
      # A save counts as safe once it is verified, which happens later and in
      # another thread.
      on_sealed=session.attempt.commit,
    ) as checkpoints,
  ):
    with session.attempt.ledger.spend(Cause.RESTORE):
      latest = distributed.first_alone(checkpoints.latest)
      # Set twice: where find_origin refuses the config, the attempt is recorded
      # as one that added nothing to the newest checkpoint.
      session.attempt.begin(latest or 0)
      origin = distributed.first_alone(
        lambda: find_origin(config, workdir, checkpoints, latest)
      )
      # Processes that start apart would wait for each other, or train on
      # different states.
      distributed.agree("the checkpoint to resume from", origin.update)
      session.attempt.begin(origin.done)
    data = prepare_on_all(config.rows, workdir.path)
    # Without a shared disk each process prepares its own rows.
    distributed.agree("the prepared data", data.manifest["files"])
    workdir.check_revisions(data.manifest)
    workdir.check_tokenizer(data.tokenizer.sha256)
    if origin.update is not None:
      workdir.check_data(data.manifest)
    determinism.check(train.deterministic == "true")
    mesh = training_mesh(config.mesh, config.model)
    session.check()
    # Where a peer is gone, a collective fails with a connection error that
    # names nobody.
    with jax.set_mesh(mesh), distributed.naming_peers(PEER_SECONDS):
      trainer = make_trainer(config, data, mesh)
      run = Run(config, trainer, workdir, checkpoints, session, origin)
      origin.check_not_beyond(run.updates, workdir, checkpoints)
      yield run


class Run:
  """One attempt at a run.

  Attributes:
    trainer: makes its updates; the only part that `training_loop.train` needs.
    origin: the checkpoint that this attempt resumes from.
    updates: number of updates of all stages together.
  """

  def __init__(
    self,
    config: Config,
    trainer: Trainer,
    workdir: Workdir,
    checkpoints: Checkpoints,
    session: Session,
    origin: Origin,
  ):
    self.trainer = trainer
    self._config, self._data = config, trainer.data
    self._workdir, self._checkpoints = workdir, checkpoints
    self._session, self._attempt = session, session.attempt
    self.origin, self.updates = origin, trainer.curriculum.updates
    # Built now, though most of it is used later: a judge that can't be loaded,
    # or a sample length with no room, fails before the training.
    self._measures = evaluate_lib.Measures(
      *(config, trainer.data, trainer.plain, trainer.mesh, session.check)
    )

  @property
  def is_finished(self) -> bool:
    """Whether all updates were made and the last state was evaluated."""
    return self.origin.done == self.updates and self.origin.measured

  @property
  def is_evaluated_late(self) -> bool:
    """Whether the restored state should have been evaluated, but was not.

    This happens where an attempt ended between the save and the evaluation.
    """
    due = self.origin.update is not None and is_evaluated_at(
      self.origin.done, self.updates, self._config.eval.every
    )
    return due and not self.origin.measured

  # MARK: the start

  def restore_or_init(self) -> TrainState:
    """Prints the data and the plan; returns the state to start from.

    Raises:
      UserError: the checkpoint has another architecture or optimizer.
    """
    # Checks come first: a config that can't resume the run must leave its files
    # unchanged. The plan comes before the state: the trial updates need a state
    # of their own, and there may be no memory for two.
    update = self.origin.update
    if update is not None:
      self._checkpoints.check(update, self.trainer.abstract())
    if self.trainer.has_base:
      # Before the trial updates: there may be no memory for two of it.
      with self._spend(Cause.RESTORE):
        self._read_base()
    preview.show(self._config, self._data)
    with self._spend(Cause.COMPILE):
      plan_lib.show_plan(self._config, self.trainer, self.origin.done)
    self._session.check()
    with self._spend(Cause.RESTORE):
      # Going back to an older checkpoint must not leave newer ones behind: they
      # belong to a history that is not this one.
      self._checkpoints.set_aside_after(update)
      state = self._init() if update is None else self._restore(update)
    # Only now: until here anything could have refused to resume the run.
    self._write_run_files()
    self._attempt.changes = self.origin.describe_changes()
    return state

  def _restore(self, update: int) -> TrainState:
    console.print(f"resuming {self._workdir.path} at update {update}")
    return self._checkpoints.restore(update, self.trainer.abstract())

  def _init(self) -> TrainState:
    if self.trainer.has_base or not self._config.init_from:
      return self.trainer.init()
    what, params = self._start_params()
    console.print(f"starting from {what}")
    return self.trainer.init_from(params)

  def _start_params(self) -> tuple[str, Params]:
    source = self._config.init_from
    return start_params(source, self.trainer.plain, self._data.tokenizer)

  def _read_base(self) -> None:
    """Reads the parameters that LoRA adds to.

    Raises:
      UserError: they are not those that the run was started with.
    """
    what, base = self._start_params()
    if self.origin.update is not None:
      check_base(self._workdir, base, self._config.init_from)
    console.print(f"LoRA adds to {what}, which stay as they are")
    self.trainer.base = base

  def _write_run_files(self) -> None:
    if self.trainer.has_base and self.origin.update is None:
      write_base(self._workdir, self.trainer.base, self._config.init_from)
    tokenizer = self._data.tokenizer
    self._workdir.write_config(self._config, tokenizer.sha256)
    self._workdir.write("data.json", self._data.manifest)
    if distributed.is_first():
      tokenizer.save(self._workdir.path)

  # MARK: who hears of the updates

  @contextlib.contextmanager
  def subscribed(
    self, hooks: Iterable[Hook] = ()
  ) -> Iterator[tuple[Hook, Saving]]:
    """Yields all hooks as one, and the hook that saves.

    Args:
      hooks: the caller's own; they are called after the library's.
    """
    train, trainer = self._config.train, self.trainer
    with self._writers() as writers, ProgressLine(self.updates) as line:
      log = RunLog(
        *(trainer, writers, line, self._attempt, self._progress()),
        every=train.log_every,
      )
      saving = Saving(self._checkpoints, train)
      yield (
        Hooks(
          Supervision(self._session, trainer),
          PlatformStatus(self._config.name, self.updates, self._workdir.path),
          log,
          _Beginning(self._config, self._data, self.origin, log),
          SkipLimit(
            *(train.max_skipped, log, trainer),
            *(self._checkpoints, self._workdir.path),
          ),
          saving,
          Validation(
            *(self._measures, trainer.whole, self._checkpoints, log),
            *(self.updates, self._config.eval.every),
          ),
          *hooks,
        ),
        saving,
      )

  def _writers(self) -> Writers:
    update = self.origin.update
    if update is None:
      # A fresh start drops all lines of an attempt that saved nothing.
      return Writers(self._workdir.path, after=-1)
    # Lines after the restored update will be written again, and so will its
    # evaluation if that is due: without this they would be there twice.
    redo = WRITTEN if self.is_evaluated_late else ()
    return Writers(self._workdir.path, after=update, redo=redo)

  def _progress(self) -> dict[str, Any] | None:
    update = self.origin.update
    return None if update is None else self._checkpoints.progress(update)

  # MARK: the results

  def read_results(self) -> dict[str, Any] | None:
    """Returns the stored results, or None if they have to be made again.

    That is so where the settings or the text of the evaluation have changed.
    """
    status = f"{self._workdir.path} is finished: nothing to train"
    results = self._measures.read_final(self._workdir, self._checkpoints)
    if results is None:
      status += "; its results are missing or out of date: evaluating again"
      self._write_run_files()
    console.print(status, soft_wrap=True)
    return results

  def measure_best(self) -> dict[str, Any]:
    """Evaluates the best checkpoint; writes and returns the results."""
    with self._spend(Cause.EVAL):
      step, params = averaged_params(self._checkpoints, self.trainer.denoiser)
      params = self.trainer.whole(params)
      return evaluate_lib.evaluate_params(
        self._workdir, self._measures, self._checkpoints, step, params
      )

  def _spend(self, cause: Cause):
    return self._attempt.ledger.spend(cause)


class _Beginning(Hook):
  """Logs the config and data of a new run, or the changes at a resume."""

  def __init__(
    self, config: Config, data: PreparedData, origin: Origin, log: RunLog
  ):
    self._config, self._data = config, data
    self._origin, self._log = origin, log

  def on_start(self, state: TrainState) -> None:
    update, write = self._origin.update, self._log.writers.write_texts
    if update is None:
      write(0, {"config": _as_text(self._config)})
      texts = preview.describe(self._config, self._data)
      write(0, {f"data/{name}": text for name, text in texts.items()})
    elif changes := self._origin.describe_changes():
      self._log.line.say(f"warning: {changes}")
      write(update, {"config_changes": changes})


def _as_text(config: Config) -> str:
  return "\n".join(f"{k}: {v}" for k, v in dataclasses.asdict(config).items())


def _sha256(config: Config) -> str:
  # All processes must have the same config; and attempts that died count as a
  # crash loop only under the same one.
  plain = json.dumps(config_lib.to_dict(config), sort_keys=True)
  return hashlib.sha256(plain.encode()).hexdigest()[:16]
