"""Drawing tokens from logits: temperature, then top-k, then top-p."""

import jax
import jax.numpy as jnp
from absl import logging
from jaxtyping import Array, Float, Int, Key

from mdm_jax.core.config import SampleConfig


def effective_temperature(config: SampleConfig) -> float:
  """Returns the temperature clamped to its range, and says if that bites."""
  if config.temperature_range is None:
    return config.temperature
  low, high = config.temperature_range
  clamped = min(max(config.temperature, low), high)
  if clamped != config.temperature:
    logging.warning(
      "sample.temperature=%g is clamped to %g by sample.temperature_range="
      "(%g, %g); None switches the clamp off",
      config.temperature,
      clamped,
      low,
      high,
    )
  return clamped


def truncate(
  logits: Float[Array, "*N V"],
  temperature: float,
  top_k: int | None,
  top_p: float | None,
) -> tuple[Float[Array, "*N C"], Int[Array, "*N C"]]:
  """Returns the candidates' logits, -inf where cut off, and their ids.

  Temperature divides the logits; top-k keeps the k likeliest; top-p keeps, of
  those, the likeliest that together reach the mass p, the token that crosses
  it included (Holtzman et al. 2020, arXiv 1904.09751).
  """
  vocab = logits.shape[-1]
  logits = logits / temperature
  if top_k is None and top_p is None:
    ids = jnp.broadcast_to(jnp.arange(vocab), logits.shape)
    return logits, ids
  logits, ids = jax.lax.top_k(logits, min(top_k or vocab, vocab))
  if top_p is not None:
    probs = jax.nn.softmax(logits, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    logits = jnp.where(before < top_p, logits, -jnp.inf)
  return logits, ids


def draw(
  keys: Key[Array, "B"],
  logits: Float[Array, "B N V"],
  temperature: float = 1.0,
  top_k: int | None = None,
  top_p: float | None = None,
) -> Int[Array, "B N"]:
  """Draws one token for each of N positions of each row, in float32.

  The default Gumbel of JAX ends at 16 and would cut the tail of a large
  vocabulary off; mode="high" reaches 32.
  """
  assert logits.dtype == jnp.float32, logits.dtype
  logits, ids = truncate(logits, temperature, top_k, top_p)
  choose = lambda key, row: jax.random.categorical(key, row, mode="high")
  choice = jax.vmap(choose)(keys, logits)
  return jnp.take_along_axis(ids, choice[..., None], axis=-1)[..., 0]
