"""AdamW behind a gradient clip, and the learning rate of every update."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jaxtyping import Array, Bool, Float, Int

from mdm_jax.model.denoiser import Params
from mdm_jax.training.config import OptimizerConfig
from mdm_jax.training.curriculum import Curriculum

# A warm-up longer than this share of the run is cut, and the log says so.
_MAX_WARMUP_SHARE = 0.25
_UNDECAYED = ("scale", "bias", "embedding")


def warmup_updates(config: OptimizerConfig, curriculum: Curriculum) -> int:
  """Returns the warm-up's updates, cut to a quarter of the run."""
  longest = max(1, int(curriculum.updates * _MAX_WARMUP_SHARE))
  if config.warmup_steps > longest:
    logging.warning(
      "optimizer.warmup_steps=%d is cut to %d, a quarter of the run's %d"
      " updates",
      config.warmup_steps,
      longest,
      curriculum.updates,
    )
  return min(config.warmup_steps, longest)


def learning_rate_schedule(
  config: OptimizerConfig, curriculum: Curriculum
) -> optax.Schedule:
  """Returns update -> learning rate: one warm-up, one cosine cycle a stage.

  Stage i's cycle starts at learning_rate * lr_factor_i and its last update is
  exactly at the floor, learning_rate * min_lr_ratio. The warm-up happens once;
  the cycle it falls into starts where it ends.
  """
  warmup = warmup_updates(config, curriculum)
  floor = config.learning_rate * config.min_lr_ratio
  stages = curriculum.stages
  peaks = np.array([config.learning_rate * s.config.lr_factor for s in stages])
  ends = np.array([s.end for s in stages])
  starts = np.maximum([s.start for s in stages], np.minimum(warmup, ends))
  last = np.maximum(ends - starts - 1, 1)

  def schedule(update: Int[Array, ""] | int) -> Float[Array, ""]:
    update = jnp.asarray(update, jnp.float32)
    bounds = jnp.asarray(ends[:-1], jnp.float32)
    stage = jnp.searchsorted(bounds, update, side="right")
    pick = lambda values: jnp.asarray(values, jnp.float32)[stage]
    peak = pick(peaks)
    done = (update - pick(starts)) / pick(last)
    cosine = (1 + jnp.cos(jnp.pi * jnp.clip(done, 0, 1))) / 2
    ramp = (update + 1) / max(warmup, 1)
    return jnp.where(
      update < warmup, peak * ramp, floor + (peak - floor) * cosine
    )

  return schedule


def decay_mask(params: dict) -> dict:
  """Returns True where weight decay applies: not norms, biases, embeddings."""

  def decays(path, _):
    return path[-1].key not in _UNDECAYED

  return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(
  config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformationExtraArgs:
  """Returns clip -> AdamW, for the gradient of a whole update.

  It is optax's, with two more arguments of its `update`: `step`, the update
  that the learning rate is of (default: how many were applied), and `applied`.
  Where that is False, moments and count keep every bit, whatever the gradient.
  """

  def init(params: Params) -> optax.ScaleByAdamState:
    zeros = lambda: jax.tree.map(jnp.zeros_like, params)
    return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros(), zeros())

  def update(
    grads: Params,
    state: optax.ScaleByAdamState,
    params: Params,
    *,
    step: Int[Array, ""] | None = None,
    applied: Bool[Array, ""] | bool = True,
  ) -> tuple[Params, optax.ScaleByAdamState]:
    rate = schedule(state.count if step is None else step)
    grads = _clip(grads, config.clip_norm)
    # The step is computed from what is kept: from the new moments themselves,
    # whose old ones it would outlive, it would need a copy of those.
    state = choose(applied, _next_moments(config, grads, state), state)
    direction = functools.partial(_direction, config, state.count)
    updates = jax.tree.map(
      # Adding -0.0 changes nothing, not even the sign of a zero.
      lambda *args: jnp.where(applied, -rate * direction(*args), -0.0),
      *(state.mu, state.nu, params, decay_mask(params)),
    )
    return updates, state

  return optax.GradientTransformationExtraArgs(init, update)


def choose(condition: Bool[Array, ""] | bool, new: Any, old: Any) -> Any:
  """Returns the new leaves, or the old ones bit by bit.

  Inside the loop that computes a leaf: `new` must follow element by element
  from `old`, or both are in memory at once.
  """
  return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


def _clip(grads: Params, longest: float) -> Params:
  norm = optax.tree.norm(grads)
  factor = jnp.where(norm < longest, 1.0, longest / norm)
  return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)


def _next_moments(
  config: OptimizerConfig, grads: Params, state: optax.ScaleByAdamState
) -> optax.ScaleByAdamState:
  mean = lambda m, g: config.b1 * m + (1 - config.b1) * g
  square = lambda v, g: config.b2 * v + (1 - config.b2) * jnp.square(g)
  return optax.ScaleByAdamState(
    count=state.count + 1,
    mu=jax.tree.map(mean, state.mu, grads),
    nu=jax.tree.map(square, state.nu, grads),
  )


def _direction(
  config: OptimizerConfig,
  count: Int[Array, ""],
  mu: Float[Array, "*N"],
  nu: Float[Array, "*N"],
  param: Float[Array, "*N"],
  decays: bool,
) -> Float[Array, "*N"]:
  """Returns where a parameter goes: Adam's step and decoupled weight decay."""
  count = count.astype(jnp.float32)
  mean, square = mu / (1 - config.b1**count), nu / (1 - config.b2**count)
  step = mean / (jnp.sqrt(square) + config.eps)
  return step + config.weight_decay * param if decays else step
