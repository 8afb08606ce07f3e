"""Gradients written by hand for XLA's CPU compiler; used on CPUs alone.

Each function here computes what the plain one of the same purpose does, and its
gradient by products that the compiler runs without turning arrays around, or
from fewer arrays. For any other device JAX's own gradients are taken.
"""

import functools
import re

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float


def wanted() -> bool:
  """Returns whether what is being traced will run on CPUs.

  By the current mesh. One that has no devices is a plan's, for others than
  these.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return jax.default_backend() == "cpu"
  device = mesh.abstract_device
  return device is not None and device.device_kind == "cpu"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def product(equation: str, spec: P, x: Array, weight: Array) -> Array:
  """An einsum whose gradients are the einsums one would write by hand.

  JAX's own ask for transposed results, which costs XLA's CPU backend as much
  as the product. The weight's gradient is summed up in the weight's dtype.
  """
  return jnp.einsum(equation, x, weight.astype(x.dtype), out_sharding=spec)


def _product_forward(equation, spec, x, weight):
  return product(equation, spec, x, weight), (x, weight)


def _product_backward(equation, spec, residuals, grad):
  del spec
  x, weight = residuals
  left, right, result = re.split(",|->", equation)
  grad_x = jnp.einsum(
    f"{result},{right}->{left}",
    grad,
    weight.astype(grad.dtype),
    out_sharding=jax.typeof(x).sharding,
  )
  factors = (left, x), (result, grad)
  return grad_x, _weight_gradient(right, weight, *factors)


def _weight_gradient(axes: str, weight: Array, left, right) -> Array:
  """Returns the product of two named arrays that has the weight's axes."""
  # XLA turns the first factor around: better the smaller one. The barrier
  # keeps it from turning the other one after all.
  first, second = (left, right)
  if left[1].size > right[1].size:
    first, second = right, left
  order = sorted(axes, key=lambda axis: axis not in first[0])
  split = dict(zip(axes, jax.typeof(weight).sharding.spec, strict=True))
  grad = jnp.einsum(
    f"{first[0]},{second[0]}->{''.join(order)}",
    first[1],
    second[1],
    preferred_element_type=weight.dtype,
    out_sharding=P(*(split[axis] for axis in order)),
  )
  if order == list(axes):
    return grad
  grad = jax.lax.optimization_barrier(grad)
  return grad.transpose([order.index(axis) for axis in axes])


product.defvjp(_product_forward, _product_backward)


@jax.custom_vjp
def swiglu(
  gate: Float[Array, "B L F"], up: Float[Array, "B L F"]
) -> Float[Array, "B L F"]:
  """silu(gate) * up (arXiv 2002.05202); its gradient keeps the two alone."""
  return jax.nn.silu(gate) * up


def _swiglu_forward(gate, up):
  return swiglu(gate, up), (gate, up)


def _swiglu_backward(residuals, grad):
  gate, up = residuals
  share = jax.nn.sigmoid(gate)
  return grad * up * share * (1 + gate * (1 - share)), grad * gate * share


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


@jax.custom_vjp
def attend(
  query: Float[Array, "B G N K"],
  key: Float[Array, "B G L K"],
  value: Float[Array, "B G L K"],
  visible: Bool[Array, "B N L"],
) -> Float[Array, "B G N K"]:
  """Attends, and computes the weights again for the gradient.

  Reading N x L weights a head back takes as long as computing them, and no
  memory has to hold them for all layers (arXiv 2205.14135, appendix B.2).
  """
  return _attend_forward(query, key, value, visible)[0]


def _attend_forward(query, key, value, visible):
  # Shardings are named: einsum forgets that of a batch of one row.
  scores = _scores(query, key, visible)
  highest = scores.max(axis=-1, keepdims=True)
  weights = jnp.exp(scores - highest)
  total = weights.sum(axis=-1, keepdims=True)
  mixed = jnp.einsum(
    "bgnl,bglk->bgnk",
    weights.astype(value.dtype),
    value,
    preferred_element_type=jnp.float32,
    out_sharding=jax.typeof(query).sharding,
  )
  mixed = (mixed / total).astype(value.dtype)
  log_total = highest + jnp.log(total)
  mixed, log_total = checkpoint_name((mixed, log_total), "attention")
  return mixed, (query, key, value, visible, mixed, log_total)


def _attend_backward(residuals, grad):
  query, key, value, visible, mixed, log_total = residuals
  like = lambda x: {"out_sharding": jax.typeof(x).sharding}
  weights = jnp.exp(_scores(query, key, visible) - log_total)
  grad_value = jnp.einsum(
    "bgnl,bgnk->bglk", weights.astype(value.dtype), grad, **like(value)
  )
  grad_weights = jnp.einsum(
    "bgnk,bglk->bgnl", grad, value, preferred_element_type=jnp.float32
  )
  # The softmax's own gradient: what every query's weights gain on average.
  both = grad.astype(jnp.float32) * mixed.astype(jnp.float32)
  mean = both.sum(axis=-1, keepdims=True)
  grad_scores = weights * (grad_weights - mean) * _scale(query)
  grad_scores = grad_scores.astype(query.dtype)
  grad_query = jnp.einsum("bgnl,bglk->bgnk", grad_scores, key, **like(query))
  grad_key = jnp.einsum("bgnl,bgnk->bglk", grad_scores, query, **like(key))
  return grad_query, grad_key, grad_value, None


attend.defvjp(_attend_forward, _attend_backward)


def _scores(query, key, visible) -> Float[Array, "B G N L"]:
  scores = jnp.einsum(
    "bgnk,bglk->bgnl",
    query * _scale(query),
    key,
    preferred_element_type=jnp.float32,
  )
  return jnp.where(visible[:, None], scores, -1e30)


def _scale(query) -> float:
  return query.shape[-1] ** -0.5
