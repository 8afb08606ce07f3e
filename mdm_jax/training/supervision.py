"""The session's part in the loop: signals, lock, ledger, watchdog."""

import contextlib
from collections.abc import Iterator

from mdm_jax.runtime.goodput import Cause
from mdm_jax.runtime.session import Session
from mdm_jax.training.hooks import Hook
from mdm_jax.training.state import TrainState
from mdm_jax.training.trainer import Trainer


class Supervision(Hook):
  """Tells the session of a run how far it is, and stops when a signal came."""

  def __init__(self, session: Session, trainer: Trainer):
    self._session, self._trainer = session, trainer

  @contextlib.contextmanager
  def during(self, cause: Cause, update: int) -> Iterator[None]:
    """Counts the time; of an update that fails, keeps which rows it read."""
    attempt = self._session.attempt
    with attempt.ledger.spend(cause):
      try:
        yield
      except Exception:
        # Of this update or, being read late, of the one before.
        if cause in (Cause.DATA, Cause.TRAIN):
          attempt.rows = self._trainer.row_numbers(update).tolist()
        raise

  def on_update(self, done: int, state: TrainState) -> None:
    self._session.attempt.update = done

  def should_stop(self, done: int) -> str | None:
    return self._session.stop.name if self._session.poll() else None
