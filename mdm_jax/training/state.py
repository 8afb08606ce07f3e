"""The train state: parameters, EMA, optimizer state and update count."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mdm_jax.model.denoiser import Params
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


def initial_state(
  params: Params,
  optimizer: optax.GradientTransformation,
  guard: SpikeGuard = _NO_GUARD,
) -> TrainState:
  """Returns the state before the first update; call it under `jax.jit`.

  Args:
    params: what is trained.
    optimizer: makes its state.
    guard: likewise.
  """
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    ema_params=jax.tree.map(jnp.copy, params),
    opt_state=optimizer.init(params),
    guard=guard.init(),
  )
