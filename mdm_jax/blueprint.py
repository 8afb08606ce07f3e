"""From the whole config to what trains: here a run is put together.

Below, every part knows its own section; here they meet.
"""

import jax

from mdm_jax.config import Config
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data.prepared import PreparedData
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.model.placement import check_vocabulary
from mdm_jax.objectives.base import Objective, Plan
from mdm_jax.objectives.config import build
from mdm_jax.training.curriculum import StagePlan, make_curriculum
from mdm_jax.training.guard import make_guard
from mdm_jax.training.learning_rate import learning_rate_schedule
from mdm_jax.training.optimizer import make_optimizer
from mdm_jax.training.step import Parts
from mdm_jax.training.trainer import Recipe, Trainer


class Blueprint(Recipe):
  """The parts of a run that need no rows and no devices.

  Attributes:
    config: of the run.
    vocab: what the ids are.
  """

  def __init__(self, config: Config, vocab: Vocabulary, rows: list[int]):
    """Puts the parts together.

    Args:
      config: of the run.
      vocab: what the ids are.
      rows: that every stage draws from.
    """
    self.config, self.vocab = config, vocab
    curriculum = make_curriculum(
      config.stages, rows, config.rows_per_update, config.train.skip_updates
    )
    schedule = learning_rate_schedule(config.optimizer, curriculum)
    parts = Parts(
      seed=config.seed,
      model=Denoiser(config.model, vocab),
      optimizer=make_optimizer(config.optimizer, schedule),
      schedule=schedule,
      guard=make_guard(config.train),
      ema_decay=config.optimizer.ema_decay,
    )
    super().__init__(
      parts,
      curriculum,
      self._objective,
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
  """Returns a run that can make updates; call it on the run's mesh.

  Args:
    config: of the run.
    data: its rows.
    mesh: the devices.

  Raises:
    UserError: the vocabulary or the stages can't be trained so.
  """
  vocab = data.tokenizer.vocab
  check_vocabulary(vocab.size, mesh)
  rows = [len(stage) for stage in data.stages]
  return Trainer(Blueprint(config, vocab, rows), data, mesh)
