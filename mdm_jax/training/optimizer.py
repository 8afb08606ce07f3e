"""Optimizers as optax chains: AdamW, Lion, Muon, Adafactor, or your own.

`OPTIMIZERS` maps a name, as in `optimizer.name`, to a builder: a function from
the config and the learning-rate schedule to an optax transformation. Register
your own with `OPTIMIZERS.register`. Any transformation is made to keep its
state to the bit in an update that is not applied (`gated.py`).
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

_UNDECAYED = ("scale", "bias", "embedding")  # suffixes of leaf names
# Fields that not every optimizer uses; a warning names those without effect.
_SPECIAL = "clip_norm", "weight_decay", "b1", "b2", "eps", "momentum"
# Muon's matrices by leaf name: (reduction axes, output axes). Weights are
# stacked over layers, axis 0, and have their heads as axes of their own.
_MATRICES = {
  "query": MuonDimensionNumbers((1,), (2, 3, 4)),
  "key": MuonDimensionNumbers((1,), (2, 3)),
  "value": MuonDimensionNumbers((1,), (2, 3)),
  "out": MuonDimensionNumbers((1, 2, 3), (4,)),
  "gate": MuonDimensionNumbers((1,), (2,)),
  "up": MuonDimensionNumbers((1,), (2,)),
  "down": MuonDimensionNumbers((1,), (2,)),
}
# The RMS of a typical AdamW update. Scaling Muon's orthogonal updates to it
# lets both share a learning rate and weight decay (arXiv 2502.16982).
_ADAM_RMS = 0.2


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule) -> Gated:
  """Returns the configured optimizer.

  Args:
    config: the optimizer's config. Fields that are set but have no effect are
      logged as warnings.
    schedule: a function from update to learning rate.

  Returns:
    A transformation whose `update` takes two extra arguments: `step`, the index
    of the update, which determines the learning rate; and `applied` (default
    True). If `applied` is False, the state is unchanged to the bit and the
    updates are -0.0.

  Raises:
    UserError: no optimizer has that name.
  """
  build = OPTIMIZERS[config.name]
  watched = _Watched(**vars(config))
  optimizer = build(watched, schedule)
  _log_unused(config, watched)
  # Inside `gate`: MultiSteps resets its sum by multiplying it by 0, so a NaN
  # from an update that isn't applied would stay in it forever.
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
    # Adding 0.0 would turn a parameter of -0.0 into 0.0; -0.0 changes no bit.
    nothing = jax.tree.map(lambda u: jnp.full_like(u, -0.0), updates)
    return choose(applied, updates, nothing), state

  return Gated(inner.init, update)


# MARK: by name


@OPTIMIZERS.register("adamw")
def adamw(config: OptimizerConfig, schedule: optax.Schedule) -> Gated:
  """AdamW (arXiv 1711.05101) with clipping by the global gradient norm."""
  # The decay comes after Adam's scaling, which makes it decoupled, and before
  # the learning rate, which scales both.
  return chain(
    optax.clip_by_global_norm(config.clip_norm),
    _adam(config),
    optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
    scale_by_step(schedule),
  )


@OPTIMIZERS.register("lion")
def lion(config: OptimizerConfig, schedule: optax.Schedule) -> Gated:
  """Lion (arXiv 2302.06675); use a 3 to 10 times lower learning rate."""
  return chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.scale_by_lion(config.b1, _given(config.b2, 0.99)),
    optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
    scale_by_step(schedule),
  )


@OPTIMIZERS.register("muon")
def muon(config: OptimizerConfig, schedule: optax.Schedule) -> Gated:
  """Muon for the blocks' matrices, Adam for the rest (arXiv 2502.16982)."""
  matrices = optax.chain(
    scale_by_muon(
      beta=_given(config.momentum, 0.95),
      weight_dimension_numbers=_by_name(_MATRICES.get),
    ),
    optax.stateless(_scale_to_adams_size),
  )
  # One clip for all parameters together, so it is outside the partition.
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
  """Adafactor (arXiv 1804.04235) with an absolute learning rate, like AdamW's.

  Updates are not scaled by the RMS of the parameter. Second moments are
  factored over an array's two largest axes if both have at least 128 entries.
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
  """Returns a gated `optax.scale_by_adam` that needs no copy of the moments.

  Args:
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the square root of the second moment.
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
    # Compute the direction from the selected moments: using `new` here would
    # keep it in memory beside the old moments.
    state = choose(applied, new, state)
    # While no update has been applied, count is 0 and the correction is 0/0;
    # `make_optimizer` replaces the updates of an unapplied step.
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
  """Returns a transformation that multiplies by -schedule(step).

  `step` is the index of the update, applied or not.
  `optax.scale_by_learning_rate` counts applied updates instead: after skipped
  ones its learning rate lags behind the logged one.
  """

  def update(updates, state, params=None, *, step, **_):
    del params
    rate = -schedule(step)
    return jax.tree.map(lambda u: rate * u, updates), state

  return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def decay_mask(params: Params) -> dict[str, Any]:
  """Returns True for leaves with weight decay: no norm, bias or embedding."""
  return _by_name(lambda name: not name.endswith(_UNDECAYED))(params)


def _adam(config: OptimizerConfig) -> Gated:
  return scale_by_adam(config.b1, _given(config.b2, 0.95), config.eps)


def _given(value: float | None, default: float) -> float:
  return default if value is None else value


def _by_name(function: Callable[[str], Any]) -> Callable[[Params], Any]:
  """Returns a function that maps a tree's leaves by their names."""
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
  """A config that records which fields a builder reads.

  Builders may be a user's, so nothing else says which fields they use.
  """

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
