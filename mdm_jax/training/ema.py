"""The moving average of the parameters (EMA), which is evaluated and sampled.

`step.py` applies it after every update; `trained_model.py` reads it back.
"""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from mdm_jax.model.denoiser import Params


def averaged(
  average: Params, params: Params, step: Int[Array, ""], decay: float
) -> Params:
  """Returns the average with one more update in it.

  Args:
    average: of the parameters after each update before.
    params: after this one.
    step: the number of this update, from 0.
    decay: share of the old average that is kept, once there are many updates.
  """
  return optax.incremental_update(params, average, 1 - warmed_up(decay, step))


def warmed_up(decay: float, step: Int[Array, ""]) -> Float[Array, ""]:
  """Averages over few updates at first: the start of a run is no guide."""
  step = step.astype(jnp.float32)
  return jnp.minimum(decay, (1 + step) / (10 + step))
