"""Gradients written by hand for XLA's CPU compiler."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float


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
