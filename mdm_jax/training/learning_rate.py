"""Learning-rate schedule: linear warm-up, then one cosine cycle per stage."""

import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jaxtyping import Array, Float, Int

from mdm_jax.training.config import OptimizerConfig
from mdm_jax.training.curriculum import Curriculum

# A warm-up longer than this share of the run is cut, and the log says so.
_MAX_WARMUP_SHARE = 0.25


def warmup_updates(config: OptimizerConfig, curriculum: Curriculum) -> int:
  """Returns the length of the warm-up, at most a quarter of the run."""
  longest = max(1, int(curriculum.updates * _MAX_WARMUP_SHARE))
  if config.warmup_steps > longest:
    logging.warning(
      "optimizer.warmup_steps=%d is reduced to %d, a quarter of the run's %d"
      " updates",
      config.warmup_steps,
      longest,
      curriculum.updates,
    )
  return min(config.warmup_steps, longest)


def learning_rate_schedule(
  config: OptimizerConfig, curriculum: Curriculum
) -> optax.Schedule:
  """Returns the schedule, a function from update to learning rate.

  Stage i's cycle starts at the peak learning_rate * lr_factor_i; its last
  update has exactly the floor, learning_rate * min_lr_ratio. There is one
  warm-up, at the start of the run; the cycle of its stage begins at its end.
  """
  warmup = warmup_updates(config, curriculum)
  floor = config.learning_rate * config.min_lr_ratio
  stages = curriculum.stages
  peaks = np.array([config.learning_rate * s.config.lr_factor for s in stages])
  ends = np.array([s.end for s in stages])
  starts = np.maximum([s.start for s in stages], np.minimum(warmup, ends))
  # Minus 1: the last update of a cycle is at the floor, not the one after it.
  last = np.maximum(ends - starts - 1, 1)

  def schedule(update: Int[Array, ""] | int) -> Float[Array, ""]:
    update = jnp.asarray(update, jnp.float32)
    bounds = jnp.asarray(ends[:-1], jnp.float32)
    stage = jnp.searchsorted(bounds, update, side="right")
    pick = lambda values: jnp.asarray(values, jnp.float32)[stage]
    peak = pick(peaks)
    done = (update - pick(starts)) / pick(last)
    cosine = (1 + jnp.cos(jnp.pi * jnp.clip(done, 0, 1))) / 2
    # Plus 1: a learning rate of 0 would waste the first update.
    ramp = (update + 1) / max(warmup, 1)
    return jnp.where(
      update < warmup, peak * ramp, floor + (peak - floor) * cosine
    )

  return schedule
