"""The norm and rotation of queries and keys as one GPU kernel, in Pallas.

Their time on a GPU is that of moving their bytes. XLA moves them several times,
there and back; the kernels here read each input once and write each output
once, with all arithmetic in float32 (docs/performance.md has the measurements).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

_TOKENS = 32  # per program


def _call(kernel, grid, in_specs, out_specs, out_shape, warps: int):
  return pl.pallas_call(
    kernel,
    grid=grid,
    in_specs=in_specs,
    out_specs=out_specs,
    out_shape=out_shape,
    compiler_params=triton.CompilerParams(num_warps=warps, num_stages=1),
    name=kernel.func.__name__.strip("_"),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def norm_rotate(
  x: Float[Array, "B L H K"],
  scale: Float[Array, "K"],
  cos: Float[Array, "B L K"],
  sin: Float[Array, "B L K"],
  eps: float,
) -> Float[Array, "B L H K"]:
  """Returns rotate(rms_norm(x, scale, eps), cos, sin), rounded once.

  Args:
    x: queries or keys.
    scale: the norm's learned scale.
    cos: from `layers.rotary`.
    sin: signed, likewise.
    eps: added to the mean square.
  """
  return _norm_rotate_forward(x, scale, cos, sin, eps)[0]


def _norm_rotate_forward(x, scale, cos, sin, eps):
  batch, length, heads, size = x.shape
  tokens = math.gcd(length, _TOKENS)
  heads_spec, angle, scale_spec = _head_specs(tokens, size)
  kernel = functools.partial(_norm_rotate_kernel, eps=eps)
  half = size // 2
  y = _call(
    kernel,
    (heads, length // tokens, batch),
    [heads_spec, scale_spec, angle, angle],
    heads_spec,
    jax.ShapeDtypeStruct((batch, length, heads, 2, half), x.dtype),
    warps=4,
  )(*_halved(x, scale, cos, sin))
  return y.reshape(x.shape), (x, scale, cos, sin)


def _head_specs(tokens: int, size: int):
  """Returns the blocks of heads, of angles and of the scale."""
  half = size // 2
  return (
    pl.BlockSpec((1, tokens, 1, 2, half), lambda h, i, b: (b, i, h, 0, 0)),
    pl.BlockSpec((1, tokens, half), lambda h, i, b: (b, i, 0)),
    pl.BlockSpec((2, half), lambda h, i, b: (0, 0)),
  )


def _halved(x, scale, cos, sin):
  """Splits heads into the halves that are rotated into each other."""
  half = x.shape[-1] // 2
  # Both halves have the same angles; the second one's sines have no sign.
  return (
    x.reshape(*x.shape[:-1], 2, half),
    scale.reshape(2, half),
    cos[..., half:],
    sin[..., half:],
  )


def _norm_rotate_kernel(x_ref, scale_ref, cos_ref, sin_ref, y_ref, *, eps):
  a, b = _load_halves(x_ref)
  r = _inverse_rms((a, b), eps)
  a, b = a * r * scale_ref[0, :][None], b * r * scale_ref[1, :][None]
  cos, sin = cos_ref[0, :, :], sin_ref[0, :, :]
  y_ref[0, :, 0, 0, :] = (a * cos - b * sin).astype(y_ref.dtype)
  y_ref[0, :, 0, 1, :] = (b * cos + a * sin).astype(y_ref.dtype)


def _load_halves(ref):
  return [ref[0, :, 0, i, :].astype(jnp.float32) for i in (0, 1)]


def _inverse_rms(parts, eps):
  """Returns 1 / rms over the last axes of all parts together, [rows, 1]."""
  size = sum(p.shape[-1] for p in parts)
  squares = sum((p * p).sum(axis=-1, keepdims=True) for p in parts)
  return jax.lax.rsqrt(squares / size + eps)


def _norm_rotate_backward(eps, residuals, grad):
  x, scale, cos, sin = residuals
  batch, length, heads, size = x.shape
  tokens, half = math.gcd(length, _TOKENS), size // 2
  heads_spec, angle, scale_spec = _head_specs(tokens, size)
  grid = heads, length // tokens, batch
  kernel = functools.partial(_norm_rotate_backward_kernel, eps=eps)
  # Each program writes its part of the scale's gradient.
  part = pl.BlockSpec((1, 1, 1, 2, half), lambda h, i, b: (b, i, h, 0, 0))
  parts = (batch, grid[1], heads, 2, half)
  dx, dscale = _call(
    kernel,
    grid,
    [heads_spec, scale_spec, angle, angle, heads_spec],
    (heads_spec, part),
    (
      jax.ShapeDtypeStruct((batch, length, heads, 2, half), x.dtype),
      jax.ShapeDtypeStruct(parts, jnp.float32),
    ),
    warps=4,
  )(*_halved(x, scale, cos, sin), grad.reshape(batch, length, heads, 2, half))
  dscale = dscale.sum(axis=(0, 1, 2)).reshape(size)
  # Positions are data: their angles get no gradient.
  return dx.reshape(x.shape), dscale, jnp.zeros_like(cos), jnp.zeros_like(sin)


def _norm_rotate_backward_kernel(
  x_ref, scale_ref, cos_ref, sin_ref, grad_ref, dx_ref, dscale_ref, *, eps
):
  parts = _load_halves(x_ref)
  r = _inverse_rms(parts, eps)
  dy = _load_halves(grad_ref)
  cos, sin = cos_ref[0, :, :], sin_ref[0, :, :]
  # The transpose of the rotation, then that of the norm.
  rotated = dy[0] * cos + dy[1] * sin, dy[1] * cos - dy[0] * sin
  scales = scale_ref[0, :][None], scale_ref[1, :][None]
  grads, dscales = _norm_gradient(parts, r, rotated, scales)
  for i in (0, 1):
    dx_ref[0, :, 0, i, :] = grads[i].astype(dx_ref.dtype)
    dscale_ref[0, 0, 0, i, :] = dscales[i]


def _norm_gradient(parts, r, grads, scales):
  """Returns the gradients of x and of the scale, from x in parts.

  With n = x r: dx = r (g - n mean(g n)) for g = grad scale.
  """
  size = sum(p.shape[-1] for p in parts)
  normed = [p * r for p in parts]
  scaled = [g * s for g, s in zip(grads, scales, strict=True)]
  products = zip(scaled, normed, strict=True)
  mean = sum((g * n).sum(axis=-1, keepdims=True) for g, n in products) / size
  dx = [r * (g - n * mean) for g, n in zip(scaled, normed, strict=True)]
  dscale = [(g * n).sum(axis=0) for g, n in zip(grads, normed, strict=True)]
  return dx, dscale


norm_rotate.defvjp(_norm_rotate_forward, _norm_rotate_backward)
