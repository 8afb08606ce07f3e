"""The joint objective: masked diffusion and autoregression on the same weights.

  loss = alpha * autoregressive loss + (1 - alpha) * masked loss

Each loss comes from its own objective and its own call of the model, with
bidirectional attention for one and causal attention for the other. So one set
of parameters can be sampled in any order or from left to right. With alpha = 0
the updates are those of the masked objective: it draws the same masks.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data.batches import Batch
from mdm_jax.data.held_out import HeldOut
from mdm_jax.model.denoiser import Denoiser, Params
from mdm_jax.objectives import autoregressive, masked
from mdm_jax.objectives.autoregressive import Autoregressive
from mdm_jax.objectives.base import Cost, Decoding, Examples, Objective, Ratio
from mdm_jax.objectives.config import (
  AutoregressiveStage,
  JointConfig,
  JointStage,
  NoiseConfig,
)
from mdm_jax.objectives.draws import Draws, Plan
from mdm_jax.objectives.masked import Masked
from mdm_jax.objectives.measured import Jobs, Measured, Nats, Part


@dataclasses.dataclass(frozen=True, kw_only=True)
class Joint(Objective):
  """A weighted sum of the masked and the autoregressive loss; see `build`.

  Held-out rows are measured by both; `primary` is the one that selects the best
  checkpoint and draws samples.

  Attributes:
    alpha: weight of the autoregressive loss; the masked one has 1 - alpha.
    masked: the masked objective.
    autoregressive: the autoregressive objective.
    primary: name of one of the two.
  """

  alpha: float
  masked: Masked
  autoregressive: Autoregressive
  primary: str

  tags = Masked.tags

  @property
  def headline(self) -> str:
    """The headline of the primary objective."""
    return self._first.headline

  @property
  def _first(self) -> Objective:
    return self._both[self.primary]

  @property
  def _both(self) -> dict[str, Objective]:
    return {"masked": self.masked, "autoregressive": self.autoregressive}

  # MARK: training

  def examples(self, batch: Batch, draws: Draws) -> dict[str, Examples]:
    """Builds the examples of both objectives, by name."""
    # Only one of them has a scope: the other draws as it would by itself.
    own = {"masked": draws, "autoregressive": draws.scope("autoregressive")}
    return {n: o.examples(batch, own[n]) for n, o in self._both.items()}

  def loss(
    self, model: Denoiser, params: Params, part: Mapping[str, Examples]
  ) -> tuple[Float[Array, ""], Any]:
    """Returns the weighted sum of both losses, each from a call of its own."""
    found = {
      name: objective.loss(model, params, part[name])
      for name, objective in self._both.items()
    }
    losses = {name: loss for name, (loss, _) in found.items()}
    total = (
      self.alpha * losses["autoregressive"]
      + (1 - self.alpha) * losses["masked"]
    )
    return total, (losses, {name: aux for name, (_, aux) in found.items()})

  def summaries(
    self, examples: Mapping[str, Examples], aux: Any
  ) -> dict[str, Ratio]:
    """Returns both losses, and what each objective logs."""
    losses, own = aux
    update = jnp.ones(())
    found = {f"{n}_loss": Ratio(x.sum(), update) for n, x in losses.items()}
    for name, objective in self._both.items():
      found |= objective.summaries(examples[name], own[name])
    return found

  def by_row(
    self, examples: Mapping[str, Examples], aux: Any
  ) -> dict[str, Array]:
    """Returns what both objectives report by row, as OBJECTIVE_NAME."""
    _, own = aux
    return {
      f"{name}_{column}": values
      for name, objective in self._both.items()
      for column, values in objective.by_row(examples[name], own[name]).items()
    }

  def cost(self) -> Cost:
    """Returns the calls and the predictions of both."""
    costs = [objective.cost() for objective in self._both.values()]
    reads = tuple(read for cost in costs for read in cost.reads)
    asked = sum(cost.asked for cost in costs)
    return Cost(reads, asked, self.masked.cost().visibility)

  def decoding(self) -> Decoding:
    """Returns how to sample from the primary objective's models."""
    return self._first.decoding()

  # MARK: evaluation

  def also_measured(self) -> Mapping[str, Objective]:
    """Returns the objective that is not the primary one."""
    return {n: o for n, o in self._both.items() if n != self.primary}

  def jobs(self, held: HeldOut, part: Part, draws: int) -> Jobs | None:
    """Returns the primary objective's jobs."""
    return self._first.jobs(held, part, draws)

  def pose(
    self,
    batch: Batch,
    keys: Key[Array, "B"],
    given: Mapping[str, Array],
    capacity: int,
  ) -> Any:
    """Poses the primary objective's questions."""
    return self._first.pose(batch, keys, given, capacity)

  def nats(
    self, model: Denoiser, params: Params, part: Any
  ) -> Float[Array, "B L"]:
    """Returns what the primary objective's questions cost."""
    return self._first.nats(model, params, part)

  def values(
    self, part: Part, jobs: Jobs, nats: Nats, held: HeldOut
  ) -> Measured:
    """Returns the primary objective's metrics."""
    return self._first.values(part, jobs, nats, held)


def build(
  config: JointConfig,
  stage: JointStage,
  noise: NoiseConfig,
  vocabulary: Vocabulary,
  plan: Plan,
) -> Joint:
  """Returns the joint objective of a stage.

  Args:
    config: the weight of either loss, and the fields of both objectives.
    stage: the masked objective's fields.
    noise: the noise schedule of the masked objective.
    vocabulary: gives the mask id, and the begin id.
    plan: sizes of the stage.

  Raises:
    UserError: the vocabulary lacks an id that one of the two needs.
  """
  next_token = AutoregressiveStage()
  return Joint(
    alpha=config.alpha,
    primary=config.primary,
    masked=masked.build(config, stage, noise, vocabulary, plan),
    autoregressive=autoregressive.build(
      config, next_token, noise, vocabulary, plan
    ),
  )
