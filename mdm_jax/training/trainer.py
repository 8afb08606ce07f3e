"""What a config and its data make of a run: stages, updates, batches."""

import functools

import jax
import optax

from mdm_jax.core import rng
from mdm_jax.core.config import Config
from mdm_jax.data import batches
from mdm_jax.data.batches import Batch
from mdm_jax.data.prepared import PreparedData
from mdm_jax.model.denoiser import Denoiser, Params
from mdm_jax.training.curriculum import StagePlan, make_curriculum
from mdm_jax.training.optimizer import learning_rate_schedule, make_optimizer
from mdm_jax.training.state import (
  TrainState,
  abstract_state,
  init_state,
  state_from,
)
from mdm_jax.training.step import TrainStep, make_train_step


class Trainer:
  """The pure parts of a run, put together; call it on the run's mesh.

  Attributes:
    denoiser: the model.
    curriculum: its stages in updates.
    schedule: the learning rate of each update.
    optimizer: what turns gradients into updates.
  """

  def __init__(
    self, config: Config, data: PreparedData, mesh: jax.sharding.Mesh
  ):
    vocab = data.tokenizer.vocab
    self.config, self.data, self.mesh = config, data, mesh
    self.denoiser = Denoiser(config.model, vocab.size, vocab.num_real)
    self.curriculum = make_curriculum(config, [len(r) for r in data.stages])
    self.schedule = learning_rate_schedule(config.optimizer, self.curriculum)
    self.optimizer: optax.GradientTransformation = make_optimizer(
      config.optimizer, self.schedule
    )
    self._steps = functools.cache(self._make_step)

  def init(self) -> TrainState:
    """Returns the state before the first update, of new parameters."""
    key = rng.stream(self.config.seed, "init")
    return init_state(self.denoiser, self.optimizer, key)

  def init_from(self, params: Params) -> TrainState:
    """Returns the state before the first update, of given parameters."""
    return state_from(params, self.optimizer)

  def abstract(self) -> TrainState:
    """Returns shapes, dtypes and shardings of the state."""
    return abstract_state(self.denoiser, self.optimizer)

  def update(self, state: TrainState, update: int):
    """Does one update, consuming the state; returns the next and metrics."""
    stage = self.curriculum.stage_at(update)
    return self._steps(stage.index)(state, self.batch(stage, update))

  def batch(self, stage: StagePlan, update: int) -> Batch:
    """Returns the rows of an update."""
    numbers = batches.row_numbers(
      stage.rows,
      batches.stage_seed(self.config.seed, stage.index),
      update - stage.start,
      self.config.rows_per_update,
    )
    rows = self.data.stages[stage.index]
    return batches.make_batch(
      rows, numbers, self.config.optimizer.accumulation, self.mesh
    )

  def _make_step(self, index: int) -> TrainStep:
    return make_train_step(
      self.config,
      self.curriculum.stages[index],
      self.denoiser,
      self.optimizer,
      self.schedule,
      self.data.tokenizer.vocab.mask,
    )
