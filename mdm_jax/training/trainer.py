"""`Trainer`: computes a run's updates from its config, rows and devices."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from mdm_jax.core import rng
from mdm_jax.core.errors import NumericsError
from mdm_jax.core.sharding import data_shards
from mdm_jax.data import batches
from mdm_jax.data.batches import Batch
from mdm_jax.data.prepared import PreparedData
from mdm_jax.data.rows import most_asked, most_segments
from mdm_jax.data.stage_rows import stage_name
from mdm_jax.model import flops, lora
from mdm_jax.model.config import LoraConfig
from mdm_jax.model.denoiser import Denoiser, Params
from mdm_jax.objectives.base import Objective
from mdm_jax.objectives.draws import Plan
from mdm_jax.training.curriculum import Curriculum, StagePlan
from mdm_jax.training.state import TrainState, initial_state
from mdm_jax.training.step import (
  Diagnosis,
  Metrics,
  Parts,
  TrainStep,
  make_diagnosis,
  make_train_step,
)


@dataclasses.dataclass(eq=False)
class Recipe(Parts):
  """A trainer without rows and devices, e.g. to plan or compile a run.

  Attributes:
    curriculum: the stages.
    make_objective: builds a stage's objective from its plan.
    accumulation: microbatches per update.
    batch_size: rows per microbatch.
    recheck_every: compute every N-th update twice and compare (None: never).
  """

  curriculum: Curriculum
  make_objective: Callable[[StagePlan, Plan], Objective]
  accumulation: int
  batch_size: int
  recheck_every: int | None = None

  @property
  def has_base(self) -> bool:
    """Whether only LoRA's additions to given parameters are trained."""
    return self.denoiser.config.lora.rank > 0

  @property
  def plain(self) -> Denoiser:
    """The model with LoRA merged into it."""
    config = dataclasses.replace(self.denoiser.config, lora=LoraConfig())
    return dataclasses.replace(self.denoiser, config=config)

  def without_lora(self) -> "Recipe":
    """Returns the recipe that trains all parameters."""
    names = [field.name for field in dataclasses.fields(Recipe)]
    values = {name: getattr(self, name) for name in names}
    return Recipe(**values | {"denoiser": self.plain})

  def update_flops(self, stage: StagePlan) -> float:
    """Returns the FLOPs of an update, see `model/flops.py`."""
    plan, cost = self.plan(stage), self.objective(stage).cost()
    asked = cost.asked * plan.shards * plan.accumulation
    model, size = self.denoiser.config, self.denoiser.vocab.size
    return flops.update_flops(model, plan.rows, cost.reads, asked, size)

  def initial_state(self, params: Params) -> TrainState:
    """Returns the state before the first update; call it under `jax.jit`.

    With LoRA, it has only the additions of these parameters.
    """
    return initial_state(lora.split(params)[0], self.optimizer, self.guard)

  def abstract_base(self) -> Params:
    """Returns shapes of the parameters beside LoRA's; {} without LoRA."""
    whole = jax.eval_shape(lambda: self.denoiser.init(jax.random.key(0)))
    return lora.split(whole)[1]

  def abstract(self) -> TrainState:
    """Returns shapes, dtypes and shardings of the state."""
    # The key is made inside `eval_shape`: with a planned mesh there may be no
    # device to put it on.
    return jax.eval_shape(
      lambda: self.initial_state(self.denoiser.init(jax.random.key(0)))
    )

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
      start=stage.start,
      updates=stage.updates,
    )

  def objective(self, stage: StagePlan) -> Objective:
    """Returns a stage's objective, for the current mesh."""
    return self.make_objective(stage, self.plan(stage))

  def step(self, stage: StagePlan) -> TrainStep:
    """Returns a stage's jitted train step, for the current mesh."""
    return make_train_step(self, self.objective(stage), self.plan(stage))


class Trainer(Recipe):
  """A recipe with rows and devices. Call its methods under `jax.set_mesh`.

  Attributes:
    data: the prepared rows.
    mesh: the devices.
    base: the parameters beside LoRA's, set before the first update; {} without
      LoRA.
  """

  def __init__(
    self, recipe: Recipe, data: PreparedData, mesh: jax.sharding.Mesh
  ):
    names = [field.name for field in dataclasses.fields(Recipe)]
    super().__init__(*(getattr(recipe, name) for name in names))
    self.data, self.mesh = data, mesh
    stages = self.curriculum.stages
    # Jitted functions are made once: new ones would be compiled again.
    self._init = jax.jit(lambda key: self._state(self.denoiser.init(key)))
    self._state = jax.jit(self.initial_state)
    self.base: Params = {}
    self._objectives = functools.cache(
      lambda index: super(Trainer, self).objective(stages[index])
    )
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

  def objective(self, stage: StagePlan) -> Objective:
    """Returns a stage's objective, made once."""
    return self._objectives(stage.index)

  def init(self) -> TrainState:
    """Returns the initial state with random parameters.

    With LoRA these are its additions; a `base` that isn't set is random, too.
    """
    key = rng.stream(self.seed, "init")
    if self.has_base and not self.base:
      self.base = jax.jit(self.plain.init)(key)
    return self._init(key)

  def init_from(self, params: Params) -> TrainState:
    """Returns the initial state with given parameters; not for LoRA."""
    return self._state(params)

  def whole(self, params: Params) -> Params:
    """Returns the plain model's parameters, given those that are trained."""
    if not self.has_base:
      return params
    return lora.merged(self.denoiser.config.lora, self.base, params)

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
    return self._steps(stage.index)(state, batch, self.base)

  def checked_update(
    self, state: TrainState, update: int, batch: Batch
  ) -> tuple[TrainState, Metrics]:
    """Runs one update; every `recheck_every`-th one twice, to compare.

    That detects hardware that computes wrongly.

    Args:
      state: as in `update`.
      update: as in `update`.
      batch: as in `update`.

    Raises:
      NumericsError: the two results differ in any bit.
    """
    if not self.recheck_every or (update + 1) % self.recheck_every:
      return self.update(state, update, batch)
    # The copy goes first, because an update donates the state it gets.
    again = self.update(jax.tree.map(jnp.copy, state), update, batch)
    first = self.update(state, update, batch)
    if not bool(_same_bits(first, again)):
      raise NumericsError(
        f"update {update + 1}, computed twice from the same state, gave two"
        " different results: this machine computes wrongly, or is not"
        " deterministic (a GPU needs train.deterministic=true for that)"
      )
    return first

  def diagnose(self, params: Params, update: int) -> dict[str, Any]:
    """Returns `make_diagnosis`'s results for an update, on the host."""
    stage = self.curriculum.stage_at(update)
    found = self._diagnoses(stage.index)(
      *(params, self.base, jnp.asarray(update, jnp.int32)),
      self.batch(stage, update),
    )
    return jax.device_get(found)

  def batch(self, stage: StagePlan, update: int) -> Batch:
    """Returns the rows of an update, on the devices."""
    rows = self.data.stages[stage.index]
    return batches.make_batch(
      rows, self.row_numbers(update), self.accumulation, self.mesh
    )

  def row_numbers(self, update: int) -> Int[np.ndarray, "N"]:
    """Returns the indices of the stage's rows that an update reads."""
    stage = self.curriculum.stage_at(update)
    return batches.row_numbers(
      stage.rows,
      batches.stage_seed(self.seed, stage.index),
      update - stage.start,
      self.accumulation * self.batch_size,
    )

  def _make_diagnosis(self, index: int) -> Diagnosis:
    stage = self.curriculum.stages[index]
    return make_diagnosis(self, self.objective(stage), self.plan(stage))


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
