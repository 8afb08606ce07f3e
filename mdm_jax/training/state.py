"""The train state: everything a run carries from one update to the next."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

from mdm_jax.model.denoiser import Denoiser, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Parameters, their average, the optimizer's state and the update count.

  No random key and no data position: both follow from `step`. Leaves are arrays
  in a run, but also shapes or whatever else a tree map makes of them.

  Attributes:
    step: optimizer updates done, an int32 scalar.
  """

  step: Any
  params: Params
  ema_params: Params
  opt_state: optax.OptState


def init_state(
  denoiser: Denoiser,
  optimizer: optax.GradientTransformation,
  key: Key[Array, ""],
) -> TrainState:
  """Returns a fresh state, created sharded over the current mesh."""
  return jax.jit(_init, static_argnums=(0, 1))(denoiser, optimizer, key)


def state_from(
  params: Params, optimizer: optax.GradientTransformation
) -> TrainState:
  """Returns the state before the first update of given parameters."""
  return jax.jit(_start, static_argnums=1)(params, optimizer)


def abstract_state(
  denoiser: Denoiser, optimizer: optax.GradientTransformation
) -> TrainState:
  """Returns shapes, dtypes and shardings of the state, without computing it."""
  init = lambda key: _init(denoiser, optimizer, key)
  return jax.eval_shape(init, jax.random.key(0))


def _init(denoiser, optimizer, key) -> TrainState:
  return _start(denoiser.init(key), optimizer)


def _start(params, optimizer) -> TrainState:
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    ema_params=jax.tree.map(jnp.copy, params),
    opt_state=optimizer.init(params),
  )
