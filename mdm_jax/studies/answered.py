"""Compares sampling settings by the answers to held-out prompts.

Unlike of free text, it is known of an answer whether it is right. All settings
answer the same validation prompts, so their errors are of the same sample.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from mdm_jax import sample
from mdm_jax.config import Config
from mdm_jax.core import tables
from mdm_jax.core.progress import console, with_error
from mdm_jax.core.standard_errors import mean
from mdm_jax.data import splits
from mdm_jax.measured_text import open_rows
from mdm_jax.sampled_answers import (
  canvas,
  compare,
  questions,
  row_length,
  task_of,
)
from mdm_jax.studies.sampled import possible
from mdm_jax.workdir import Workdir

COLUMNS = "settings", "calls", "right", "length", "same length"
_ORDERS = (
  *("random", "spread", "left_to_right"),
  *("confidence", "margin", "entropy"),
)
_BASE = {"schedule": "linear", "remasking": "none", "end_last": False}
_BASE |= dict.fromkeys(("block_length", "entropy_bound", "threshold"))
_BASE |= {"cache": "none", "cache_refresh": None}


@dataclasses.dataclass(frozen=True)
class Row:
  """How answers are that were drawn with the same settings.

  Attributes:
    settings: name of the settings.
    calls: denoiser calls, mean over the answers.
    right: share of answers that solve the task, or are the true one if the
      corpus is no task.
    right_stderr: its standard error.
    length: tokens of an answer, with its end, mean.
    same_length: share of answers as long as the true one.
    n: number of prompts.
  """

  settings: str
  calls: float
  right: float
  right_stderr: float
  length: float
  same_length: float
  n: int

  @property
  def cells(self) -> tuple[str, ...]:
    """The row of a table with `COLUMNS`."""
    return (
      self.settings,
      f"{self.calls:.1f}",
      with_error(self.right, self.right_stderr),
      f"{self.length:.2f}",
      f"{self.same_length:.3f}",
    )


def ways(answer: int) -> dict[str, dict[str, Any]]:
  """Returns the settings to compare, by name.

  Args:
    answer: tokens of the longest answer; as many steps draw one token each.
  """
  found: dict[str, dict[str, Any]] = {"as given": {}}

  def add(order: str, what: str, num_steps: int, **fields: Any) -> None:
    fields = {"order": order, "num_steps": num_steps, **fields}
    found[f"{order}, {what}"] = _BASE | fields

  for share in (1, 2, 4):
    steps = math.ceil(answer / share)
    for order in _ORDERS:
      add(order, f"{steps} steps", steps)
  half = math.ceil(answer / 2)
  for order in ("confidence", "entropy"):
    for steps in (answer, half):
      add(order, f"ends last, {steps} steps", steps, end_last=True)
  for order in ("random", "confidence"):
    add(order, f"cosine, {half} steps", half, schedule="cosine")
  # With a budget, num_steps is only the upper limit.
  for threshold in (0.5, 0.9, 0.99):
    add("confidence", f"threshold {threshold}", answer, threshold=threshold)
  for bound in (0.1, 1.0):
    add("entropy", f"entropy bound {bound:g}", answer, entropy_bound=bound)
  return found


def answer_each(
  config: Config, workdir: Workdir, settings: Mapping[str, Mapping[str, Any]]
) -> tuple[list[Row], str]:
  """Answers validation prompts with each of several settings.

  Prints the table, because writing it may fail.

  Args:
    config: the run's config, perhaps with other settings.
    workdir: the run's folder.
    settings: by name, the fields of `SampleConfig` to change.

  Returns:
    A row for each of the settings that the model can follow, and a title.
  """
  data, config = open_rows(config, workdir)
  asked = questions(data.validation, config.eval.samples)
  task = task_of(config.data, splits.VALIDATION)
  model, found = sample.load(workdir, config=config), []
  open_end = model.method.block is not None
  length = row_length(config, data, open_end)
  rows = canvas(asked, length, data.tokenizer.vocab, open_end)
  for name, changed in possible(model, settings).items():
    drawn = model.fill(rows.tokens, rows.free, rows.lengths, **changed)
    answered = compare(asked, drawn, data.tokenizer, task)
    metrics = answered.metrics()
    right = metrics.get("right", metrics["exact"])
    shares = metrics["length"].value, metrics["same_length"].value
    calls = mean(answered.calls).value
    found.append(
      Row(name, calls, right.value, right.stderr, *shares, len(asked))
    )
    console.print(f"{len(found)}: {name}", soft_wrap=True)
  title = (
    f"answers to {len(asked)} validation prompts; true ones have"
    f" {metrics['true_length'].value:.2f} tokens"
  )
  cells = [row.cells for row in found]
  console.print(tables.for_terminal(COLUMNS, cells, title))
  return found, title


def longest(config: Config, workdir: Workdir) -> int:
  """Returns the tokens of the longest validation answer."""
  data, config = open_rows(config, workdir)
  asked = questions(data.validation, config.eval.samples)
  return max(len(one.answer) for one in asked)
