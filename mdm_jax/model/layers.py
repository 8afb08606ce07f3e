"""Transformer layers as functions: projections, SwiGLU, RMSNorm, RoPE, dropout.

Matmul weights keep heads as a separate axis, so that a mesh axis splits between
heads and never through one. Every contraction states its output sharding, as an
Explicit mesh requires.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from mdm_jax.core import hardware, rng
from mdm_jax.core.sharding import RULES
from mdm_jax.model import cpu_gradients, gpu_kernels
from mdm_jax.model.kernels import parsed
from mdm_jax.model.rope_scaling import UNSCALED, RopeScaling, frequencies


def normal(
  key: jax.Array,
  shape: tuple[int, ...],
  *axes: str | None,
  fan_in: int,
  scale: float = 1.0,
) -> nnx.Param:
  """Returns a float32 parameter ~ N(0, scale^2 / fan_in).

  Args:
    key: random key.
    shape: of the parameter.
    *axes: logical axis names, one per dimension, that determine its sharding.
    fan_in: number of inputs that each output sums over.
    scale: factor on the standard deviation.
  """
  # Scaled by fan-in: learns faster in few updates than a fixed std of 0.02.
  init = jax.nn.initializers.normal(scale * fan_in**-0.5)
  return nnx.Param(
    init(key, shape, jnp.float32, out_sharding=RULES.spec(*axes))
  )


def zeros(shape: tuple[int, ...], *axes: str | None) -> nnx.Param:
  """Returns a float32 parameter of zeros, sharded by its logical axes."""
  return nnx.Param(
    jnp.zeros(shape, jnp.float32, out_sharding=RULES.spec(*axes))
  )


def project(
  name: str,
  equation: str,
  x: Array,
  weight: nnx.Param | Array,
  *axes: str | None,
  keep: bool = True,
) -> Array:
  """Multiplies activations by a weight, in the activations' dtype.

  Args:
    name: name of the product in profiles and for rematerialisation policies.
    equation: einsum of two operands with an explicit result.
    x: activations.
    weight: a parameter; cast to the dtype of `x`.
    *axes: logical axis names of the result, for its sharding.
    keep: whether rematerialisation may store the result for the backward pass.
  """
  spec = RULES.spec(*axes)
  with jax.named_scope(name):
    if cpu_gradients.wanted():
      y = cpu_gradients.product(equation, spec, x, weight[...])
    else:
      y = _product(equation, spec, x.dtype, x, weight[...])
  return checkpoint_name(y, name) if keep else y


def head_product(
  hidden: Float[Array, "N D"], table: Float[Array, "V D"]
) -> Float[Array, "N V"]:
  """Returns float32 logits, from products in the dtype of `hidden`.

  The table's gradient is accumulated in the table's dtype.
  """
  spec = RULES.spec("batch", "vocab")
  if cpu_gradients.wanted():
    return jnp.einsum(
      "nd,vd->nv",
      hidden,
      table.astype(hidden.dtype),
      preferred_element_type=jnp.float32,
      out_sharding=spec,
    )
  return _product("nd,vd->nv", spec, jnp.dtype("float32"), hidden, table)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(
  equation: str, spec: P, dtype: jnp.dtype, x: Array, weight: Array
) -> Array:
  """Einsum with products in the dtype of `x`, there and back.

  The result has the given dtype, and the weight's gradient is accumulated in
  the weight's. Neither makes an operand float32: on a GPU such products run at
  a third of the rate of bfloat16 ones.
  """
  return jnp.einsum(
    equation,
    x,
    weight.astype(x.dtype),
    preferred_element_type=dtype,
    out_sharding=spec,
  )


def _product_forward(equation, spec, dtype, x, weight):
  return _product(equation, spec, dtype, x, weight), (x, weight)


def _product_backward(equation, spec, dtype, residuals, grad):
  del dtype
  x, weight = residuals
  grad = grad.astype(x.dtype)
  left, right, result = re.split(",|->", equation)
  # JAX's own gradient for x. Its gradient for the weight would pass through the
  # cast, and so be rounded to the activations' dtype.
  of_x = lambda x: jnp.einsum(
    equation, x, weight.astype(x.dtype), out_sharding=spec
  )
  grad_weight = jnp.einsum(
    f"{left},{result}->{right}",
    x,
    grad,
    preferred_element_type=weight.dtype,
    out_sharding=jax.typeof(weight).sharding,
  )
  return (*jax.vjp(of_x, x)[1](grad), grad_weight)


_product.defvjp(_product_forward, _product_backward)


def swiglu(
  x: Float[Array, "B L D"], gate: nnx.Param | Array, up: nnx.Param | Array
) -> Float[Array, "B L F"]:
  """Returns silu(x gate) * (x up) (Shazeer 2020, arXiv 2002.05202)."""
  if cpu_gradients.wanted():
    # Two products: joining their gradients takes a CPU longer than one product
    # saves (1.06 x as fast).
    a, b = (
      project(name, "bld,df->blf", x, w, "batch", "length", "mlp")
      for name, w in (("gate", gate), ("up", up))
    )
    return cpu_gradients.swiglu(a, b)
  both = jnp.stack([gate[...], up[...]], axis=1)
  axes = "batch", "length", None, "mlp"
  return _gated(project("gate_up", "bld,dcf->blcf", x, both, *axes))


def gated(
  gate: Float[Array, "B L F"], up: Float[Array, "B L F"]
) -> Float[Array, "B L F"]:
  """Returns silu(gate) * up of two products."""
  if cpu_gradients.wanted():
    return cpu_gradients.swiglu(gate, up)
  return jax.nn.silu(gate) * up


@jax.custom_vjp
def _gated(pair: Float[Array, "B L 2 F"]) -> Float[Array, "B L F"]:
  """Returns silu(gate) * up; its gradient is computed as one array."""
  return jax.nn.silu(pair[:, :, 0]) * pair[:, :, 1]


def _gated_forward(pair):
  return _gated(pair), pair


def _gated_backward(pair, grad):
  gate, up = (pair[:, :, i, None].astype(jnp.float32) for i in (0, 1))
  # silu(x) = x s(x), and its derivative is s(x) (1 + x (1 - s(x))). Selections
  # of what goes in: XLA makes that one kernel, not two, which a concatenation
  # and sometimes a selection of the two results would be.
  first = jnp.arange(2).reshape(1, 1, 2, 1) == 0
  share = jax.nn.sigmoid(gate)
  slope = 1 + jnp.where(first, gate, 0) * (1 - share)
  factor = jnp.where(first, up, gate) * share * slope
  return ((grad[:, :, None].astype(jnp.float32) * factor).astype(pair.dtype),)


_gated.defvjp(_gated_forward, _gated_backward)


class RMSNorm(nnx.Module):
  """RMSNorm over the last axis, with a learned scale initialised to one."""

  def __init__(self, size: int, eps: float):
    self.scale, self.eps = nnx.Param(jnp.ones(size, jnp.float32)), eps

  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    return rms_norm(x, self.scale[...], self.eps)


def rms_norm(
  x: Float[Array, "*B D"], scale: Float[Array, "D"], eps: float
) -> Float[Array, "*B D"]:
  """Returns x / rms(x) * scale, computed in float32 and cast back.

  Source: Zhang and Sennrich 2019, arXiv 1910.07467.

  Args:
    x: activations.
    scale: learned factor of every entry.
    eps: added to the mean square.
  """
  x32 = x.astype(jnp.float32)
  mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
  normed = x32 * jax.lax.rsqrt(mean_square + eps)
  scale = scale.reshape((1,) * (x.ndim - 1) + (-1,))
  return (normed * scale).astype(x.dtype)


class LayerNorm(nnx.Module):
  """LayerNorm over the last axis, with a learned scale and bias."""

  def __init__(self, size: int, eps: float):
    self.scale, self.eps = nnx.Param(jnp.ones(size, jnp.float32)), eps
    self.bias = nnx.Param(jnp.zeros(size, jnp.float32))

  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    return layer_norm(x, self.scale[...], self.bias[...], self.eps)


def layer_norm(
  x: Float[Array, "*B D"],
  scale: Float[Array, "D"],
  bias: Float[Array, "D"],
  eps: float,
) -> Float[Array, "*B D"]:
  """Returns (x - mean) / deviation * scale + bias, computed in float32.

  Source: Ba et al. 2016, arXiv 1607.06450.

  Args:
    x: activations.
    scale: learned factor of every entry.
    bias: learned addition to every entry.
    eps: added to the variance.
  """
  x32 = x.astype(jnp.float32)
  centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
  variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
  normed = centred * jax.lax.rsqrt(variance + eps)
  scale, bias = (a.reshape((1,) * (x.ndim - 1) + (-1,)) for a in (scale, bias))
  return (normed * scale + bias).astype(x.dtype)


def norm_and_rotate(
  x: Float[Array, "B *H L K"],
  norm: RMSNorm,
  cos: Float[Array, "B L K"],
  sin: Float[Array, "B L K"],
) -> Float[Array, "B *H L K"]:
  """Returns every head, normalised and rotated."""
  if not _has_kernel(x.shape[-1]):
    # The order matters: the norm's learned scale doesn't commute with rotation.
    return rotate(norm(x), cos, sin)

  def run(x, scale, cos, sin):
    # Heads behind the length, as products leave them and attention reads them.
    heads = jnp.swapaxes(x.reshape(len(x), -1, *x.shape[-2:]), 1, 2)
    mixed = gpu_kernels.norm_rotate(heads, scale, cos, sin, norm.eps)
    return jnp.swapaxes(mixed, 1, 2).reshape(x.shape)

  inputs = x, norm.scale[...], cos, sin
  if jax.sharding.get_abstract_mesh().empty:
    return run(*inputs)
  # A kernel is not split over the mesh by itself, and does not say over which
  # mesh axes its results vary.
  specs = tuple(jax.typeof(a).sharding.spec for a in inputs)
  return jax.shard_map(
    run, in_specs=specs, out_specs=specs[0], check_vma=False
  )(*inputs)


def _has_kernel(head_size: int) -> bool:
  """Returns whether `gpu_kernels` can be used for heads of this size."""
  place = hardware.target()
  # NVIDIA's GPUs since Ampere, as for cuDNN; it was run on an H100 only.
  capability = place and place.backend == "gpu" and parsed(place.capability)
  if not capability or capability < (8, 0):
    return False
  # Triton's blocks have sizes of powers of two, and small ones are slow.
  half = head_size // 2
  return half >= 16 and half & (half - 1) == 0


def rotary(
  positions: Int[Array, "B L"],
  head_size: int,
  theta: float,
  scaling: RopeScaling = UNSCALED,
) -> tuple[Float[Array, "B L K"], Float[Array, "B L K"]]:
  """Returns the cosines and signed sines that `rotate` takes.

  Source: Su et al. 2021, arXiv 2104.09864. Entry i of a head's first half is
  paired with entry i of its second half, and both have the same angle.

  Args:
    positions: position of every token in its segment.
    head_size: K, even.
    theta: base of the frequencies, `model.rope_theta`.
    scaling: how they are scaled.
  """
  size = 1.0
  if scaling.kind == "default":
    powers = jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size
    frequency = theta**-powers
  else:
    frequency, size = frequencies(scaling, head_size, theta)
  angles = positions[..., None].astype(jnp.float32) * frequency[None, None]
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  if size != 1:
    cos, sin = cos * size, sin * size
  both = lambda left, right: jnp.concatenate([left, right], axis=-1)
  return both(cos, cos), both(-sin, sin)


def rotate(
  x: Float[Array, "B *H L K"],
  cos: Float[Array, "B L K"],
  sin: Float[Array, "B L K"],
) -> Float[Array, "B *H L K"]:
  """Rotates every head by its rotary angles; see `rotary`."""
  heads = tuple(range(1, x.ndim - 2))
  cos, sin = (jnp.expand_dims(a, heads).astype(x.dtype) for a in (cos, sin))
  # Swapping the halves by a roll, with the signs in `sin`, takes 0.5 ms a layer
  # on a CPU; slicing and concatenating them takes 1.25 ms.
  return x * cos + jnp.roll(x, x.shape[-1] // 2, axis=-1) * sin


def dropout(
  x: Float[Array, "B *L D"], rate: float, keys: jax.Array | None
) -> Float[Array, "B *L D"]:
  """Applies inverted dropout, with one key per row.

  Keys are per row so that a mask depends neither on the number of devices nor
  on how rows are split into microbatches.

  Args:
    x: activations.
    rate: probability that an entry is zeroed.
    keys: one key per row [B]; None disables dropout.
  """
  return without(x, rate, dropped(x.shape, rate, keys))


def dropped(
  shape: tuple[int, ...], rate: float, keys: jax.Array | None
) -> Bool[Array, "B *L D"] | None:
  """Returns which entries `dropout` drops; None if it drops none."""
  if keys is None or rate == 0:
    return None
  inner = math.prod(shape[1:-1]), shape[-1]
  drop = rng.words(keys, inner) < jnp.uint32(round(rate * 2**32))
  return drop.reshape(shape) if len(shape) > 3 else drop


def without(
  x: Float[Array, "*B D"], rate: float, drop: Bool[Array, "*B D"] | None
) -> Float[Array, "*B D"]:
  """Returns x with entries dropped, and the others scaled to make up for it."""
  if drop is None:
    return x
  return jnp.where(drop, 0, x / (1 - rate)).astype(x.dtype)
