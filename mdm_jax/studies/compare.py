"""Compares sampling settings of one checkpoint, one change at a time.

Orders, steps and budgets are compared with the same temperature and filters, so
they differ only in which positions a step reveals, and how many. Temperatures
and filters are compared with all else as given. The judge's number, the entropy
and the denoiser calls belong together: settings are better than others if the
judge finds their texts more likely at the same entropy and the same number of
calls.
"""

import dataclasses
from typing import Any

from mdm_jax.config import Config
from mdm_jax.core import modules, tables
from mdm_jax.core.errors import UserError, nearest
from mdm_jax.core.progress import console
from mdm_jax.data import corpora
from mdm_jax.studies import answered, sampled
from mdm_jax.workdir import Workdir

_ORDERS = (
  *("random", "spread", "left_to_right"),
  *("confidence", "margin", "entropy"),
)
_IN_FULL = "random", "spread", "confidence"  # also with one token per step
_STEPS = 12, 24, 48
# What orders start from: the run's own settings of these must not leak in.
_BASE = {"order": "random", "schedule": "linear", "remasking": "none"}
_BASE |= dict.fromkeys(("block_length", "entropy_bound", "threshold"))
_BASE |= {"cache": "none", "cache_refresh": None}


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
  return found | _filters()


def _filters() -> dict[str, dict[str, Any]]:
  """Returns temperatures and filters; all else stays as it is given."""
  found: dict[str, dict[str, Any]] = {"as given": {}}
  for t in (0.6, 0.7, 0.8, 0.9, 1.0, 1.1):
    fields = {"temperature": t, "temperature_range": None}
    found[f"temperature {t:g}"] = fields
  for name, values in {
    "top_p": (0.8, 0.85, 0.95, None),
    "min_p": (0.02, 0.05, 0.1),
    "top_k": (20, 100),
  }.items():
    found |= {f"{name} {value}": {name: value} for value in values}
  return found


def compare_workdir(
  config: Config, workdir: Workdir, only: str = ""
) -> list[dict[str, Any]]:
  """Samples from a run's best checkpoint in many ways.

  Writes ways.csv, ways.md, and ways.png if matplotlib is installed.

  Args:
    config: the run's config, perhaps with other temperature or filters.
    workdir: the run's folder.
    only: compare only the ways whose names contain this.

  Returns:
    The table's rows as plain values; the last one is validation text. For a
    run whose texts have answers, a row says how many answers are right.

  Raises:
    UserError: no way has such a name, or there is no checkpoint.
  """
  if with_answers := corpora.has_answers(config.data):
    known = answered.ways(answered.longest(config, workdir))
  else:
    known = ways(config.sample_length)
  chosen = {name: known[name] for name in known if only in name}
  if not chosen:
    raise UserError(f"--ways={only}: {nearest(only, known)}")
  if with_answers:
    return _answers(config, workdir, chosen)
  found, title = sampled.sample_each(config, workdir, chosen)
  cells = [row.cells for row in found]
  table = tables.as_markdown(sampled.COLUMNS, cells)
  workdir.write("ways.csv", sampled.as_csv(found))
  workdir.write("ways.md", table)
  if modules.has("matplotlib"):
    groups: dict[str, list[sampled.Sampled]] = {}
    for row in found:
      groups.setdefault(_group(row.settings), []).append(row)
    workdir.write("ways.png", sampled.as_png(groups, title))
  else:
    console.print("no ways.png: it needs pip install -e '.[plots]'")
  return [dataclasses.asdict(row) for row in found]


def _answers(
  config: Config, workdir: Workdir, chosen: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
  found, _ = answered.answer_each(config, workdir, chosen)
  cells = [row.cells for row in found]
  workdir.write("ways.csv", sampled.as_csv(found))
  workdir.write("ways.md", tables.as_markdown(answered.COLUMNS, cells))
  return [dataclasses.asdict(row) for row in found]


def _group(name: str) -> str:
  """Returns what a way varies: an order's name, or a filter's."""
  order, comma, _ = name.partition(",")
  return order if comma or name not in _filters() else name.split()[0]
