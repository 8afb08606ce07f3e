"""Cross-entropy in one pass over the logits, for GPUs.

There the time of a loss is that of reading its logits. The maximum and the sum
of exponentials come from one reduction, which rescales the sum when the maximum
changes (Milakov and Gimelshein 2018, arXiv 1805.02867).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mdm_jax.core.sharding import RULES, vocab_ids
from mdm_jax.core.vocabulary import Vocabulary


def over_vocabulary():
  """Returns the sum and the maximum over tensor shards, as two functions."""
  if RULES.vocab not in jax.sharding.get_abstract_mesh().manual_axes:
    return (lambda x: x,) * 2
  return (
    functools.partial(jax.lax.psum, axis_name=RULES.vocab),
    functools.partial(jax.lax.pmax, axis_name=RULES.vocab),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def cross_entropy(
  logits: Float[Array, "N V"],
  targets: Int[Array, "N"],
  vocab: Vocabulary,
  label_smoothing: float,
) -> Float[Array, "N"]:
  """Returns the same as `cross_entropy.cross_entropy`."""
  return _forward(logits, targets, vocab, label_smoothing)[0]


def _forward(logits, targets, vocab, label_smoothing):
  ids = vocab_ids(logits.shape[-1])[None]
  parts = [logits, jnp.ones_like(logits)]
  parts.append(jnp.where(ids == targets[:, None], logits, 0.0))
  if label_smoothing:
    parts.append(jnp.where(vocab.is_predictable(ids), logits, 0.0))
  # Finite, not -inf: the difference of two maxima must not be NaN.
  starts = [jnp.float32(-1e30), *[jnp.float32(0)] * (len(parts) - 1)]
  found = jax.lax.reduce(tuple(parts), tuple(starts), _merge, (1,))
  total, largest = over_vocabulary()
  highest = largest(found[0])
  log_z = jnp.log(total(found[1] * jnp.exp(found[0] - highest))) + highest
  loss = log_z - (1 - label_smoothing) * total(found[2])
  if label_smoothing:
    loss -= label_smoothing / vocab.predictable * total(found[3])
  return loss, (logits, targets, log_z)


def _merge(a, b):
  """Merges (maximum, sum of exponentials below it, plain sums) of two parts."""
  highest = jnp.maximum(a[0], b[0])
  exp = a[1] * jnp.exp(a[0] - highest) + b[1] * jnp.exp(b[0] - highest)
  return highest, exp, *(x + y for x, y in zip(a[2:], b[2:], strict=True))


def _backward(vocab, label_smoothing, residuals, grad):
  logits, targets, log_z = residuals
  ids = vocab_ids(logits.shape[-1])[None]
  wanted = jnp.where(ids == targets[:, None], 1 - label_smoothing, 0.0)
  if label_smoothing:
    share = label_smoothing / vocab.predictable
    wanted += jnp.where(vocab.is_predictable(ids), share, 0.0)
  return grad[:, None] * (jnp.exp(logits - log_z[:, None]) - wanted), None


cross_entropy.defvjp(_forward, _backward)
