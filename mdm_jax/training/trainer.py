"""`Trainer`: computes a run's updates from its config, rows and devices."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Int

from mdm_jax.core import rng
from mdm_jax.core.errors import NumericsError
from mdm_jax.core.sharding import data_shards
from mdm_jax.data import batches
from mdm_jax.data.batches import Batch
from mdm_jax.data.prepared import PreparedData
from mdm_jax.data.rows import most_asked, most_segments
from mdm_jax.data.stage_rows import stage_name
from mdm_jax.model.denoiser import Denoiser, Params
from mdm_jax.objectives.base import Objective, Plan
from mdm_jax.training.curriculum import Curriculum, StagePlan
from mdm_jax.training.state import (
  TrainState,
  abstract_state,
  init_state,
  state_from,
)
from mdm_jax.training.step import (
  Diagnosis,
  Metrics,
  Parts,
  TrainStep,
  make_diagnosis,
  make_train_step,
)


class Recipe:
  """A trainer without rows and devices, e.g. to plan or compile a run.

  Attributes:
    parts: what all updates share.
    curriculum: the stages.
    make_objective: builds a stage's objective from its plan.
    accumulation: microbatches per update.
    batch_size: rows per microbatch.
    recheck_every: compute every N-th update twice and compare (None: never).
  """

  def __init__(
    self,
    parts: Parts,
    curriculum: Curriculum,
    make_objective: Callable[[StagePlan, Plan], Objective],
    accumulation: int,
    batch_size: int,
    recheck_every: int | None = None,
  ):
    self.parts, self.curriculum = parts, curriculum
    self.make_objective = make_objective
    self.accumulation, self.batch_size = accumulation, batch_size
    self.recheck_every = recheck_every

  @property
  def denoiser(self) -> Denoiser:
    """The model."""
    return self.parts.model

  @property
  def optimizer(self) -> optax.GradientTransformationExtraArgs:
    """The optimizer."""
    return self.parts.optimizer

  @property
  def schedule(self) -> optax.Schedule:
    """The learning rate of each update."""
    return self.parts.schedule

  def abstract(self) -> TrainState:
    """Returns shapes, dtypes and shardings of the state."""
    parts = self.parts
    return abstract_state(parts.model, parts.optimizer, parts.guard)

  def plan(self, stage: StagePlan) -> Plan:
    """Returns the sizes of a stage, for the current mesh."""
    # Without rows, assume the maximum: every token predicted, in its own text.
    length = stage.config.length
    return Plan(
      accumulation=self.accumulation,
      batch=self.batch_size,
      length=length,
      shards=data_shards(jax.sharding.get_abstract_mesh()),
      most_asked=length,
      most_segments=length,
    )

  def objective(self, stage: StagePlan) -> Objective:
    """Returns a stage's objective, for the current mesh."""
    return self.make_objective(stage, self.plan(stage))

  def step(self, stage: StagePlan) -> TrainStep:
    """Returns a stage's jitted train step, for the current mesh."""
    return make_train_step(self.parts, self.objective(stage), self.plan(stage))


class Trainer(Recipe):
  """A recipe with rows and devices. Call its methods under `jax.set_mesh`.

  Attributes:
    data: the prepared rows.
    mesh: the devices.
  """

  def __init__(
    self, recipe: Recipe, data: PreparedData, mesh: jax.sharding.Mesh
  ):
    super().__init__(
      recipe.parts,
      recipe.curriculum,
      recipe.make_objective,
      recipe.accumulation,
      recipe.batch_size,
      recipe.recheck_every,
    )
    self.data, self.mesh = data, mesh
    stages = self.curriculum.stages
    # One jitted function per stage: a new one would be compiled again.
    self._steps = functools.cache(lambda index: self.step(stages[index]))
    self._diagnoses = functools.cache(self._make_diagnosis)

  def plan(self, stage: StagePlan) -> Plan:
    """Returns the sizes of a stage, using the maxima over its prepared rows."""
    name, length = stage_name(stage.index), stage.config.length
    counts = self.data.manifest.get("rows", {}).get(name, {})
    return dataclasses.replace(
      super().plan(stage),
      most_asked=most_asked(counts, length),
      most_segments=most_segments(counts, length),
    )

  def init(self) -> TrainState:
    """Returns the initial state with random parameters."""
    key = rng.stream(self.parts.seed, "init")
    return init_state(
      self.parts.model, self.parts.optimizer, key, self.parts.guard
    )

  def init_from(self, params: Params) -> TrainState:
    """Returns the initial state with the given parameters."""
    return state_from(params, self.parts.optimizer, self.parts.guard)

  def update(
    self, state: TrainState, update: int, batch: Batch | None = None
  ) -> tuple[TrainState, Metrics]:
    """Runs one update; donates the state.

    Args:
      state: the state before the update.
      update: index of the update.
      batch: the update's rows, if already on the devices.

    Returns:
      The next state, and metrics.
    """
    stage = self.curriculum.stage_at(update)
    if batch is None:
      batch = self.batch(stage, update)
    return self._steps(stage.index)(state, batch)

  def update_twice(
    self, state: TrainState, update: int, batch: Batch
  ) -> tuple[TrainState, Metrics]:
    """Runs one update twice, to detect hardware that computes wrongly.

    Args:
      state: as in `update`.
      update: as in `update`.
      batch: as in `update`.

    Raises:
      NumericsError: the results differ in any bit.
    """
    # The copy goes first, because an update donates the state it gets.
    again = self.update(jax.tree.map(jnp.copy, state), update, batch)
    first = self.update(state, update, batch)
    if not bool(_same_bits(first, again)):
      raise NumericsError(
        f"update {update + 1}, made twice from one state, gave two results:"
        " this machine computes wrongly, or is not deterministic (a GPU is"
        " only, if at all, with train.deterministic=true)"
      )
    return first

  def checked_update(
    self, state: TrainState, update: int, batch: Batch
  ) -> tuple[TrainState, Metrics]:
    """Runs one update; every `recheck_every`-th one twice."""
    every = self.recheck_every
    twice = every and (update + 1) % every == 0
    make = self.update_twice if twice else self.update
    return make(state, update, batch)

  def passes_over(self, update: int) -> bool:
    """Returns whether the config skips an update."""
    return self.curriculum.passes_over(update)

  def pass_over(self, state: TrainState) -> TrainState:
    """Returns the state with one more update counted, its rows skipped."""
    return dataclasses.replace(state, step=state.step + 1)

  def diagnose(self, params: Params, update: int) -> dict[str, Any]:
    """Returns `make_diagnosis`'s results for an update, on the host."""
    stage = self.curriculum.stage_at(update)
    found = self._diagnoses(stage.index)(
      params, jnp.asarray(update, jnp.int32), self.batch(stage, update)
    )
    return jax.device_get(found)

  def batch(self, stage: StagePlan, update: int) -> Batch:
    """Returns the rows of an update, on the devices."""
    numbers = self._row_numbers(stage, update)
    rows = self.data.stages[stage.index]
    return batches.make_batch(rows, numbers, self.accumulation, self.mesh)

  def row_numbers(self, update: int) -> Int[np.ndarray, "N"]:
    """Returns the indices of the stage's rows that an update reads."""
    return self._row_numbers(self.curriculum.stage_at(update), update)

  def _row_numbers(self, stage: StagePlan, update: int):
    return batches.row_numbers(
      stage.rows,
      batches.stage_seed(self.parts.seed, stage.index),
      update - stage.start,
      self.accumulation * self.batch_size,
    )

  def _make_diagnosis(self, index: int) -> Diagnosis:
    stage = self.curriculum.stages[index]
    return make_diagnosis(self.parts, self.objective(stage), self.plan(stage))


@jax.jit
def _same_bits(a: Any, b: Any) -> Bool[Array, ""]:
  """Returns whether two trees are equal to the bit.

  Bits, not values: NaN is not equal to itself, and -0.0 is equal to 0.0.
  """
  # Compared on the devices, so that only one bool is fetched.
  same = jax.tree.map(lambda x, y: (_bits(x) == _bits(y)).all(), a, b)
  return jnp.stack(jax.tree.leaves(same)).all()


def _bits(x: Array) -> Array:
  size = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}
  return jax.lax.bitcast_convert_type(x, size[x.dtype.itemsize])
