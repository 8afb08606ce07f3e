"""Memory checks: refuses samples that cannot fit before drawing any.

The estimates are lower bounds that count only the largest arrays. What passes
and still runs out of memory also ends with a one-line error (`core/memory.py`).
"""

import math

from mdm_jax.core import memory
from mdm_jax.core.errors import UserError

_GIB = 2**30
# Bytes per token: its id in every entry of `Samples.path`; and its step,
# confidence and entropy.
_ID, _NOTES = 4, 12
# Bytes per pair of positions and head: float32 attention scores and their
# exponentials. cuDNN's kernel stores neither, and the sampler's rows, which are
# not packed, need no mask there.
_SCORES = 8


def check_texts(count: int, length: int, num_steps: int) -> None:
  """Raises UserError if texts and their paths exceed the host's memory.

  Args:
    count: number of texts.
    length: tokens per text.
    num_steps: sampling steps.
  """
  each = ((num_steps + 1) * _ID + _NOTES) * length
  have = memory.of_host()
  if count * each > have:
    raise UserError(
      f"{count:,} texts of {length:,} tokens, kept with all {num_steps} steps,"
      f" need {count * each / _GIB:,.1f} GiB and this machine has"
      f" {have / _GIB:,.1f}; nearest valid: {have // each:,} texts. Without"
      " --trace and --html, --mode=sample keeps no steps"
    )


def check_length(
  length: int, rows: int, heads: int, kernel: str, have: int
) -> None:
  """Raises UserError if attention scores exceed a device's memory.

  Args:
    length: tokens per text.
    rows: texts that the device draws at once.
    heads: attention heads that it computes.
    kernel: name of the attention kernel.
    have: memory of the device in bytes.
  """
  pair = 0 if kernel == "cudnn" else _SCORES * heads
  need = rows * length**2 * pair
  if need > have:
    raise UserError(
      f"sample.length={length}: attention over {length:,} tokens needs"
      f" {need / _GIB:,.1f} GiB at once and this device has"
      f" {have / _GIB:,.1f}; nearest valid: at most"
      f" {math.isqrt(have // (rows * pair))}"
    )
