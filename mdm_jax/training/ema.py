"""Exponential moving average (EMA) of the parameters.

The EMA is what evaluations and samples use. `step.py` updates it after every
update; `trained_model.py` loads it.
"""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from mdm_jax.model.denoiser import Params


def averaged(
  average: Params, params: Params, step: Int[Array, ""], decay: float
) -> Params:
  """Returns decay * average + (1 - decay) * params, with a warmed-up decay.

  Args:
    average: the EMA before this update.
    params: the parameters after this update.
    step: index of this update, from 0.
    decay: the decay after warm-up.
  """
  return optax.incremental_update(params, average, 1 - warmed_up(decay, step))


def warmed_up(decay: float, step: Int[Array, ""]) -> Float[Array, ""]:
  """Returns the decay at an update: lower at first, to forget the random init.

  min(decay, (1 + step) / (10 + step)), as TensorFlow's
  `ExponentialMovingAverage` does.
  """
  step = step.astype(jnp.float32)
  return jnp.minimum(decay, (1 + step) / (10 + step))
