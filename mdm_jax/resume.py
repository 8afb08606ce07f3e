"""Chooses the checkpoint that a run resumes from."""

import dataclasses

from mdm_jax import config_changes
from mdm_jax.checkpoints.checkpoint import Checkpoints
from mdm_jax.config import Config
from mdm_jax.config_changes import Change
from mdm_jax.core.errors import UserError
from mdm_jax.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Origin:
  """Where an attempt at a run starts.

  Attributes:
    update: of the checkpoint to resume from, None for a fresh start.
    measured: whether that checkpoint was evaluated.
    changes: fields of the config that have changed since, all of them allowed.
  """

  update: int | None = None
  measured: bool = False
  changes: tuple[Change, ...] = ()

  @property
  def done(self) -> int:
    """Updates made before this attempt."""
    return self.update or 0

  def describe_changes(self) -> str | None:
    """Returns a table of the changed config fields, or None."""
    if not self.changes:
      return None
    table = config_changes.table(self.changes)
    return f"settings changed from update {self.update} on:\n{table}"

  def check_not_beyond(
    self, updates: int, workdir: Workdir, checkpoints: Checkpoints
  ) -> None:
    """Raises UserError if the run has made more than `updates` updates."""
    if self.done <= updates:
      return
    table = config_changes.table(self.changes)
    raise UserError(
      f"{workdir.path} has made {self.done} updates, more than the {updates} of"
      " these stages: a run can't be made shorter. Restore the saved values,"
      " use another --workdir, or go back to a checkpoint with"
      f" --config.train.restore_step (it has: {checkpoints.listed()})\n{table}"
    )


def find_origin(
  config: Config,
  workdir: Workdir,
  checkpoints: Checkpoints,
  latest: int | None,
) -> Origin:
  """Chooses the checkpoint to resume from; writes nothing.

  Args:
    config: the config of this attempt.
    workdir: the run's folder.
    checkpoints: the run's checkpoints.
    latest: the newest whole checkpoint, if there is any.

  Raises:
    UserError: the config is another run's, or has a `train.restore_step` that
      was not saved.
  """
  wanted = config.train.restore_step
  saved = None
  if latest is not None:
    saved = workdir.read_config()
  # A saved config with this restore_step means that an earlier attempt went
  # back to it: from then on the same command resumes from the newest
  # checkpoint.
  if wanted is None or (saved and saved.train.restore_step == wanted):
    update = latest
  else:
    checkpoints.check_has(wanted)
    update = wanted
  if saved is None:
    return Origin()
  # An attempt may have died between the save and the evaluation.
  measured = checkpoints.evaluation(update) is not None
  return Origin(update, measured, config_changes.check(saved, config))
