"""Evaluates the state during the training, as a hook of the loop."""

from collections.abc import Callable

from mdm_jax.checkpoints.checkpoint import Checkpoints
from mdm_jax.core.progress import duration
from mdm_jax.evaluate import Measures
from mdm_jax.evaluation import tables
from mdm_jax.model.denoiser import Params
from mdm_jax.objectives.measured import evaluation
from mdm_jax.training.hooks import Hook
from mdm_jax.training.run_log import RunLog
from mdm_jax.training.state import TrainState

WRITTEN = "validation/", "samples/"  # prefixes of what it logs


def is_evaluated_at(done: int, updates: int, every: int) -> bool:
  """Returns whether the state after `done` updates is evaluated.

  Args:
    done: updates made.
    updates: updates of the whole run; the last state is always evaluated.
    every: updates between evaluations (0: the last state only).
  """
  return done == updates or bool(every and done and done % every == 0)


class Validation(Hook):
  """Evaluates the averaged parameters on validation rows.

  The result is logged, and recorded with the checkpoint: it decides which
  checkpoint is the best.
  """

  def __init__(
    self,
    measures: Measures,
    whole: Callable[[Params], Params],
    checkpoints: Checkpoints,
    log: RunLog,
    updates: int,
    every: int,
  ):
    self._measures, self._checkpoints, self._log = measures, checkpoints, log
    self._whole = whole
    self._updates, self._every = updates, every

  def wants_state(self, done: int) -> bool:
    return is_evaluated_at(done, self._updates, self._every)

  def on_evaluate(self, done: int, state: TrainState) -> None:
    params = self._whole(state.ema_params)
    measured, sizes = self._measures.validation(params)
    samples = self._measures.texts.sample(params)
    found = measured.scalars() | sizes
    scalars = {f"validation/{name}": x for name, x in found.items()}
    texts = {f"samples/{i}": text for i, text in enumerate(samples.texts)}
    log = self._log
    log.writers.write_scalars(done, scalars)
    log.writers.write_texts(done, texts)
    log.writers.flush()
    # After the log: a resume repeats an evaluation that was not recorded, and
    # replaces its log lines.
    self._checkpoints.record(done, evaluation(measured) | sizes)
    log.line.say(
      f"update {done}: validation {tables.in_a_line(measured)}"
      f" ({duration(log.seconds)})"
    )
