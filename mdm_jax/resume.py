"""What a run goes on from: a checkpoint, and what changed since."""

import dataclasses

from mdm_jax import config as config_lib
from mdm_jax import config_changes
from mdm_jax.checkpoints.checkpoint import Checkpoints
from mdm_jax.config import Config
from mdm_jax.config_changes import Change
from mdm_jax.core.errors import UserError
from mdm_jax.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Origin:
  """What a run goes on from.

  Attributes:
    update: of the checkpoint, None for a fresh start.
    measured: whether that was evaluated.
    changes: of the config since, told and kept.
  """

  update: int | None = None
  measured: bool = False
  changes: tuple[Change, ...] = ()

  @property
  def done(self) -> int:
    """Updates that need not be made."""
    return self.update or 0

  def told(self) -> str | None:
    """Returns what has changed since, in words, or None."""
    if not self.changes:
      return None
    table = config_changes.table(self.changes)
    return f"other settings from update {self.update} on:\n{table}"

  def check_not_beyond(
    self, updates: int, workdir: Workdir, checkpoints: Checkpoints
  ) -> None:
    """Raises UserError where more was done than the stages' updates."""
    if self.done <= updates:
      return
    table = config_changes.table(self.changes)
    raise UserError(
      f"{workdir.path} has made {self.done} updates, more than the {updates} of"
      " these stages: a run is not made shorter. Take the saved values back,"
      " give another --workdir, or go back to a checkpoint with"
      f" --config.train.restore_step (there are: {checkpoints.told()})\n{table}"
    )


def find_origin(
  config: Config,
  workdir: Workdir,
  checkpoints: Checkpoints,
  latest: int | None,
) -> Origin:
  """Chooses the checkpoint to go on from; looks, and changes nothing.

  Raises:
    UserError: the config is of another run, or the step it names isn't there.
  """
  wanted = config.train.restore_step
  saved = None
  if latest is not None:
    saved = config_lib.from_dict(workdir.read_config_dict())
  # Once restored to, the same command goes on from what came after.
  if wanted is None or (saved and saved.train.restore_step == wanted):
    update = latest
  elif checkpoints.has(wanted):
    update = wanted
  else:
    raise UserError(
      f"train.restore_step={wanted}: workdir {workdir.path} has no such"
      f" checkpoint; there are: {checkpoints.told()}"
    )
  if saved is None:
    return Origin()
  measured = checkpoints.evaluation(update) is not None
  return Origin(update, measured, config_changes.check(saved, config))
