"""Optax transformations for updates that may turn out not to be applied.

A bad update (not finite, or a spike) must change no bit of the optimizer's
state. Every transformation's `update` is told `applied`, a scalar:

Gated   keeps its own state where `applied` is False; chosen inside the loop
        that computes it, this costs no copy of the state
gate    makes any other transformation so, by a choice between the state before
        and after: that needs room for both
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

Updates = Any
Path = tuple[Any, ...]


class Gated(optax.GradientTransformationExtraArgs):
  """A transformation that keeps every bit of its state if not applied.

  Its `update` takes `applied`, and works on a mesh with Explicit axes. The
  class is only a mark, for transformations that see to it themselves.
  """


def choose(condition: Bool[Array, ""] | bool, new: Any, old: Any) -> Any:
  """Returns the new leaves, or the old ones bit by bit.

  Inside the loop that computes a leaf: `new` must follow element by element
  from `old`, or both are in memory at once.
  """
  return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


def gate(transformation: optax.GradientTransformation) -> Gated:
  """Returns any optax transformation, made to keep its state if not applied.

  On a mesh it runs with automatic axes, as most of optax expects; the state's
  arrays lie as the parameters of the same path and shape do, all others are
  whole on every device.

  Args:
    transformation: one that is `Gated` already is returned as it is. If its
      `update` takes extra arguments, it also gets `step` and `applied`.
  """
  if isinstance(transformation, Gated):
    return transformation
  inner = optax.with_extra_args_support(transformation)
  # Optax mixes dtypes, which JAX can be told to refuse.
  promote = functools.partial(jax.numpy_dtype_promotion, "standard")

  def init(params: optax.Params) -> optax.OptState:
    shapes = jax.tree.map(
      lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params
    )
    with promote():
      specs = _state_specs(jax.eval_shape(inner.init, shapes), params)
      return _with_auto_axes(inner.init, specs)(params)

  def update(grads, state, params=None, *, applied=True, **extra):
    def run(grads, state, params, applied, extra):
      with promote():
        return inner.update(grads, state, params, applied=applied, **extra)

    if not jax.tree.leaves(state):  # there is nothing to keep
      return run(grads, state, params, applied, extra)
    applied, extra = jax.tree.map(jnp.asarray, (applied, extra))
    specs = _specs(grads), _specs(state)
    updates, new = _with_auto_axes(run, specs)(
      *(grads, state, params, applied, extra)
    )
    return updates, choose(applied, new, state)

  return Gated(init, update)


def chain(*parts: optax.GradientTransformation) -> Gated:
  """Returns `optax.chain` of the parts, each gated by itself.

  So a choice between two states is made only for the parts that need one.
  Parts without a state run as they are, with the mesh's Explicit axes.
  """
  return Gated(*optax.chain(*map(gate, parts)))


def accumulate(
  transformation: optax.GradientTransformation, every: int
) -> optax.GradientTransformationExtraArgs:
  """Returns `optax.MultiSteps`, which passes `step` and `applied` on.

  The mean gradient of `every` applied updates makes one step; the updates
  before it change no parameter.
  """
  steps = optax.MultiSteps(transformation, every)
  return optax.GradientTransformationExtraArgs(steps.init, steps.update)


def accumulated(
  state: optax.OptState, applied: Bool[Array, ""]
) -> dict[str, Float[Array, ""]]:
  """Returns a metric: 1 if the update only added to an accumulated gradient.

  Args:
    state: of the optimizer, after the update.
    applied: whether the update was.

  Returns:
    Nothing if no part of the optimizer is an `optax.MultiSteps`.
  """
  is_steps = lambda node: isinstance(node, optax.MultiStepsState)
  nodes = jax.tree.leaves(state, is_leaf=is_steps)
  waiting = [node.mini_step > 0 for node in nodes if is_steps(node)]
  if not waiting:
    return {}
  return {"accumulated": (applied & waiting[0]).astype(jnp.float32)}


# MARK: meshes


def _with_auto_axes(function: Callable[..., Any], specs: Any) -> Any:
  """Returns the function with automatic axes inside, explicit ones outside."""
  if jax.sharding.get_abstract_mesh().empty:
    return function
  return jax.sharding.auto_axes(function, out_sharding=specs)


def _specs(tree: Any) -> Any:
  return jax.tree.map(lambda x: jax.typeof(x).sharding.spec, tree)


def _state_specs(state: Any, params: optax.Params) -> Any:
  """Returns how a state lies: its copies of parameters lie as those do.

  A copy has the parameter's shape, and its path ends with the parameter's.
  """
  known = {
    (path, p.shape): jax.typeof(p).sharding.spec
    for path, p in jax.tree_util.tree_leaves_with_path(params)
  }

  def find(path: Path, leaf: jax.ShapeDtypeStruct) -> P:
    ends = ((path[i:], leaf.shape) for i in range(len(path)))
    whole = P(*[None] * len(leaf.shape))
    return next((known[end] for end in ends if end in known), whole)

  return jax.tree_util.tree_map_with_path(find, state)
