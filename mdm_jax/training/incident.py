"""The report on consecutive updates that were not applied (`numerics_report/`).

report.json   losses, gradient norms and metrics per row of these updates,
              recomputed, and which parts of the state are not finite
rows.jsonl    the rows they read, one per line

Skipped updates leave the parameters as they were, so every forward and backward
pass can be repeated with the same rows, masks and dropout. Only an update that
was already dispatched when the last failure was noticed may have changed them.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from mdm_jax.core import files, trees
from mdm_jax.objectives.base import Ratio
from mdm_jax.training.state import TrainState
from mdm_jax.training.step import count_nonfinite
from mdm_jax.training.trainer import Trainer


def write_report(
  folder: epath.PathLike,
  trainer: Trainer,
  state: TrainState,
  updates: list[int],
) -> epath.Path:
  """Recomputes some updates without applying them, and writes the report.

  All processes must call it, since the passes run on all devices; only process
  0 writes.

  Args:
    folder: where to write; created if missing.
    trainer: the run's trainer.
    state: the state with the parameters that the updates were computed from.
    updates: indices of the updates, from 0.

  Returns:
    The path of report.json.
  """
  counts = jax.device_get(jax.jit(count_nonfinite)(state))
  report = {
    "seed": trainer.seed,
    "step": int(state.step),
    "nonfinite": {
      name: _some(getattr(counts, name))
      for name in ("params", "ema_params", "opt_state", "guard")
    },
    "updates": [_describe(trainer, state, update) for update in updates],
  }
  path = epath.Path(folder) / "report.json"
  if jax.process_index() == 0:
    files.make_folder(path.parent)
    text = json.dumps(_strict(report), indent=2, allow_nan=False)
    files.write(path, text.encode())
    lines = [_rows(trainer, update) for update in updates]
    files.write(path.parent / "rows.jsonl", "".join(lines).encode())
  return path


def _describe(trainer: Trainer, state: TrainState, update: int) -> dict:
  stage = trainer.curriculum.stage_at(update)
  found = trainer.diagnose(state.params, update)
  numbers = trainer.row_numbers(update).tolist()
  columns = {k: np.reshape(v, -1).tolist() for k, v in found["by_row"].items()}
  return {
    "update": update,
    "stage": stage.config.name,
    "learning_rate": float(trainer.schedule(update)),
    "loss": float(found["loss"]),
    "gradient_norm": _numbers(found["grad_norm"]),
    "gradient_nonfinite": _some(found["grad_nonfinite"]),
    "summaries": _summaries(found["summaries"], trainer.objective(stage).tags),
    "rows": [
      {"row": n, **{name: column[i] for name, column in columns.items()}}
      for i, n in enumerate(numbers)
    ],
  }


def _summaries(
  ratios: Mapping[str, Ratio], tags: Mapping[str, tuple[str, ...]]
) -> dict[str, dict[str, float]]:
  """Returns totals and counts by log name."""
  found = {}
  for name, ratio in ratios.items():
    parts = zip(*(np.ravel(part).tolist() for part in ratio), strict=True)
    names = tags.get(name, (f"train/{name}",))
    for tag, (total, count) in zip(names, parts, strict=True):
      found[tag] = {"total": total, "count": count}
  return found


def _rows(trainer: Trainer, update: int) -> str:
  """Returns the rows of an update as lines of JSON."""
  stage = trainer.curriculum.stage_at(update)
  rows = trainer.data.stages[stage.index]
  lines = ""
  for number in trainer.row_numbers(update).tolist():
    line = {
      "update": update,
      "row": number,
      **{name: v[number].tolist() for name, v in rows.fields.items()},
    }
    lines += json.dumps(line) + "\n"
  return lines


def _numbers(tree: Any) -> dict[str, Any]:
  return {path: leaf.item() for path, leaf in trees.by_path(tree).items()}


def _some(counts: Any) -> dict[str, int]:
  """Returns the counts above 0, by path."""
  return {path: n for path, n in _numbers(counts).items() if n}


def _strict(value: Any) -> Any:
  """Replaces nan and inf by strings, which strict JSON can hold."""
  if isinstance(value, dict):
    return {key: _strict(item) for key, item in value.items()}
  if isinstance(value, list):
    return [_strict(item) for item in value]
  if isinstance(value, float) and not math.isfinite(value):
    return str(value)  # nan, inf or -inf
  return value
