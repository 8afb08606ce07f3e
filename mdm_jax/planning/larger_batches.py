"""Which larger batches fit a device, and what to change along with them.

Accelerators are fastest with many tokens per update: small products leave most
of one idle.
"""

import dataclasses
from collections.abc import Callable

from mdm_jax.training.trainer import Recipe

_MOST = 3  # larger updates that are named


@dataclasses.dataclass(frozen=True)
class Batch:
  """An update in one microbatch that fits a device.

  Attributes:
    rows: rows per update.
    tokens: positions per update, of the longest rows.
    bytes: predicted memory per device.
  """

  rows: int
  tokens: int
  bytes: int


def fitting(
  run: Recipe,
  memory: int,
  total: Callable[[Recipe], int],
  most_rows: int | None = None,
) -> list[Batch]:
  """Returns updates in one microbatch that fit a device, smallest first.

  The first one has the run's own rows, if those are in several microbatches and
  fit at once; each of the others has twice the rows of the one before.

  Args:
    run: the run as it is.
    memory: of a device, in bytes.
    total: returns the predicted bytes per device of a run.
    most_rows: rows of the smallest stage, the most for an update, if known.
  """
  found = []
  own = run.accumulation * run.batch_size
  length = max(stage.config.length for stage in run.curriculum.stages)
  for doublings in range(run.accumulation == 1, _MOST + 1):
    rows = own * 2**doublings
    needed = total(_in_one_microbatch(run, rows))
    if needed > memory or (most_rows and rows > most_rows):
      break
    found.append(Batch(rows, rows * length, needed))
  return found


def _in_one_microbatch(run: Recipe, rows: int) -> Recipe:
  names = [field.name for field in dataclasses.fields(Recipe)]
  values = {name: getattr(run, name) for name in names}
  return Recipe(**values | {"accumulation": 1, "batch_size": rows})


def describe(own: int, found: list[Batch]) -> list[str]:
  """Returns at most two lines: the same update at once, and larger ones.

  Args:
    own: rows per update of the run.
    found: as `fitting` returns them.
  """
  lines = []
  gib = lambda batch: f"{batch.bytes / 2**30:.1f} GiB"
  if found and found[0].rows == own:
    lines.append(
      f"all {own} rows of an update fit at once ({gib(found[0])}):"
      f" data.batch_size={own} with optimizer.accumulation=1 gives the same"
      " updates up to rounding, with fewer and larger products"
    )
    found = found[1:]
  if found:
    sizes = ", ".join(
      f"{batch.rows} rows ({gib(batch)}, {batch.tokens:,} tokens)"
      for batch in found
    )
    lines.append(
      f"larger updates that fit: {sizes}; for k times the rows start from"
      " optimizer.learning_rate x sqrt(k), optimizer.warmup_steps / k,"
      " optimizer.ema_decay ^ k (arXiv 2205.10287, 2307.13813); mask rates and"
      " loss weights stay"
    )
  return lines
