"""Compares sampling settings of one checkpoint: orders, steps and budgets.

All use the run's temperature and filters, so they differ only in which
positions a step reveals, and how many. The judge's number, the entropy and the
denoiser calls belong together: settings are better than others if the judge
finds their texts more likely at the same entropy and the same number of calls.
"""

import dataclasses
from typing import Any

from mdm_jax.config import Config
from mdm_jax.core import tables
from mdm_jax.core.errors import UserError, nearest
from mdm_jax.studies import sampled
from mdm_jax.workdir import Workdir

_ORDERS = (
  *("random", "spread", "left_to_right"),
  *("confidence", "margin", "entropy"),
)
_IN_FULL = "random", "spread", "confidence"  # also with one token per step
_STEPS = 12, 24, 48
# What every way starts from: the run's own settings of these must not leak in.
_BASE = {"order": "random", "schedule": "linear", "remasking": "none"}
_BASE |= dict.fromkeys(("block_length", "entropy_bound", "threshold"))


def ways(length: int) -> dict[str, dict[str, Any]]:
  """Returns the settings to compare, by name.

  Args:
    length: tokens per text; as many steps reveal one token each.
  """
  found = {}

  def add(order: str, what: str, num_steps: int, **fields: Any) -> None:
    fields = {"order": order, "num_steps": num_steps, **fields}
    found[f"{order}, {what}"] = _BASE | fields

  for order in _ORDERS:
    for n in (*_STEPS, length):
      if n < length or order in _IN_FULL:
        add(order, f"{n} steps", n)
  for schedule in ("cosine", "optimal"):
    for order in ("random", "spread"):
      add(order, f"{schedule}, 24 steps", 24, schedule=schedule)
  for block in (16, 32):
    what = f"blocks of {block}, 24 steps"
    add("confidence", what, 24, block_length=block)
  # With a budget, num_steps is only the upper limit.
  for order, bound in (("entropy", 1), ("entropy", 20), ("spread", 20)):
    add(order, f"entropy bound {bound}", length, entropy_bound=bound)
  for threshold in (0.5, 0.2):
    add("confidence", f"threshold {threshold}", length, threshold=threshold)
  for order, n in (("random", 24), ("spread", 24), ("random", 48)):
    for remasking in ("cap", "conf", "loop"):
      fields = {"remasking": remasking, "remasking_rate": 0.1}
      add(order, f"{remasking} 0.1, {n} steps", n, **fields)
  return found


def compare_workdir(
  config: Config, workdir: Workdir, only: str = ""
) -> list[dict[str, Any]]:
  """Samples from a run's best checkpoint in many ways; writes ways.csv and .md.

  Args:
    config: the run's config, perhaps with other temperature or filters.
    workdir: the run's folder.
    only: compare only the ways whose names contain this.

  Returns:
    The table's rows as plain values; the last one is validation text.

  Raises:
    UserError: no way has such a name, or there is no checkpoint.
  """
  known = ways(config.sample_length)
  chosen = {name: known[name] for name in known if only in name}
  if not chosen:
    raise UserError(f"--ways={only}: {nearest(only, known)}")
  found, _ = sampled.sample_each(config, workdir, chosen)
  cells = [row.cells for row in found]
  table = tables.as_markdown(sampled.COLUMNS, cells)
  workdir.write("ways.csv", sampled.as_csv(found))
  workdir.write("ways.md", table)
  return [dataclasses.asdict(row) for row in found]
