"""Which positions are revealed first, as a priority: higher is earlier.

`random`, `spread` and `left_to_right` know it without the denoiser. The others
ask it, at every step, how sure it is of a position; they look at its
distribution and never at a token drawn from it, so that one token a step is an
exact sample under any of them (Hayakawa et al. 2025, arXiv 2510.04525).

An order of your own is a function, registered under a name:

  @ORDERS.register("outward")
  @Known
  def outward(key, step, length):
    return -jnp.abs(jnp.linspace(-1, 1, length))
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from mdm_jax.core.registry import Registry
from mdm_jax.sampling import tokens

_STEPS = 4096.0  # of a probability, or of a nat


@dataclasses.dataclass(frozen=True)
class Known:
  """An order that needs no denoiser.

  Attributes:
    __wrapped__: (the row's key, step, length) -> priorities [length] of a row,
      float32. A row's key is the same at every step.
  """

  __wrapped__: Callable[
    [Key[Array, ""], Int[Array, ""], int], Float[Array, "L"]
  ]


@dataclasses.dataclass(frozen=True)
class Asking:
  """An order by how sure the denoiser is of each position.

  Attributes:
    __wrapped__: logits [..., V] -> scores [...], float32, higher is surer.
  """

  __wrapped__: Callable[[Float[Array, "*N V"]], Float[Array, "*N"]]


ORDERS: Registry[Known | Asking] = Registry("sampling order", "sample.order")


def asks(order: str) -> bool:
  """Returns whether an order asks the denoiser.

  Raises:
    UserError: there is no such order.
  """
  return isinstance(ORDERS[order], Asking)


def priority(
  order: str,
  row_keys: Key[Array, "B"],
  step: Int[Array, ""],
  length: int,
) -> Float[Array, "B {length}"]:
  """Returns the priority of every position under an order that asks nothing."""
  of_row = ORDERS[order].__wrapped__
  return jax.vmap(lambda key: of_row(key, step, length))(row_keys)


def score(order: str, logits: Float[Array, "*N V"]) -> Float[Array, "*N"]:
  """Returns how sure the denoiser is of each position, by an asking order."""
  return ORDERS[order].__wrapped__(logits)


def rounded(scores: Float[Array, "*N"]) -> Float[Array, "*N"]:
  """Returns scores without the digits that rounding errors make.

  On an empty canvas all positions are equally sure but for these errors, which
  depend on the size of the batch and on the mesh.
  """
  return jnp.round(scores * _STEPS) / _STEPS


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


# MARK: orders that need no denoiser


@ORDERS.register("random")
@Known
def _random(
  key: Key[Array, ""], step: Int[Array, ""], length: int
) -> Float[Array, "{length}"]:
  """Drawn anew at every step, as a token that was put back needs a new draw."""
  return jax.random.uniform(jax.random.fold_in(key, step), length)


@ORDERS.register("spread")
@Known
def _spread(
  key: Key[Array, ""], step: Int[Array, ""], length: int
) -> Float[Array, "{length}"]:
  """Keeps any first few positions far apart: bit reversal, shifted.

  Source: van der Corput; for decoding, Luxembourg et al. 2025, arXiv 2506.19037
  (dilated unmasking).
  """
  bits = max(length - 1, 1).bit_length()
  shift = jax.random.randint(key, (), 0, 2**bits)
  at = (jnp.arange(length) + shift) % 2**bits
  reverse = sum(((at >> n) & 1) << (bits - 1 - n) for n in range(bits))
  return -reverse.astype(jnp.float32)


@ORDERS.register("left_to_right")
@Known
def _left_to_right(
  key: Key[Array, ""], step: Int[Array, ""], length: int
) -> Float[Array, "{length}"]:
  return -jnp.arange(length, dtype=jnp.float32)


# MARK: orders that ask the denoiser


@ORDERS.register("confidence")
@Asking
def _confidence(logits: Float[Array, "*N V"]) -> Float[Array, "*N"]:
  """The largest probability (Chang et al. 2022, arXiv 2202.04200)."""
  return tokens.top_two(logits)[0]


@ORDERS.register("margin")
@Asking
def _margin(logits: Float[Array, "*N V"]) -> Float[Array, "*N"]:
  """Its lead over the second (Kim et al. 2025, arXiv 2502.06768)."""
  first, second = tokens.top_two(logits)
  return first - second


@ORDERS.register("entropy")
@Asking
def _entropy(logits: Float[Array, "*N V"]) -> Float[Array, "*N"]:
  """Minus the entropy, in nats."""
  return -tokens.entropy(logits)
