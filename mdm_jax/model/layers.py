"""The parts of a transformer block, on stacked or single parameters.

Matmul weights keep their heads as separate axes, so that a mesh axis splits
heads and never cuts through one. Every contraction names its output sharding,
as the Explicit mesh asks for.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

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
  equation: str, x: Array, weight: nnx.Param, *axes: str | None
) -> Array:
  """Multiplies activations with a weight, in the activations' dtype."""
  return jnp.einsum(
    equation, x, weight[...].astype(x.dtype), out_sharding=RULES.spec(*axes)
  )


class RMSNorm(nnx.Module):
  """x / rms(x) * scale, with float32 statistics (arXiv 1910.07467)."""

  def __init__(self, size: int):
    self.scale = nnx.Param(jnp.ones(size, jnp.float32))

  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
    normed = x32 * jax.lax.rsqrt(mean_square + 1e-6)
    scale = self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))
    return (normed * scale).astype(x.dtype)


def segment_positions(segments: Int[Array, "B L"]) -> Int[Array, "B L"]:
  """Returns each token's position within its packed segment."""
  index = jnp.arange(segments.shape[1])[None]
  starts = segments != jnp.pad(segments, ((0, 0), (1, 0)))[:, :-1]
  starts = starts.at[:, 0].set(True)
  first = jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
  return index - first


def rotary(
  positions: Int[Array, "B L"], head_size: int, theta: float
) -> tuple[Float[Array, "B L half"], Float[Array, "B L half"]]:
  """Returns cos and sin of the rotary angles (arXiv 2104.09864)."""
  powers = jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size
  angles = (
    positions[..., None].astype(jnp.float32) * theta ** -powers[None, None]
  )
  return jnp.cos(angles), jnp.sin(angles)


def rotate(
  x: Float[Array, "B *H L K"],
  cos: Float[Array, "B L half"],
  sin: Float[Array, "B L half"],
) -> Float[Array, "B *H L K"]:
  """Turns the two halves of every head by the rotary angles."""
  heads = tuple(range(1, x.ndim - 2))
  cos, sin = (jnp.expand_dims(a, heads).astype(x.dtype) for a in (cos, sin))
  left, right = jnp.split(x, 2, axis=-1)
  return jnp.concatenate(
    [left * cos - right * sin, right * cos + left * sin], axis=-1
  )


def reference_attention(
  query: Float[Array, "B G R L K"],
  key: Float[Array, "B G L K"],
  value: Float[Array, "B G L K"],
  visible: Bool[Array, "B L L"],
) -> Float[Array, "B G R L K"]:
  """Attention by plain einsums, softmax in float32; G groups of R heads."""
  scale = query.shape[-1] ** -0.5
  scores = jnp.einsum("bgrlk,bgmk->bgrlm", query * scale, key)
  scores = scores.astype(jnp.float32)
  scores = jnp.where(visible[:, None, None], scores, -1e30)
  weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
  return jnp.einsum("bgrlm,bgmk->bgrlk", weights, value)


def fused_attention(
  query: Float[Array, "B G R L K"],
  key: Float[Array, "B G L K"],
  value: Float[Array, "B G L K"],
  visible: Bool[Array, "B L L"],
) -> Float[Array, "B G R L K"]:
  """The same through `jax.nn.dot_product_attention`."""
  batch, groups, repeats, length, size = query.shape
  heads = query.reshape(batch, groups * repeats, length, size)
  result = jax.nn.dot_product_attention(
    *(jnp.swapaxes(x, 1, 2) for x in (heads, key, value)),
    mask=visible[:, None],
  )
  return jnp.swapaxes(result, 1, 2).reshape(query.shape)


def attend(
  implementation: str,
  query: Float[Array, "B G R L K"],
  key: Float[Array, "B G L K"],
  value: Float[Array, "B G L K"],
  visible: Bool[Array, "B L L"],
) -> Float[Array, "B G R L K"]:
  """Bidirectional attention where `visible`, by the configured means."""
  if implementation == "auto":
    # Measured: plain einsums win on the CPU.
    on_cpu = jax.default_backend() == "cpu"
    implementation = "reference" if on_cpu else "fused"
  chosen = {"reference": reference_attention, "fused": fused_attention}
  return chosen[implementation](query, key, value, visible)


def dropout(
  x: Float[Array, "B L D"], rate: float, keys: jax.Array | None
) -> Float[Array, "B L D"]:
  """Zeroes a share of x, one key a row; no keys, no dropout."""
  if keys is None or rate == 0:
    return x
  draw = jax.vmap(lambda key: jax.random.uniform(key, x.shape[1:]))
  return jnp.where(draw(keys) < rate, 0, x / (1 - rate)).astype(x.dtype)
