"""Optimizers by name: optax chains that can be read, changed and replaced.

A builder gets the config and the learning-rate schedule, and returns an optax
transformation; `OPTIMIZERS.register` gives it a name for `optimizer.name`.
Whatever it returns, an update that is not applied keeps every bit of its state
(`gated.py`).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import logging
from jaxtyping import Array, Bool, Int
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from mdm_jax.core.registry import Registry
from mdm_jax.model.denoiser import Params
from mdm_jax.training.config import OptimizerConfig
from mdm_jax.training.gated import Gated, accumulate, chain, choose, gate

Builder = Callable[
  [OptimizerConfig, optax.Schedule], optax.GradientTransformation
]
OPTIMIZERS: Registry[Builder] = Registry("optimizer", "optimizer.name")

_UNDECAYED = ("scale", "bias", "embedding")
# Fields that only some optimizers use.
_SPECIAL = "clip_norm", "weight_decay", "b1", "b2", "eps", "momentum"
# Muon's matrices by the name of their leaf: which axes are summed over and
# which come out. Axis 0 is the layer.
_MATRICES = {
  "query": MuonDimensionNumbers((1,), (2, 3, 4)),
  "key": MuonDimensionNumbers((1,), (2, 3)),
  "value": MuonDimensionNumbers((1,), (2, 3)),
  "out": MuonDimensionNumbers((1, 2, 3), (4,)),
  "gate": MuonDimensionNumbers((1,), (2,)),
  "up": MuonDimensionNumbers((1,), (2,)),
  "down": MuonDimensionNumbers((1,), (2,)),
}
# Makes an orthogonal update as large as AdamW's are (arXiv 2502.16982), so that
# the same learning rate and weight decay suit both.
_ADAM_RMS = 0.2


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule) -> Gated:
  """Returns the optimizer that the config names.

  Args:
    config: of the optimizer; a field that was set but is not used is logged.
    schedule: update -> learning rate.

  Returns:
    A transformation whose `update` takes two more arguments. `step`: the number
    of the update, which the learning rate is of. `applied` (default True):
    where it is False the state keeps every bit and the update is -0.0.

  Raises:
    UserError: no optimizer has that name.
  """
  build = OPTIMIZERS[config.name]
  watched = _Watched(**vars(config))
  optimizer = build(watched, schedule)
  _log_unused(config, watched)
  if config.every > 1:
    optimizer = accumulate(optimizer, config.every)
  inner = gate(optimizer)

  def update(
    grads: Params,
    state: optax.OptState,
    params: Params,
    *,
    step: Int[Array, ""] | int,
    applied: Bool[Array, ""] | bool = True,
  ) -> tuple[Params, optax.OptState]:
    updates, state = inner.update(
      grads, state, params, step=step, applied=applied
    )
    # Adding -0.0 changes nothing, not even the sign of a zero.
    nothing = jax.tree.map(lambda u: jnp.full_like(u, -0.0), updates)
    return choose(applied, updates, nothing), state

  return Gated(inner.init, update)


# MARK: by name


@OPTIMIZERS.register("adamw")
def adamw(config: OptimizerConfig, schedule: optax.Schedule) -> Gated:
  """AdamW (arXiv 1711.05101) behind a clip of the gradient's norm."""
  return chain(
    optax.clip_by_global_norm(config.clip_norm),
    _adam(config),
    optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
    scale_by_step(schedule),
  )


@OPTIMIZERS.register("lion")
def lion(config: OptimizerConfig, schedule: optax.Schedule) -> Gated:
  """Lion (arXiv 2302.06675); its steps ask for a 3 to 10 times lower rate."""
  return chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.scale_by_lion(config.b1, _given(config.b2, 0.99)),
    optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
    scale_by_step(schedule),
  )


@OPTIMIZERS.register("muon")
def muon(config: OptimizerConfig, schedule: optax.Schedule) -> Gated:
  """Muon for the blocks' matrices, Adam for all else (arXiv 2502.16982)."""
  matrices = optax.chain(
    scale_by_muon(
      beta=_given(config.momentum, 0.95),
      weight_dimension_numbers=_by_name(_MATRICES.get),
    ),
    optax.stateless(_scale_to_adams_size),
  )
  return chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.partition(
      {"muon": matrices, "adam": _adam(config)},
      _by_name(lambda name: "muon" if name in _MATRICES else "adam"),
    ),
    optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
    scale_by_step(schedule),
  )


@OPTIMIZERS.register("adafactor")
def adafactor(config: OptimizerConfig, schedule: optax.Schedule) -> Gated:
  """Adafactor (arXiv 1804.04235) with learning rates of AdamW's kind.

  They are not relative to a parameter's size. Squares are factored over the two
  longest axes of an array where both have at least 128 entries.
  """
  return chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.scale_by_factored_rms(),
    optax.clip_by_block_rms(1.0),
    *([optax.ema(config.momentum, debias=False)] if config.momentum else []),
    optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
    scale_by_step(schedule),
  )


# MARK: parts of a chain


def scale_by_adam(b1: float, b2: float, eps: float) -> Gated:
  """Returns `optax.scale_by_adam`, gated without a copy of the moments.

  Args:
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: is added to the second moment's root.
  """
  mean = lambda m, g: b1 * m + (1 - b1) * g
  square = lambda v, g: b2 * v + (1 - b2) * jnp.square(g)

  def init(params: Params) -> optax.ScaleByAdamState:
    zeros = lambda: jax.tree.map(jnp.zeros_like, params)
    return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros(), zeros())

  def update(grads, state, params=None, *, applied=True, **_):
    del params
    new = optax.ScaleByAdamState(
      count=state.count + 1,
      mu=jax.tree.map(mean, state.mu, grads),
      nu=jax.tree.map(square, state.nu, grads),
    )
    # The direction follows from what is kept: computed from the new moments
    # themselves, it would need them beside the old ones.
    state = choose(applied, new, state)
    count = state.count.astype(jnp.float32)
    corrected = lambda x, decay: x / (1 - decay**count)
    direction = lambda m, v: (
      corrected(m, b1) / (jnp.sqrt(corrected(v, b2)) + eps)
    )
    return jax.tree.map(direction, state.mu, state.nu), state

  return Gated(init, update)


def scale_by_step(
  schedule: optax.Schedule,
) -> optax.GradientTransformationExtraArgs:
  """Multiplies by minus the learning rate of the update's number.

  `optax.scale_by_learning_rate` counts the updates that were applied instead,
  so that after a skipped one its rate is that of an earlier update.
  """

  def update(updates, state, params=None, *, step, **_):
    del params
    rate = -schedule(step)
    return jax.tree.map(lambda u: rate * u, updates), state

  return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def decay_mask(params: Params) -> dict[str, Any]:
  """Returns True where weight decay applies: not norms, biases, embeddings."""
  return _by_name(lambda name: not name.endswith(_UNDECAYED))(params)


def _adam(config: OptimizerConfig) -> Gated:
  return scale_by_adam(config.b1, _given(config.b2, 0.95), config.eps)


def _given(value: float | None, default: float) -> float:
  return default if value is None else value


def _by_name(function: Callable[[str], Any]) -> Callable[[Params], Any]:
  """Returns a tree map of the function over the names of leaves."""
  return functools.partial(
    jax.tree_util.tree_map_with_path, lambda path, _: function(path[-1].key)
  )


def _scale_to_adams_size(updates: Params, params: Params | None) -> Params:
  del params

  def scale(path: tuple[Any, ...], update: Array) -> Array:
    axes = _MATRICES[path[-1].key]
    size = lambda axes: math.prod(update.shape[axis] for axis in axes)
    longest = max(size(axes.reduction_axis), size(axes.output_axis))
    return update * (_ADAM_RMS * math.sqrt(longest))

  return jax.tree_util.tree_map_with_path(scale, updates)


# MARK: fields that are not used


class _Watched(OptimizerConfig):
  """The config, remembering which fields a builder has read."""

  def __getattribute__(self, name: str) -> Any:
    if name in _SPECIAL:
      self.__dict__.setdefault("_read", set()).add(name)
    return super().__getattribute__(name)


def _log_unused(config: OptimizerConfig, watched: _Watched) -> None:
  default = OptimizerConfig()
  read = vars(watched).get("_read", ())
  for name in _SPECIAL:
    value = getattr(config, name)
    if value != getattr(default, name) and name not in read:
      logging.warning(
        "optimizer.%s=%s has no effect: optimizer.name=%s does not use it",
        *(name, value, config.name),
      )
