"""Which positions are revealed first, as a priority: higher is earlier.

`random`, `spread` and `left_to_right` know it without the denoiser. The others
ask it, at every step, how sure it is of a position; they look at its
distribution and never at a token drawn from it, so that one token a step is an
exact sample under any of them (Hayakawa et al. 2025, arXiv 2510.04525).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from mdm_jax.sampling import tokens
from mdm_jax.sampling.config import Order

_STEPS = 4096.0  # of a probability, or of a nat

ASKING: tuple[Order, ...] = ("confidence", "margin", "entropy")


def priority(
  order: Order,
  row_keys: Key[Array, "B"],
  step: Int[Array, ""],
  length: int,
) -> Float[Array, "B {length}"]:
  """Returns the priority of every position under an order that asks nothing.

  Random is drawn anew at every step, as a token that was put back has to be
  drawn for again.
  """
  match order:
    case "random":
      draw = lambda key: jax.random.uniform(
        jax.random.fold_in(key, step), length
      )
      return jax.vmap(draw)(row_keys)
    case "spread":
      return -jax.vmap(lambda key: _spread(key, length))(row_keys)
    case "left_to_right":
      position = jnp.arange(length, dtype=jnp.float32)
      return jax.vmap(lambda _: -position)(row_keys)
  raise ValueError(f"{order} asks the denoiser")


def rounded(scores: Float[Array, "*N"]) -> Float[Array, "*N"]:
  """Returns scores without the digits that rounding errors make.

  On an empty canvas all positions are equally sure but for these errors, which
  depend on the size of the batch and on the mesh.
  """
  return jnp.round(scores * _STEPS) / _STEPS


def score(order: Order, logits: Float[Array, "*N V"]) -> Float[Array, "*N"]:
  """Returns how sure the denoiser is of each position.

  confidence: the largest probability (Chang et al. 2022, arXiv 2202.04200).
  margin: its lead over the second (Kim et al. 2025, arXiv 2502.06768).
  entropy: minus the entropy, in nats.
  """
  match order:
    case "confidence":
      return tokens.top_two(logits)[0]
    case "margin":
      first, second = tokens.top_two(logits)
      return first - second
    case "entropy":
      return -tokens.entropy(logits)
  raise ValueError(f"{order} does not ask the denoiser")


def rank(
  masked: Bool[Array, "B L"],
  block: Int[Array, "L"],
  first: Float[Array, "B L"],
  then: Float[Array, "B L"],
) -> Int[Array, "B L"]:
  """Returns positions: masked before others, then by block and priority.

  Of equal priorities the second one decides, and at last the left position.
  """
  row = lambda masked, first, then: jnp.lexsort((-then, -first, block, ~masked))
  return jax.vmap(row)(masked, first, then)


def _spread(key: Key[Array, ""], length: int) -> Float[Array, "{length}"]:
  """Ranks that keep any first few positions far apart: bit reversal, shifted.

  Source: van der Corput; for decoding, Luxembourg et al. 2025, arXiv 2506.19037
  (dilated unmasking).
  """
  bits = max(length - 1, 1).bit_length()
  shift = jax.random.randint(key, (), 0, 2**bits)
  at = (jnp.arange(length) + shift) % 2**bits
  reverse = sum(((at >> n) & 1) << (bits - 1 - n) for n in range(bits))
  return reverse.astype(jnp.float32)
