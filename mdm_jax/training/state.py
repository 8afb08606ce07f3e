"""The train state: everything a run carries from one update to the next."""

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
  """Parameters, their average, the optimizer's state and the update count.

  No random key and no data position: both follow from `step`. Leaves are arrays
  in a run, but also shapes or whatever else a tree map makes of them.

  Attributes:
    step: updates done, applied or not, an int32 scalar.
    guard: norms that a spike is told by; see `guard.SpikeGuard`.
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
  """Returns a fresh state, created sharded over the current mesh."""
  init = jax.jit(_init, static_argnums=(0, 1, 3))
  return init(denoiser, optimizer, key, guard)


def state_from(
  params: Params,
  optimizer: optax.GradientTransformation,
  guard: SpikeGuard = _NO_GUARD,
) -> TrainState:
  """Returns the state before the first update of given parameters."""
  return jax.jit(_start, static_argnums=(1, 2))(params, optimizer, guard)


def abstract_state(
  denoiser: Denoiser,
  optimizer: optax.GradientTransformation,
  guard: SpikeGuard = _NO_GUARD,
) -> TrainState:
  """Returns shapes, dtypes and shardings of the state, without computing it."""
  # The key is made inside: there may be no device for it.
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
