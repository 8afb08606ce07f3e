"""The train state: parameters, EMA, optimizer state and update count."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

from mdm_jax.model.denoiser import Denoiser, Params
from mdm_jax.training.guard import SpikeGuard

_NO_GUARD = SpikeGuard()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that a run carries from one update to the next.

  There is no random key and no data position: both are functions of `step`.
  Fields are typed loosely because leaves may be arrays, `ShapeDtypeStruct`s or
  anything else that `jax.tree.map` returns.

  Attributes:
    step: number of updates done, applied or not; an int32 scalar.
    params: the parameters.
    ema_params: their moving average; see `ema.averaged`.
    opt_state: the optimizer's state.
    guard: gradient norms of recent updates; see `guard.SpikeGuard`.
  """

  step: Any
  params: Params
  ema_params: Params
  opt_state: optax.OptState
  guard: Any = dataclasses.field(default_factory=dict)


def init_state(
  denoiser: Denoiser,
  optimizer: optax.GradientTransformation,
  key: Key[Array, ""],
  guard: SpikeGuard = _NO_GUARD,
) -> TrainState:
  """Returns a new state with random parameters, sharded over the mesh."""
  init = jax.jit(_init, static_argnums=(0, 1, 3))
  return init(denoiser, optimizer, key, guard)


def state_from(
  params: Params,
  optimizer: optax.GradientTransformation,
  guard: SpikeGuard = _NO_GUARD,
) -> TrainState:
  """Returns a new state with the given parameters."""
  return jax.jit(_start, static_argnums=(1, 2))(params, optimizer, guard)


def abstract_state(
  denoiser: Denoiser,
  optimizer: optax.GradientTransformation,
  guard: SpikeGuard = _NO_GUARD,
) -> TrainState:
  """Returns the state's shapes, dtypes and shardings, without computing it."""
  # The key is made inside `eval_shape`: with a planned mesh there may be no
  # device to put it on.
  return jax.eval_shape(
    lambda: _init(denoiser, optimizer, jax.random.key(0), guard)
  )


def _init(denoiser, optimizer, key, guard) -> TrainState:
  return _start(denoiser.init(key), optimizer, guard)


def _start(params, optimizer, guard) -> TrainState:
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    ema_params=jax.tree.map(jnp.copy, params),
    opt_state=optimizer.init(params),
    guard=guard.init(),
  )
