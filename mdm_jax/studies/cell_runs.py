"""Trains and measures the cells of the study of repeated text.

Each cell is a run in a folder of its own, which can be killed and resumed like
any other; what was measured is stored there as cell.json.
"""

import dataclasses
import json
import pathlib
import resource
from typing import Any

from ml_collections import config_dict

from mdm_jax import config as config_lib
from mdm_jax import evaluate, likelihood
from mdm_jax.core import strict_json
from mdm_jax.core.errors import Stopped, UserError
from mdm_jax.core.progress import console
from mdm_jax.objectives.measured import BITS, from_json
from mdm_jax.studies.cell_text import Text
from mdm_jax.studies.cells import Cell, Preset, from_plain, plain
from mdm_jax.training.hooks import Hook
from mdm_jax.training.state import TrainState
from mdm_jax.training_loop import train_and_evaluate
from mdm_jax.workdir import Workdir

_BITS = "validation/bits_per_byte"
# A run ends early when it has made this many times the updates of its best
# checkpoint, but not in this share of its updates after the last stage began:
# in the recipe's first stages the loss on whole text may rise.
_PATIENCE, _NEVER_BEFORE = 2.0, 0.1
# Autoregressive runs are best many updates sooner, so they are evaluated more
# often: else their best checkpoint would be missed.
_AR_EVALUATIONS = 4
_SPENT = "cpu_seconds.json"
_MASKED_INPUTS = (0.0, 0.3)  # range of rates, for the arm that has them


# MARK: the config


def config_of(cell: Cell, preset: Preset, text: Text) -> config_dict.ConfigDict:
  """Returns the config of a cell's run."""
  config = config_lib.default_config()
  size, setting = preset.sizes[cell.size], cell.setting
  config.name, config.seed = cell.name, cell.seed
  file = lambda name: f"text:{text.folder / name}.jsonl"
  config.data.update(
    corpus=file(f"train_1_{cell.part}"),
    validation_corpus=file("validation"),
    test_corpus=file("test"),
    batch_size=preset.batch,
  )
  config.tokenizer.kind = "char"
  config.model.update(
    num_layers=size.layers,
    embed_dim=size.width,
    num_heads=size.heads,
    dropout=setting.dropout,
  )
  # The learning rate stays constant and the parameters are averaged, so every
  # point of a curve is the end of a run of that length: with a decay, the best
  # checkpoint of a run that overfits would be one of a high learning rate.
  config.optimizer.update(
    learning_rate=preset.rate * setting.rate,
    warmup_steps=preset.warmup,
    min_lr_ratio=1.0,
    weight_decay=setting.decay,
    ema_decay=preset.ema,
  )
  _set_objective(config, cell.arm, preset)
  is_ar = config.objective.name == "autoregressive"
  evaluations = preset.evaluations * (_AR_EVALUATIONS if is_ar else 1)
  every = max(preset.updates // evaluations, 1)
  # A checkpoint is saved at each evaluation, and else when a signal comes.
  config.train.update(
    log_every=every, checkpoint_every=10 * preset.updates, keep_latest=1
  )
  config.eval.update(
    every=every,
    rows=preset.rows[0],
    final_rows=preset.rows[1],
    masks_per_row=4,
    samples=0,
  )
  config.sample.update(num_samples=1, length=8)
  return config


def _set_objective(
  config: config_dict.ConfigDict, arm: str, preset: Preset
) -> None:
  part = lambda share, **more: config_lib.stage(
    length=preset.length, updates=max(round(preset.updates * share), 1), **more
  )
  whole = (part(1.0),)
  match arm:
    case "ar":
      config.objective.name, config.stages = "autoregressive", whole
    case "ar_masked":
      config.objective.update(
        name="autoregressive", input_mask_rate=_MASKED_INPUTS
      )
      config.stages = whole
    case "plain":
      config.objective.weighting, config.stages = "nelbo", whole
    case "recipe":
      # Stages, mask rates and rehearsal are configs/quickstart.py's; so are the
      # shares of the updates. Limits in words fit rows of characters.
      words = preset.length // 6
      config.stages = (
        part(
          *(0.12,),
          unit="sentences",
          min_words=3,
          max_words=words,
          easiest=1 / 3,
          mask_rate=(0.75, 0.90),
          rehearsal=0.5,
        ),
        part(
          *(0.09,),
          unit="pairs",
          min_words=3,
          max_words=words,
          easiest=2 / 3,
          mask_rate=(0.40, 0.60),
          rehearsal=0.5,
        ),
        part(0.79, mask_rate=(0.05, 0.20), rehearsal=0.8),
      )


# MARK: running a cell


def run(
  cell: Cell, preset: Preset, text: Text, folder: pathlib.Path
) -> dict[str, Any]:
  """Trains and measures a cell, or what is left of it; returns cell.json.

  Args:
    cell: what to run.
    preset: the study.
    text: its text.
    folder: of all cells.

  Raises:
    Stopped: a signal came; the next call resumes.
  """
  workdir = Workdir(folder / cell.name)
  config = config_lib.from_config_dict(config_of(cell, preset, text))
  start = _cpu_seconds() - (workdir.read(_SPENT) or {"seconds": 0.0})["seconds"]
  stop = _StopWhenOverfitting(workdir, _least(config), config.eval.every)
  quiet, console.quiet = console.quiet, True
  try:
    try:
      if stop.reason() is None:
        results = train_and_evaluate(config, workdir, [stop])
      else:  # killed between the end of the training and cell.json
        results = evaluate.evaluate_workdir(config, workdir)
    except Stopped:
      if stop.reason() is None:
        raise
      results = evaluate.evaluate_workdir(config, workdir)
    chain = None
    if config.objective.name == "masked":
      chain = likelihood.measure_workdir(config, workdir, "chain")
  finally:
    console.quiet = quiet
    if workdir.path.is_dir():  # not where the config was refused
      workdir.write(_SPENT, {"seconds": _cpu_seconds() - start})
  measured = _what(cell, preset, text)
  measured |= _measured(results, chain, workdir, cell, preset, text)
  measured["cpu_seconds"] = round(_cpu_seconds() - start, 1)
  workdir.write("cell.json", strict_json.plain(measured))
  return measured


def _least(config: config_lib.Config) -> float:
  """Returns the updates before which a run doesn't end."""
  updates = [stage.updates for stage in config.stages]
  return sum(updates[:-1]) + _NEVER_BEFORE * sum(updates)


def finished(
  preset: Preset, text: Text, folder: pathlib.Path
) -> dict[Cell, dict[str, Any]]:
  """Returns cell.json of every finished cell in a folder, by cell.

  Raises:
    UserError: one was run with another text or other settings.
  """
  made = {}
  for path in sorted(folder.glob("*/cell.json"), key=_age):
    found = json.loads(path.read_text())
    cell = from_plain(found["cell"])
    what = _what(cell, preset, text)
    made[cell] = _checked(found, what, Workdir(path.parent))
  return made


def published(
  file: pathlib.Path, preset: Preset, text: Text
) -> dict[Cell, dict[str, Any]]:
  """Returns the cells of a study.json, by cell: a study goes on from there.

  Their runs may be on another machine, or gone. Cells of another text, or with
  other settings of the study, are left out; a line says so.

  Args:
    file: study.json; it may be missing.
    preset: the study.
    text: its text.
  """
  if not file.is_file():
    return {}
  made = {}
  every = json.loads(file.read_text())["cells"]
  for found in every:
    cell = from_plain(found["cell"])
    fits = cell.size in preset.sizes and cell.part in preset.parts
    if fits and _difference(found, _what(cell, preset, text)) is None:
      made[cell] = found
  if other := len(every) - len(made):
    console.print(
      f"{file} has {other} cells of another text or with other settings; they"
      " are left out and will be overwritten",
      soft_wrap=True,
    )
  return made


def _age(path: pathlib.Path) -> float:
  return path.stat().st_mtime


def _what(cell: Cell, preset: Preset, text: Text) -> dict[str, Any]:
  """Returns all that a cell's result depends on."""
  shared = dataclasses.asdict(preset)
  kept = "updates", "length", "batch", "rate", "evaluations", "rows"
  kept += "warmup", "ema"
  return {
    "cell": plain(cell),
    "size": shared["sizes"][cell.size],
    "run": json.loads(json.dumps({name: shared[name] for name in kept})),
    "text": text.sha256,
    "characters": text.characters[f"train_1_{cell.part}"],
  }


def _checked(
  found: dict[str, Any], what: dict[str, Any], workdir: Workdir
) -> dict[str, Any]:
  if name := _difference(found, what):
    raise UserError(
      f"{workdir.path} was run with another {name}: {found.get(name)}, now"
      f" {what[name]}; give another --workdir"
    )
  return found


def _difference(found: dict[str, Any], what: dict[str, Any]) -> str | None:
  """Returns what a cell was run with that is different now, if anything."""
  return next((n for n, value in what.items() if found.get(n) != value), None)


def _measured(
  results: dict[str, Any],
  chain: dict[str, Any] | None,
  workdir: Workdir,
  cell: Cell,
  preset: Preset,
  text: Text,
) -> dict[str, Any]:
  bits = next(iter(from_json(results).with_role(BITS).values()))
  found = {
    "updates": results["updates"],
    "best_update": results["checkpoint"],
    "bits_per_byte": {"value": bits.value, "stderr": bits.error},
    "is_bound": bits.bound,
    "baselines": {
      name: line["bits_per_byte"] for name, line in results["baselines"].items()
    },
  }
  if chain:
    found["chain_rule"] = chain["bits_per_byte"]
  tokens = preset.batch * preset.length
  read = lambda update: (
    update * tokens / text.characters[f"train_1_{cell.part}"]
  )
  curve = _curve(workdir)
  found["curve"] = [[read(update), loss] for update, loss in curve]
  found["validation"] = min(loss for _, loss in curve)
  return found


def _curve(workdir: Workdir) -> list[tuple[int, float]]:
  """Returns update and bits per byte of each validation."""
  lines = workdir.read_metrics()
  return [(line["step"], line[_BITS]) for line in lines if _BITS in line]


class _StopWhenOverfitting(Hook):
  """Ends a run that has long passed its best checkpoint.

  All that it decides by is in the run's log, so a resumed run decides alike.
  """

  def __init__(self, workdir: Workdir, least: float, every: int):
    self._workdir, self._least, self._every = workdir, least, every
    self._reason: str | None = None

  def wants_state(self, done: int) -> bool:
    return done % self._every == 0

  def on_evaluate(self, done: int, state: TrainState) -> None:
    self._reason = self.reason()

  def should_stop(self, done: int) -> str | None:
    return self._reason

  def reason(self) -> str | None:
    """Returns why to stop, or None, by the validations in the log."""
    curve = _curve(self._workdir)
    if not curve:
      return None
    done, _ = curve[-1]
    best, _ = min(curve, key=lambda point: point[1])
    over = done >= max(_PATIENCE * best, self._least)
    return f"overfits since update {best}" if over else None


def _cpu_seconds() -> float:
  used = resource.getrusage(resource.RUSAGE_SELF)
  return used.ru_utime + used.ru_stime
