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
from jaxtyping import Array, Float, Int, Key

from mdm_jax.config import Config
from mdm_jax.core import rng
from mdm_jax.core.sharding import RULES, data_shards
from mdm_jax.data.batches import Batch
from mdm_jax.model.context import row_context
from mdm_jax.model.denoiser import Denoiser, Params
from mdm_jax.objectives import corruption, cross_entropy
from mdm_jax.objectives.corruption import Corrupted
from mdm_jax.objectives.noise import stage_rates
from mdm_jax.training.curriculum import StagePlan
from mdm_jax.training.gated import accumulated, choose
from mdm_jax.training.guard import make_guard
from mdm_jax.training.state import TrainState

# Equal bins of a row's mask rate, in (0, 1].
RATE_BINS = 10

Metrics = dict[str, Float[Array, "*_"]]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
# Parameters, the update's number and its rows, to numbers about it.
Diagnosis = Callable[[Params, Int[Array, ""], Batch], dict[str, Any]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Task:
  """What the denoiser is asked, for one or all microbatches."""

  x0: Int[Array, "*A B L"]
  segments: Int[Array, "*A B L"]
  corrupted: Corrupted
  rate: Float[Array, "*A B"]
  weight: Float[Array, "*A B L"]
  dropout_keys: Key[Array, "*A B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pass:
  """What an update's forward and backward pass finds.

  Attributes:
    loss: the weighted mean that is differentiated.
    grads: of the parameters, summed over microbatches.
    rate: each row's mask rate.
    real: each row's tokens without padding.
    masked: how many of them are masked.
    cross_entropy: each row's sum over masked tokens, in nats, as it is trained:
      smoothed if the objective is.
  """

  loss: Float[Array, ""]
  grads: Params
  rate: Float[Array, "A B"]
  real: Float[Array, "A B"]
  masked: Float[Array, "A B"]
  cross_entropy: Float[Array, "A B"]


# Parameters, the update's number and its rows.
_Pass = Callable[[Params, Int[Array, ""], Batch], Pass]


def make_pass(
  config: Config, stage: StagePlan, denoiser: Denoiser, mask_id: int
) -> _Pass:
  """Returns an update's forward and backward pass in one stage.

  The mean loss is over the whole update: every microbatch knows the share of
  the weight that falls to it, so 2 x 8 rows give the update of 1 x 16.
  """
  mesh = jax.sharding.get_abstract_mesh()
  rates = stage_rates(stage.config.objective, config.noise)
  capacity = corruption.max_masked(
    rates,
    config.rows_per_update,
    stage.config.length,
    shards=data_shards(mesh),
    microbatches=config.optimizer.accumulation,
  )

  def loss_fn(params: Params, task: _Task):
    context = row_context(
      task.segments, condition=task.rate, keys=task.dropout_keys
    )
    hidden = denoiser.hidden(params, task.corrupted.xt, context)
    loss, by_position = cross_entropy.masked_loss(
      denoiser.logits,
      denoiser.head(params),
      hidden,
      task.x0,
      task.corrupted.masked,
      task.weight,
      capacity,
      denoiser.vocab,
      config.objective.label_smoothing,
    )
    return loss, by_position.sum(axis=1)

  def forward_backward(
    params: Params, step: Int[Array, ""], batch: Batch
  ) -> Pass:
    tasks = _make_tasks(config, rates, mask_id, step, batch)

    def add(total, task):
      value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
      (loss, by_row), grads = value_and_grad(params, task)
      return jax.tree.map(jnp.add, total, (loss, grads)), by_row

    start = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
    (loss, grads), by_row = jax.lax.scan(add, start, tasks)
    count = lambda where: where.sum(axis=-1).astype(jnp.float32)
    real, masked = count(tasks.segments > 0), count(tasks.corrupted.masked)
    return Pass(loss, grads, tasks.rate, real, masked, by_row)

  return forward_backward


def make_train_step(
  config: Config,
  stage: StagePlan,
  denoiser: Denoiser,
  optimizer: optax.GradientTransformationExtraArgs,
  schedule: optax.Schedule,
  mask_id: int,
) -> TrainStep:
  """Returns the jitted update of one stage; it consumes the state it is given.

  An update that is not finite, or a spike, leaves every bit of the parameters,
  their average and the optimizer's state as it was; only `step` goes on.
  """
  forward_backward = make_pass(config, stage, denoiser, mask_id)
  guard = make_guard(config.train)

  @jax.jit(donate_argnums=0)
  def train_step(state: TrainState, batch: Batch):
    found = forward_backward(state.params, state.step, batch)
    norm = optax.tree.norm(found.grads)
    finite = jnp.isfinite(found.loss) & jnp.isfinite(norm)
    spike = finite & guard.is_spike(state.guard, norm)
    applied = finite & ~spike
    updates, opt_state = optimizer.update(
      *(found.grads, state.opt_state, state.params),
      step=state.step,
      applied=applied,
    )
    params = optax.apply_updates(state.params, updates)
    params = choose(applied, params, state.params)
    decay = _ema_decay(config.optimizer.ema_decay, state.step)
    average = optax.incremental_update(params, state.ema_params, 1 - decay)
    new = TrainState(
      step=state.step + 1,
      params=params,
      ema_params=choose(applied, average, state.ema_params),
      opt_state=opt_state,
      guard=guard.remember(state.guard, norm, applied),
    )
    metrics = {
      "loss": found.loss,
      "grad_norm": norm,
      "param_norm": optax.tree.norm(params),
      "update_norm": optax.tree.norm(updates),
      "learning_rate": schedule(state.step),
      "skipped": 1.0 - applied.astype(jnp.float32),
      "nonfinite": 1.0 - finite.astype(jnp.float32),
      "spike": spike.astype(jnp.float32),
      "mask_rate": found.masked.sum() / jnp.maximum(found.real.sum(), 1),
      "tokens": found.real.sum(),
      **accumulated(opt_state, applied),
    }
    return new, metrics | by_mask_rate(found)

  return train_step


def make_diagnosis(
  config: Config, stage: StagePlan, denoiser: Denoiser, mask_id: int
) -> Diagnosis:
  """Returns a jitted second look at an update, which changes nothing.

  Its numbers are whole on every device: those of `Pass` by row, those by mask
  rate, and for each parameter the gradient's norm and its count of entries that
  are not finite.
  """
  forward_backward = make_pass(config, stage, denoiser, mask_id)

  @jax.jit
  def diagnose(params: Params, step: Int[Array, ""], batch: Batch):
    found = forward_backward(params, step, batch)
    whole = lambda x: jax.reshard(x, jax.P(*[None] * x.ndim))
    by_row = lambda x: whole(x)[:, : config.data.batch_size]
    numbers = {
      "loss": found.loss,
      "mask_rate": by_row(found.rate),
      "masked": by_row(found.masked),
      "cross_entropy": by_row(found.cross_entropy),
      "grad_norm": jax.tree.map(optax.tree.norm, found.grads),
      "grad_nonfinite": count_nonfinite(found.grads),
    }
    return jax.tree.map(whole, numbers | by_mask_rate(found))

  return diagnose


def count_nonfinite(tree: Any) -> Any:
  """Returns each leaf's number of entries that are not finite."""
  return jax.tree.map(lambda x: (~jnp.isfinite(x)).sum(), tree)


def by_mask_rate(found: Pass) -> dict[str, Float[Array, "10"]]:
  """Sums cross-entropy and masked tokens over rows of about one mask rate."""
  number = jnp.ceil(found.rate * RATE_BINS).astype(jnp.int32) - 1
  number = jnp.clip(number, 0, RATE_BINS - 1)
  inside = number[None] == jnp.arange(RATE_BINS)[:, None, None]
  # Chosen, not multiplied: a row that is NaN is so in its own bin only.
  total = lambda x: jnp.where(inside, x[None], 0.0).sum(axis=(1, 2))
  return {
    "bin_loss": total(found.cross_entropy),
    "bin_count": total(found.masked),
  }


def _make_tasks(config, rates, mask_id, step, batch: Batch) -> _Task:
  """Draws rates and masks for the whole update; rows keep their own keys.

  Rows of padding, that a microbatch may end with, have nothing to mask.
  """
  grid = config.optimizer.accumulation, config.data.batch_size
  padding = ((0, 0), (0, batch.tokens.shape[1] - grid[1]))
  count = config.rows_per_update
  # Numbered behind all others, so that they take no other row's key.
  rows = jnp.pad(
    jnp.arange(count).reshape(grid), padding, constant_values=count
  )
  spread = lambda x: jax.reshard(x, RULES.spec(None, "batch"))
  keys = lambda name: spread(
    rng.per_row(rng.stream(config.seed, name, step), rows)
  )
  u = corruption.stratified_uniforms(
    rng.stream(config.seed, "rate", step), count
  )
  u = spread(jnp.pad(u.reshape(grid), padding, constant_values=1.0))
  real = batch.segments > 0
  rate = rates.rate(u)
  corrupted = corruption.corrupt(
    keys("mask"), batch.tokens, real, rate, mask_id
  )
  weight = cross_entropy.row_weights(
    config.objective, corrupted.masked, real, rates.inverse_density(u)
  )
  return _Task(
    *(batch.tokens, batch.segments, corrupted, rate),
    jnp.broadcast_to(weight[..., None], batch.tokens.shape),
    keys("dropout"),
  )


def _ema_decay(longest: float, step: Int[Array, ""]) -> Float[Array, ""]:
  """Averages over few updates at first: the start of a run is no guide."""
  step = step.astype(jnp.float32)
  return jnp.minimum(longest, (1 + step) / (10 + step))
