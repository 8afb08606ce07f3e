"""Sampling orders: which masked positions are revealed first.

An order gives every position a priority; higher is earlier. `random`, `spread`
and `left_to_right` do not need the denoiser. The others score each position's
distribution at every step. They never look at a token drawn from it, so with
one token per step samples are exact under every order (Hayakawa et al. 2025,
arXiv 2510.04525).

To add an order, register a function:

  @ORDERS.register("outward")
  def outward(key, step, length):
    return -jnp.abs(jnp.linspace(-1, 1, length))
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from mdm_jax.core.registry import Registry
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.sampling import confidence

_LATE = 1000.0  # more than any score
_STEPS = 4096.0  # scores are rounded to 1 / 4096 (a probability, or nats)


# (row key, step, length) -> float32 priorities [length] of a row, where the key
# is the same at every step; or, marked by `from_logits`, logits [..., V] ->
# float32 scores [...]. Higher is earlier.
Order = Callable[..., Float[Array, "..."]]
ORDERS: Registry[Order] = Registry("sampling order", "sample.order")


def from_logits(order: Order) -> Order:
  """Marks an order as a function of the denoiser's logits.

  Example:
    @ORDERS.register("margin")
    @from_logits
    def margin(logits): ...
  """
  order.reads_logits = True
  return order


def reads_logits(order: str) -> bool:
  """Returns whether an order scores positions by the denoiser's logits.

  Raises:
    UserError: there is no such order.
  """
  return getattr(ORDERS[order], "reads_logits", False)


def priority(
  order: str, row_keys: Key[Array, "B"], step: Int[Array, ""], length: int
) -> Float[Array, "B {length}"]:
  """Returns the priorities of an order that does not read logits.

  Args:
    order: name of the order.
    row_keys: one key per row, the same at every step.
    step: number of the step, from 0.
    length: tokens per row.
  """
  of_row = ORDERS[order]
  return jax.vmap(lambda key: of_row(key, step, length))(row_keys)


def ends_last(
  scores: dict[str, Float[Array, "*N"]],
  logits: Float[Array, "*N V"],
  vocab: Vocabulary,
) -> dict[str, Float[Array, "*N"]]:
  """Returns scores at which likely ends of text come after all other tokens.

  Where ends fill up answers, a model is sure of them before it has read the
  answer; an order by confidence then ends answers early.
  """
  late = jnp.where(vocab.is_end(logits.argmax(axis=-1)), _LATE, 0.0)
  return {name: values - late for name, values in scores.items()}


def rounded(scores: Float[Array, "*N"]) -> Float[Array, "*N"]:
  """Returns scores rounded so that rounding errors do not decide the order.

  On an empty canvas all scores are equal up to these errors, which depend on
  the batch size and the mesh.
  """
  return jnp.round(scores * _STEPS) / _STEPS


def rank(
  masked: Bool[Array, "B L"],
  block: Int[Array, "L"],
  first: Float[Array, "B L"],
  then: Float[Array, "B L"],
) -> Int[Array, "B L"]:
  """Returns each row's positions in the order in which to reveal them.

  Args:
    masked: masked positions come before all others.
    block: block of each position; lower ones come first.
    first: priority within a block; higher ones come first.
    then: breaks ties of `first`; remaining ties go from left to right.
  """
  row = lambda masked, first, then: jnp.lexsort((-then, -first, block, ~masked))
  return jax.vmap(row)(masked, first, then)


# MARK: orders by position


@ORDERS.register("random")
def _random(
  key: Key[Array, ""], step: Int[Array, ""], length: int
) -> Float[Array, "{length}"]:
  """Uniform priorities, drawn anew in every step."""
  # With the priorities of the first step, a remasked token, which had a high
  # one, would soon be revealed again.
  return jax.random.uniform(jax.random.fold_in(key, step), length)


@ORDERS.register("spread")
def _spread(
  key: Key[Array, ""], step: Int[Array, ""], length: int
) -> Float[Array, "{length}"]:
  """Keeps the positions of any prefix far apart: shifted bit reversal.

  Source: the van der Corput sequence; for decoding, dilated unmasking,
  Luxembourg et al. 2025, arXiv 2506.19037.
  """
  # In a sequence of 2^bits >= length; unused places are just left out. The
  # shift makes every position equally likely to be first.
  bits = max(length - 1, 1).bit_length()
  shift = jax.random.randint(key, (), 0, 2**bits)
  at = (jnp.arange(length) + shift) % 2**bits
  reverse = sum(((at >> n) & 1) << (bits - 1 - n) for n in range(bits))
  return -reverse.astype(jnp.float32)


@ORDERS.register("left_to_right")
def _left_to_right(
  key: Key[Array, ""], step: Int[Array, ""], length: int
) -> Float[Array, "{length}"]:
  return -jnp.arange(length, dtype=jnp.float32)


# MARK: orders by the denoiser's logits


@ORDERS.register("confidence")
@from_logits
def _confidence(logits: Float[Array, "*N V"]) -> Float[Array, "*N"]:
  """The largest probability (Chang et al. 2022, arXiv 2202.04200)."""
  return confidence.top_two(logits)[0]


@ORDERS.register("margin")
@from_logits
def _margin(logits: Float[Array, "*N V"]) -> Float[Array, "*N"]:
  """Largest minus second probability (Kim et al. 2025, arXiv 2502.06768)."""
  first, second = confidence.top_two(logits)
  return first - second


@ORDERS.register("entropy")
@from_logits
def _entropy(logits: Float[Array, "*N V"]) -> Float[Array, "*N"]:
  """Negative entropy, in nats."""
  return -confidence.entropy(logits)
