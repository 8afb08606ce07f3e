"""What does not fit the memory is refused before it is tried.

Bounds from below, of what is largest: whatever else there is only makes it
more. A program that is too large all the same ends in one line, too.
"""

import math

from mdm_jax.core import memory
from mdm_jax.core.errors import UserError

_GIB = 2**30
# Of a token in a text: an id before each step and after the last, and the step,
# probability and entropy it was drawn with.
_ID, _NOTES = 4, 12
# Of a pair of positions in a row and a head: attention's scores and their
# exponentials. cuDNN's kernel has none, and is given no mask.
_SCORES = 8


def check_texts(count: int, length: int, num_steps: int) -> None:
  """Raises UserError for more texts than can be kept with how they came about.

  Args:
    count: texts.
    length: tokens of a text.
    num_steps: that each was drawn in.
  """
  each = ((num_steps + 1) * _ID + _NOTES) * length
  have = memory.of_host()
  if count * each > have:
    raise UserError(
      f"{count:,} texts of {length:,} tokens, kept with their {num_steps}"
      f" steps, take {count * each / _GIB:,.1f} GiB and this machine has"
      f" {have / _GIB:,.1f}; nearest valid: {have // each:,} texts. Without"
      " --trace and --html, --mode=sample keeps none"
    )


def check_length(
  length: int, rows: int, heads: int, kernel: str, have: int
) -> None:
  """Raises UserError for texts that are too long for a device.

  Args:
    length: tokens of a text.
    rows: texts that a device draws at once.
    heads: of attention that it computes.
    kernel: what attention is computed with.
    have: bytes of the device.
  """
  pair = 0 if kernel == "cudnn" else _SCORES * heads
  need = rows * length**2 * pair
  if need > have:
    raise UserError(
      f"sample.length={length}: attention between {length:,} tokens takes"
      f" {need / _GIB:,.1f} GiB at once and this device has"
      f" {have / _GIB:,.1f}; nearest valid: at most"
      f" {math.isqrt(have // (rows * pair))}"
    )
