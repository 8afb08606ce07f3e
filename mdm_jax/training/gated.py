"""Optax transformations that leave their state alone in a skipped update.

An update that is not finite, or a spike, must not change a bit of the
optimizer's state. Every transformation's `update` gets `applied`, a bool
scalar:

Gated   a transformation that keeps its own state where `applied` is False;
        selecting inside the loop that computes the state costs no copy of it
gate    wraps any other transformation, by selecting between the states before
        and after; this needs memory for both
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
  """Marks a transformation that keeps its state where `applied` is False.

  The class adds no behavior. It asserts that `update` takes the extra argument
  `applied`, and that it runs on a mesh with Explicit axes, so `gate` returns it
  as it is.
  """


def choose(condition: Bool[Array, ""] | bool, new: Any, old: Any) -> Any:
  """Returns `new` where the condition holds, else `old`, to the bit.

  If `new` is computed elementwise from `old`, XLA fuses the selection into that
  loop; otherwise both are in memory at once.
  """
  return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


def gate(transformation: optax.GradientTransformation) -> Gated:
  """Wraps an optax transformation to keep its state where `applied` is False.

  On a mesh it runs with Auto axes, since most of optax, such as Muon's matrix
  products, fails on Explicit ones. State arrays with the path and shape of a
  parameter are sharded like it; all others are replicated.

  Args:
    transformation: returned as it is if it is `Gated` already. If its `update`
      takes extra arguments, it gets `step` and `applied`.
  """
  if isinstance(transformation, Gated):
    return transformation
  inner = optax.with_extra_args_support(transformation)
  # Optax mixes dtypes, which fails under jax_numpy_dtype_promotion="strict".
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

    # Without a state there is nothing to select, and Explicit axes can stay.
    if not jax.tree.leaves(state):
      return run(grads, state, params, applied, extra)
    applied, extra = jax.tree.map(jnp.asarray, (applied, extra))
    # The state must leave sharded as it came, or the next update would be
    # compiled again.
    specs = _specs(grads), _specs(state)
    updates, new = _with_auto_axes(run, specs)(
      *(grads, state, params, applied, extra)
    )
    return updates, choose(applied, new, state)

  return Gated(init, update)


def chain(*parts: optax.GradientTransformation) -> Gated:
  """Returns `optax.chain` of the parts, each gated separately.

  Only the parts that aren't `Gated` then need memory for two states. Parts
  without a state run unwrapped, on the mesh's Explicit axes.
  """
  # All parts are gated, so the chain is: mark it, for `gate` not to wrap it.
  return Gated(*optax.chain(*map(gate, parts)))


def accumulate(
  transformation: optax.GradientTransformation, every: int
) -> optax.GradientTransformationExtraArgs:
  """Returns `optax.MultiSteps`, forwarding `step` and `applied`.

  The mean gradient of `every` applied updates makes one optimizer step; the
  other updates change no parameter.
  """
  steps = optax.MultiSteps(transformation, every)
  return optax.GradientTransformationExtraArgs(steps.init, steps.update)


def accumulated(
  state: optax.OptState, applied: Bool[Array, ""]
) -> dict[str, Float[Array, ""]]:
  """Returns the metric `accumulated`: 1 if the update only added a gradient.

  Args:
    state: the optimizer's state after the update.
    applied: whether the update was applied.

  Returns:
    The metric, or {} if the optimizer has no `optax.MultiSteps`.
  """
  is_steps = lambda node: isinstance(node, optax.MultiStepsState)
  nodes = jax.tree.leaves(state, is_leaf=is_steps)
  waiting = [node.mini_step > 0 for node in nodes if is_steps(node)]
  if not waiting:
    return {}
  return {"accumulated": (applied & waiting[0]).astype(jnp.float32)}


# MARK: meshes


def _with_auto_axes(function: Callable[..., Any], specs: Any) -> Any:
  """Wraps a function to run with Auto axes; outputs are sharded as `specs`."""
  if jax.sharding.get_abstract_mesh().empty:
    return function
  return jax.sharding.auto_axes(function, out_sharding=specs)


def _specs(tree: Any) -> Any:
  return jax.tree.map(lambda x: jax.typeof(x).sharding.spec, tree)


def _state_specs(state: Any, params: optax.Params) -> Any:
  """Returns the PartitionSpecs of a state, matching its parameters' copies.

  A leaf is such a copy if its path ends with a parameter's path and the shapes
  are equal. It gets the parameter's spec; all other leaves are replicated.
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
