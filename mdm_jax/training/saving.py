"""When the loop saves its state; `checkpoints/` knows how."""

import time
from typing import Any

from mdm_jax.checkpoints.checkpoint import Checkpoints
from mdm_jax.core import distributed
from mdm_jax.training.config import TrainConfig
from mdm_jax.training.hooks import Hook
from mdm_jax.training.state import TrainState


class Saving(Hook):
  """Saves every so many updates or minutes, and hears of saves that failed."""

  def __init__(self, checkpoints: Checkpoints, config: TrainConfig):
    self._checkpoints, self._config = checkpoints, config
    self._saved_at = time.monotonic()

  def on_update(self, done: int, state: TrainState) -> None:
    self._checkpoints.check_save()

  def is_due(self, done: int) -> bool:
    """Returns whether to save after so many updates; the same everywhere."""
    config = self._config
    if done % config.checkpoint_every == 0:
      return True
    if not config.checkpoint_minutes or done % config.log_every:
      return False
    # By one clock: processes that disagree would wait for each other for ever.
    minutes = (time.monotonic() - self._saved_at) / 60
    return distributed.broadcast(minutes >= config.checkpoint_minutes)

  def save(self, done: int, state: TrainState, kept: dict[str, Any]) -> None:
    """Begins to save a state, and what is to be kept beside it."""
    self._checkpoints.save(done, state, kept)
    self._saved_at = time.monotonic()

  def wait(self) -> None:
    """Returns when all is on disk; raises StorageError if that failed."""
    self._checkpoints.wait()
