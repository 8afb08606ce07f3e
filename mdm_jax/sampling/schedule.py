"""How many tokens each step reveals."""

from jaxtyping import Array, Int


def revealed_before(
  step: int | Int[Array, ""], num_steps: int, total: Int[Array, "B"]
) -> Int[Array, "B"]:
  """Returns how many of each row's tokens the steps before `step` reveal.

  The same number every step up to rounding: all of them after `num_steps`, and
  never more than `most_revealed` in one.
  """
  return step * total // num_steps


def most_revealed(num_steps: int, length: int) -> int:
  """Returns the most tokens that any step reveals in a row of `length`."""
  return -(-length // num_steps)
