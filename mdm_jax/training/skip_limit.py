"""Ends a run after too many consecutive updates that were not applied."""

from typing import Any

from etils import epath

from mdm_jax.checkpoints.checkpoint import Checkpoints
from mdm_jax.core.errors import NumericsError
from mdm_jax.training import incident
from mdm_jax.training.hooks import Hook
from mdm_jax.training.run_log import RunLog
from mdm_jax.training.state import TrainState
from mdm_jax.training.trainer import Trainer


class SkipLimit(Hook):
  """Raises NumericsError, with a report, after too many skipped updates.

  Args:
    most: number of consecutive skipped updates that ends the run.
    log: the log, which counts them.
    trainer: recomputes them for the report.
    checkpoints: the run's checkpoints, for the message.
    folder: the workdir.
  """

  def __init__(
    self,
    most: int,
    log: RunLog,
    trainer: Trainer,
    checkpoints: Checkpoints,
    folder: epath.Path,
  ):
    self._most, self._log, self._trainer = most, log, trainer
    self._checkpoints, self._folder = checkpoints, folder

  def on_update(self, done: int, state: TrainState) -> None:
    self._check(state)

  # The log reads metrics one update late, except that it catches up before a
  # save and at the end. So check then too: it may have found one more failure.
  def on_save(self, done: int, state: TrainState, kept: dict[str, Any]) -> None:
    self._check(state)

  def on_end(self, state: TrainState) -> None:
    self._check(state)

  def _check(self, state: TrainState) -> None:
    """Raises NumericsError if there are too many."""
    failed = self._log.failed
    if len(failed) < self._most:
      return
    updates = [update - 1 for update in failed]
    folder = self._folder / "numerics_report"
    incident.write_report(folder, self._trainer, state, updates)
    last = self._checkpoints.latest()
    raise NumericsError(
      f"updates {failed[0]} to {failed[-1]} were not finite or spikes, and not"
      f" applied; {folder} has a report with their rows. The last checkpoint is"
      f" {last}. To skip these updates: --config.train.skip_updates="
      f"{updates[0]}:{updates[-1] + 1}"
    )
