"""The parts of a transformer block, on stacked or single parameters.

Matmul weights keep their heads as separate axes, so that a mesh axis splits
heads and never cuts through one. Every contraction names its output sharding,
as the Explicit mesh asks for.
"""

import functools
import re

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from mdm_jax.core.sharding import RULES


def normal(
  key: jax.Array,
  shape: tuple[int, ...],
  *axes: str | None,
  fan_in: int,
  scale: float = 1.0,
) -> nnx.Param:
  """Returns a float32 parameter, normal with std scale / sqrt(fan_in)."""
  init = jax.nn.initializers.normal(scale * fan_in**-0.5)
  return nnx.Param(
    init(key, shape, jnp.float32, out_sharding=RULES.spec(*axes))
  )


def zeros(shape: tuple[int, ...], *axes: str | None) -> nnx.Param:
  """Returns a float32 parameter of zeros, sharded."""
  return nnx.Param(
    jnp.zeros(shape, jnp.float32, out_sharding=RULES.spec(*axes))
  )


def project(
  name: str, equation: str, x: Array, weight: nnx.Param, *axes: str | None
) -> Array:
  """Multiplies activations with a weight, in the activations' dtype.

  Args:
    name: of the product, by which it may be kept for the backward pass and is
      found in a profile.
    equation: of the einsum.
    x: activations.
    weight: a parameter.
    *axes: logical ones of the result.
  """
  with jax.named_scope(name):
    y = _product(equation, RULES.spec(*axes), x, weight[...])
  return checkpoint_name(y, name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(equation: str, spec: P, x: Array, weight: Array) -> Array:
  """An einsum whose gradients are the einsums one would write by hand.

  JAX's own ask for transposed results, which costs XLA's CPU backend as much
  as the product. The weight's gradient is summed up in the weight's dtype.
  """
  return jnp.einsum(equation, x, weight.astype(x.dtype), out_sharding=spec)


def _product_forward(equation, spec, x, weight):
  return _product(equation, spec, x, weight), (x, weight)


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


_product.defvjp(_product_forward, _product_backward)


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


class RMSNorm(nnx.Module):
  """`rms_norm` with its scale, one to begin with."""

  def __init__(self, size: int):
    self.scale = nnx.Param(jnp.ones(size, jnp.float32))

  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    return rms_norm(x, self.scale[...])


def rms_norm(
  x: Float[Array, "*B D"], scale: Float[Array, "D"]
) -> Float[Array, "*B D"]:
  """x / rms(x) * scale, with float32 statistics (arXiv 1910.07467)."""
  x32 = x.astype(jnp.float32)
  mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
  normed = x32 * jax.lax.rsqrt(mean_square + 1e-6)
  scale = scale.reshape((1,) * (x.ndim - 1) + (-1,))
  return (normed * scale).astype(x.dtype)


def rotary(
  positions: Int[Array, "B L"], head_size: int, theta: float
) -> tuple[Float[Array, "B L K"], Float[Array, "B L K"]]:
  """Returns what `rotate` multiplies a head by, and its halves swapped.

  The cosines and the signed sines of the rotary angles (arXiv 2104.09864).
  """
  powers = jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size
  angles = (
    positions[..., None].astype(jnp.float32) * theta ** -powers[None, None]
  )
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  both = lambda left, right: jnp.concatenate([left, right], axis=-1)
  return both(cos, cos), both(-sin, sin)


def rotate(
  x: Float[Array, "B *H L K"],
  cos: Float[Array, "B L K"],
  sin: Float[Array, "B L K"],
) -> Float[Array, "B *H L K"]:
  """Turns the two halves of every head by the rotary angles."""
  heads = tuple(range(1, x.ndim - 2))
  cos, sin = (jnp.expand_dims(a, heads).astype(x.dtype) for a in (cos, sin))
  return x * cos + jnp.roll(x, x.shape[-1] // 2, axis=-1) * sin


def dropout(
  x: Float[Array, "B L D"], rate: float, keys: jax.Array | None
) -> Float[Array, "B L D"]:
  """Zeroes a share of x, one key a row; no keys, no dropout."""
  if keys is None or rate == 0:
    return x
  draw = jax.vmap(lambda key: jax.random.uniform(key, x.shape[1:]))
  return jnp.where(draw(keys) < rate, 0, x / (1 - rate)).astype(x.dtype)
