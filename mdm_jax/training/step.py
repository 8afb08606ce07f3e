"""One optimizer update, jitted once a stage.

corrupt all rows -> for each microbatch: denoiser, objective, gradient
-> optimizer with the sum of the gradients -> average the parameters
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from mdm_jax.core import rng
from mdm_jax.core.config import Config
from mdm_jax.core.sharding import RULES, data_shards
from mdm_jax.data.batches import Batch
from mdm_jax.diffusion import corruption, objective
from mdm_jax.diffusion.corruption import Corrupted
from mdm_jax.diffusion.noise import stage_rates
from mdm_jax.model.denoiser import Denoiser, Params
from mdm_jax.training.curriculum import StagePlan
from mdm_jax.training.state import TrainState

Metrics = dict[str, Float[Array, ""]]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Task:
  """What the denoiser is asked, for one or all microbatches."""

  x0: Int[Array, "*A B L"]
  segments: Int[Array, "*A B L"]
  corrupted: Corrupted
  rate: Float[Array, "*A B"]
  weight: Float[Array, "*A B"]
  dropout_keys: Key[Array, "*A B"]


def make_train_step(
  config: Config,
  stage: StagePlan,
  denoiser: Denoiser,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
  mask_id: int,
) -> TrainStep:
  """Returns the jitted update of one stage; it consumes the state it is given.

  The mean loss is over the whole update: every microbatch knows the share of
  the weight that falls to it, so 2 x 8 rows give the update of 1 x 16.
  """
  mesh = jax.sharding.get_abstract_mesh()
  rates = stage_rates(stage.config, config.noise)
  capacity = corruption.max_masked(
    rates,
    config.rows_per_update,
    stage.config.length,
    groups=config.optimizer.accumulation * data_shards(mesh),
  )

  def loss_fn(params: Params, task: _Task):
    hidden = denoiser.hidden(
      params, task.corrupted.xt, task.segments, task.rate, task.dropout_keys
    )
    return objective.masked_loss(
      denoiser.logits,
      denoiser.head(params),
      hidden,
      task.x0,
      task.corrupted.masked,
      task.weight,
      capacity,
      denoiser.num_real,
      config.objective.label_smoothing,
    )

  @jax.jit(donate_argnums=0)
  def train_step(state: TrainState, batch: Batch):
    tasks = _make_tasks(config, rates, mask_id, state.step, batch)
    loss, grads = _sum_over_microbatches(
      lambda task: jax.value_and_grad(loss_fn)(state.params, task),
      tasks,
      like=(jnp.zeros(()), state.params),
    )
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    updates, opt_state = optimizer.update(
      _zero_unless(finite, grads), state.opt_state, state.params
    )
    updates = _zero_unless(finite, updates)
    params = optax.apply_updates(state.params, updates)
    decay = _ema_decay(config.optimizer.ema_decay, state.step)
    share = jnp.where(finite, 1 - decay, 0.0)
    new = TrainState(
      step=state.step + 1,
      params=params,
      ema_params=optax.incremental_update(params, state.ema_params, share),
      opt_state=opt_state,
    )
    metrics = {
      "loss": loss,
      "grad_norm": grad_norm,
      "param_norm": optax.tree.norm(params),
      "update_norm": optax.tree.norm(updates),
      "learning_rate": schedule(state.step),
      "skipped": 1.0 - finite.astype(jnp.float32),
    }
    return new, metrics | _token_counts(tasks)

  return train_step


def _sum_over_microbatches(function: Callable, tasks: _Task, like: Any) -> Any:
  """Adds up what a function returns for every microbatch, one at a time."""

  def add(total, task):
    return jax.tree.map(jnp.add, total, function(task)), None

  start = jax.tree.map(jnp.zeros_like, like)
  return jax.lax.scan(add, start, tasks)[0]


def _make_tasks(config, rates, mask_id, step, batch: Batch) -> _Task:
  """Draws rates and masks for the whole update; rows keep their own keys."""
  shape = batch.tokens.shape[:2]
  spread = lambda x: jax.reshard(x.reshape(shape), RULES.spec(None, "batch"))
  rows = jnp.arange(config.rows_per_update)
  keys = lambda name: spread(
    rng.per_row(rng.stream(config.seed, name, step), rows)
  )
  u = spread(
    corruption.stratified_uniforms(
      rng.stream(config.seed, "rate", step), config.rows_per_update
    )
  )
  real = batch.segments > 0
  rate = rates.rate(u)
  corrupted = corruption.corrupt(
    keys("mask"), batch.tokens, real, rate, mask_id
  )
  weight = objective.row_weights(
    config.objective, corrupted.masked, real, rates.inverse_density(u)
  )
  return _Task(
    batch.tokens, batch.segments, corrupted, rate, weight, keys("dropout")
  )


def _ema_decay(longest: float, step: Int[Array, ""]) -> Float[Array, ""]:
  """Averages over few updates at first: the start of a run is no guide."""
  step = step.astype(jnp.float32)
  return jnp.minimum(longest, (1 + step) / (10 + step))


def _zero_unless(finite: Bool[Array, ""], tree: Params) -> Params:
  """Keeps a tree, or puts zeros in its place.

  Around the optimizer, an update that is not finite moves no parameter, and is
  to Adam's moments one whose gradient was zero. Choosing between the old and
  the new state instead would need both in memory, and time to copy one.
  """
  return jax.tree.map(lambda x: jnp.where(finite, x, jnp.zeros_like(x)), tree)


def _token_counts(tasks: _Task) -> Metrics:
  real = (tasks.segments > 0).sum()
  masked = tasks.corrupted.masked.sum()
  return {
    "mask_rate": masked / jnp.maximum(real, 1),
    "tokens": real.astype(jnp.float32),
  }
