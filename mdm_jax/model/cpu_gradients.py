"""Custom gradients that are faster with XLA's CPU backend; used on CPUs only.

Each function equals its plain counterpart. Its hand-written gradient avoids
transposes, which XLA's CPU backend executes as copies, or stores fewer arrays.
Other devices use JAX's own gradients. docs/performance.md has the measurements.
"""

import functools
import re

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from mdm_jax.core import hardware


def wanted() -> bool:
  """Returns whether the program being traced will run on CPUs.

  An abstract mesh is a plan for other hardware, for which the answer is no.
  """
  place = hardware.target()
  return place is not None and place.backend == "cpu"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def product(equation: str, spec: P, x: Array, weight: Array) -> Array:
  """Einsum whose gradients are einsums that need no transposed result.

  JAX's own gradients transpose their result, which takes XLA's CPU backend as
  long as the product. The weight's gradient is accumulated in the weight's
  dtype.

  Args:
    equation: einsum of two operands with an explicit result.
    spec: sharding of the result.
    x: activations.
    weight: cast to the dtype of `x`.
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
  """Returns the gradient of a weight with these axes from two factors.

  Args:
    axes: einsum axes of the weight.
    weight: the weight, for its dtype and sharding.
    left: axes and array of the first factor.
    right: axes and array of the second.
  """
  # XLA transposes the first factor, so the smaller one goes first. The result
  # then has the first factor's axes in front; the barrier keeps XLA from
  # merging the final transpose into the product, which would transpose the
  # larger factor after all.
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
  """Returns silu(gate) * up (arXiv 2002.05202); stores only its inputs."""
  return jax.nn.silu(gate) * up


def _swiglu_forward(gate, up):
  return swiglu(gate, up), (gate, up)


def _swiglu_backward(residuals, grad):
  gate, up = residuals
  # silu(x) = x s(x), and its derivative is s(x) (1 + x (1 - s(x))).
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
  """Computes attention; its gradient recomputes the attention weights.

  Reading N x L weights per head from memory takes as long as computing them,
  and storing them would take memory in every layer. Source: FlashAttention,
  Dao et al. 2022, arXiv 2205.14135, appendix B.2.

  Args:
    query: queries; heads of a group may be stacked along N.
    key: keys.
    value: values.
    visible: which keys each query attends to, the same for all groups.
  """
  return _attend_forward(query, key, value, visible)[0]


def _attend_forward(query, key, value, visible):
  # Output shardings are explicit, as einsum loses that of a one-row batch.
  scores = _scores(query, key, visible)
  highest = scores.max(axis=-1, keepdims=True)  # so that exp can't overflow
  weights = jnp.exp(scores - highest)
  total = weights.sum(axis=-1, keepdims=True)
  mixed = jnp.einsum(
    "bgnl,bglk->bgnk",
    weights.astype(value.dtype),
    value,
    preferred_element_type=jnp.float32,
    out_sharding=jax.typeof(query).sharding,
  )
  # Dividing [N, K] outputs instead of [N, L] weights.
  mixed = (mixed / total).astype(value.dtype)
  log_total = highest + jnp.log(total)
  # Names, for remat="dots" to store them: with the log normaliser the gradient
  # recomputes the weights without another max and sum.
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
  # Softmax gradient: weights * (gradient - its mean under the weights). That
  # mean equals grad . mixed, a float32 sum over K instead of L.
  both = grad.astype(jnp.float32) * mixed.astype(jnp.float32)
  mean = both.sum(axis=-1, keepdims=True)
  grad_scores = weights * (grad_weights - mean) * _scale(query)
  grad_scores = grad_scores.astype(query.dtype)
  grad_query = jnp.einsum("bgnl,bglk->bgnk", grad_scores, key, **like(query))
  grad_key = jnp.einsum("bgnl,bgnk->bglk", grad_scores, query, **like(key))
  return grad_query, grad_key, grad_value, None  # a mask has no gradient


attend.defvjp(_attend_forward, _attend_backward)


def _scores(query, key, visible) -> Float[Array, "B G N L"]:
  scores = jnp.einsum(
    "bgnk,bglk->bgnl",
    query * _scale(query),
    key,
    preferred_element_type=jnp.float32,
  )
  # Finite, not -inf: a query without any visible key gets a mean, not NaN.
  return jnp.where(visible[:, None], scores, -1e30)


def _scale(query) -> float:
  return query.shape[-1] ** -0.5
