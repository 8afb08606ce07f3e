"""How sure a distribution over tokens is: confidence, margin, entropy.

All are of the model's own distribution, before temperature and filters. Sums
over the vocabulary go block by block, which XLA compiles to faster code.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_BLOCK = 128  # tokens; `Vocabulary.size` is a multiple of it


def top_two(
  logits: Float[Array, "*N V"],
) -> tuple[Float[Array, "*N"], Float[Array, "*N"]]:
  """Returns the two highest probabilities, before temperature and filters.

  The first is a position's confidence, their difference its margin (Kim et al.
  2025, arXiv 2502.06768).

  Raises:
    AssertionError: the logits are not float32.
  """
  assert logits.dtype == jnp.float32, logits.dtype
  return over(_top_two, logits.ndim - 1)(logits)


def entropy(logits: Float[Array, "*N V"]) -> Float[Array, "*N"]:
  """Returns the entropy in nats, before temperature and filters.

  Raises:
    AssertionError: the logits are not float32.
  """
  assert logits.dtype == jnp.float32, logits.dtype
  return over(_entropy, logits.ndim - 1)(logits)


def probability(
  logits: Float[Array, "*N V"], ids: Int[Array, "*N"]
) -> Float[Array, "*N"]:
  """Returns the probability of one token of each distribution."""
  return jnp.exp(log_probability(logits, ids))


def log_probability(
  logits: Float[Array, "*N V"], ids: Int[Array, "*N"]
) -> Float[Array, "*N"]:
  """Returns the log probability of one token of each distribution."""
  chosen = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1)


def _top_two(logits: Float[Array, "V"]):
  blocks = in_blocks(logits)
  peaks = blocks.max(axis=1)
  best = peaks.argmax()
  beside = _without(blocks[best], blocks[best].argmax()).max()
  second = jnp.maximum(beside, _without(peaks, best).max())
  total = _total(jnp.exp(blocks - peaks[best]))
  return 1 / total, jnp.exp(second - peaks[best]) / total


def _entropy(logits: Float[Array, "V"]):
  scores = in_blocks(logits) - logits.max()
  weights = jnp.exp(scores)
  total = _total(weights)
  surprise = jnp.where(weights > 0, weights * scores, 0.0)  # 0 log 0 is 0
  return jnp.log(total) - _total(surprise) / total


def _without(values: Float[Array, "C"], index: Int[Array, ""]):
  return jnp.where(jnp.arange(values.size) == index, -jnp.inf, values)


def _total(values: Float[Array, "M C"]) -> Float[Array, ""]:
  # Kept as two sums: XLA would merge them, and store all terms before summing.
  return jax.lax.optimization_barrier(values.sum(axis=1)).sum()


def in_blocks(logits: Float[Array, "V"]) -> Float[Array, "M C"]:
  size = min(_BLOCK, logits.size)
  filled = jnp.pad(logits, (0, -logits.size % size), constant_values=-jnp.inf)
  return filled.reshape(-1, size)


def over(one: Callable, axes: int) -> Callable:
  """Maps over leading axes; `jnp.vectorize` would lose their sharding."""
  for _ in range(axes):
    one = jax.vmap(one)
  return one
