"""The hook for signals, the workdir's lock, goodput and the watchdog."""

import contextlib
from collections.abc import Iterator

from mdm_jax.runtime.goodput import Cause
from mdm_jax.runtime.session import Session
from mdm_jax.training.hooks import Hook
from mdm_jax.training.state import TrainState
from mdm_jax.training.trainer import Trainer


class Supervision(Hook):
  """Reports progress to the run's session, and stops the loop on a signal."""

  def __init__(self, session: Session, trainer: Trainer):
    self._session, self._trainer = session, trainer

  @contextlib.contextmanager
  def during(self, cause: Cause, update: int) -> Iterator[None]:
    """Records the time; if an update fails, also the rows that it read."""
    attempt = self._session.attempt
    with attempt.ledger.spend(cause):
      try:
        yield
      except Exception:
        # The failing update may be the one before: a computation's error shows
        # up when its metrics are read, one update late.
        if cause in (Cause.DATA, Cause.TRAIN):
          attempt.rows = self._trainer.row_numbers(update).tolist()
        raise

  def on_update(self, done: int, state: TrainState) -> None:
    self._session.attempt.update = done

  def should_stop(self, done: int) -> str | None:
    return self._session.stop.name if self._session.poll() else None
