"""Builds a trainer from the whole config.

Every package below reads only its own section of the config; this is the one
place where the sections are combined into a run.
"""

import jax

from mdm_jax.config import Config
from mdm_jax.core.sharding import data_shards
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data.prepared import PreparedData
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.model.placement import check_vocabulary
from mdm_jax.objectives.base import Objective
from mdm_jax.objectives.config import build
from mdm_jax.objectives.draws import Plan
from mdm_jax.training.curriculum import StagePlan, make_curriculum
from mdm_jax.training.guard import SpikeGuard
from mdm_jax.training.learning_rate import learning_rate_schedule
from mdm_jax.training.optimizer import make_optimizer
from mdm_jax.training.trainer import Recipe, Trainer


class Blueprint(Recipe):
  """The parts of a run that need neither rows nor devices.

  A plan for a mesh that isn't there (`fit.py`) needs no more than these.

  Attributes:
    config: the run's config.
    vocab: which ids are text, and which are special.
  """

  def __init__(self, config: Config, vocab: Vocabulary, rows: list[int]):
    """Builds the model, the optimizer and the curriculum.

    Args:
      config: the run's config.
      vocab: which ids are text, and which are special.
      rows: the number of rows of each stage.
    """
    self.config, self.vocab = config, vocab
    # In this order: the rows turn epochs into updates, and the learning-rate
    # schedule has one cycle per stage.
    curriculum = make_curriculum(
      config.stages, rows, config.rows_per_update, config.train.skip_updates
    )
    schedule = learning_rate_schedule(config.optimizer, curriculum)
    super().__init__(
      seed=config.seed,
      denoiser=Denoiser(config.model, vocab),
      optimizer=make_optimizer(config.optimizer, schedule),
      schedule=schedule,
      guard=SpikeGuard(config.train.spike_sigmas, config.train.spike_window),
      ema_decay=config.optimizer.ema_decay,
      curriculum=curriculum,
      make_objective=self._objective,
      accumulation=config.optimizer.accumulation,
      batch_size=config.data.batch_size,
      recheck_every=config.train.recheck_every,
    )

  def _objective(self, stage: StagePlan, plan: Plan) -> Objective:
    config = self.config
    return build(
      *(config.objective, stage.config.objective, config.noise),
      *(self.vocab, plan),
    )


def make_trainer(
  config: Config, data: PreparedData, mesh: jax.sharding.Mesh
) -> Trainer:
  """Returns a run's trainer; use it under `jax.set_mesh(mesh)`.

  Args:
    config: the run's config.
    data: the run's rows and tokenizer.
    mesh: the devices to train on.

  Raises:
    UserError: the vocabulary does not split over the mesh, or the stages can't
      be trained on these rows.
  """
  vocab = data.tokenizer.vocab
  check_vocabulary(vocab.size, mesh)
  rows = [len(stage) for stage in data.stages]
  return Trainer(Blueprint(config, vocab, rows), data, mesh)


def held_out_objective(
  config: Config, vocab: Vocabulary, mesh: jax.sharding.Mesh
) -> Objective:
  """Returns the last stage's objective: every evaluation uses it."""
  stage = config.stages[-1]
  plan = Plan(
    accumulation=config.optimizer.accumulation,
    batch=config.data.batch_size,
    length=stage.length,
    shards=data_shards(mesh),
    # Upper bounds, valid for any held-out row.
    most_asked=stage.length,
    most_segments=stage.length,
  )
  return build(
    *(config.objective, stage.objective, config.noise), *(vocab, plan)
  )
