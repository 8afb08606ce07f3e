"""When the training loop saves a checkpoint; `checkpoints/` does the saving."""

import time
from typing import Any

from mdm_jax.checkpoints.checkpoint import Checkpoints
from mdm_jax.core import distributed
from mdm_jax.training.config import TrainConfig
from mdm_jax.training.hooks import Hook
from mdm_jax.training.state import TrainState


class Saving(Hook):
  """Saves every N updates or minutes, and raises errors of earlier saves."""

  def __init__(self, checkpoints: Checkpoints, config: TrainConfig):
    self._checkpoints, self._config = checkpoints, config
    self._saved_at = time.monotonic()

  def on_update(self, done: int, state: TrainState) -> None:
    self._checkpoints.check_save()

  def is_due(self, done: int) -> bool:
    """Returns whether to save now; all processes get the same answer."""
    config = self._config
    if done % config.checkpoint_every == 0:
      return True
    if not config.checkpoint_minutes or done % config.log_every:
      return False
    # Process 0's clock decides: saving is collective, so processes that
    # disagree would wait for each other forever.
    minutes = (time.monotonic() - self._saved_at) / 60
    return distributed.broadcast(minutes >= config.checkpoint_minutes)

  def save(self, done: int, state: TrainState, kept: dict[str, Any]) -> None:
    """Starts saving a state, with the values in `kept`."""
    self._checkpoints.save(done, state, kept)
    self._saved_at = time.monotonic()

  def wait(self) -> None:
    """Waits for the pending save; raises StorageError if it failed."""
    self._checkpoints.wait()
