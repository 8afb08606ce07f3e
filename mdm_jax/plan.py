"""Plans a run before it trains: stages, updates, time, scaling laws.

  python -m mdm_jax.plan --config=configs/quickstart.py

is short for `python -m mdm_jax.main --mode=plan`; with `--json` the last line
is the plan as JSON.
"""

import math
import runpy
import sys
from typing import Any

import jax
from clu import parameter_overview
from rich import box
from rich.table import Table

from mdm_jax.blueprint import make_trainer
from mdm_jax.config import Config
from mdm_jax.core import determinism
from mdm_jax.core.progress import console, duration
from mdm_jax.core.sharding import data_shards, padded_rows
from mdm_jax.data.prepared import prepare
from mdm_jax.data.stage_rows import stage_name
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.model.kernel_choice import Choice
from mdm_jax.model.placement import training_mesh
from mdm_jax.planning import (
  calibration,
  footprint,
  larger_batches,
  scaling_laws,
)
from mdm_jax.training.curriculum import StagePlan
from mdm_jax.training.trainer import Trainer


def plan_run(config: Config) -> dict[str, Any]:
  """Prints the plan of a run and returns it, see `make_plan`."""
  data = prepare(config.rows)
  mesh = training_mesh(config.mesh, config.model)
  with jax.set_mesh(mesh):
    return show_plan(config, make_trainer(config, data, mesh))


def show_plan(
  config: Config, trainer: Trainer, after: int = 0
) -> dict[str, Any]:
  """Prints a table of the parameters and the plan; returns `make_plan`'s."""
  table = _parameters(trainer.denoiser)
  console.print(table, soft_wrap=True, markup=False, highlight=False)
  plan = make_plan(config, trainer, after)
  show(plan)
  return plan


def make_plan(
  config: Config, trainer: Trainer, after: int = 0
) -> dict[str, Any]:
  """Returns the plan of a run, timing a few updates on the current mesh.

  The trial has a training state of its own, which is freed: call this before
  the run's state exists.

  Args:
    config: the run's config.
    trainer: makes its updates.
    after: updates already made.

  Returns:
    What `--json` prints:
      name, corpus: of the run, and of its training text.
      devices: their kind, and the mesh.
      params: number of parameters of the denoiser.
      vocabulary: number of ids, padding of the table included.
      rows_per_update: the effective batch size.
      held_out_rows: number of validation rows.
      stages: of each stage, see `_stage`.
      unique_tokens: tokens in the rows of the largest stage.
      tokens: tokens that all updates read, repeats included.
      laws: what scaling laws predict, see `scaling_laws.forecast`.
      notes: sentences on how the run uses these devices.
      warnings: sentences.
      seconds: of all updates left, without evaluations and saves.
  """
  mesh = trainer.mesh
  params = num_params(trainer.denoiser)
  seconds = calibration.update_seconds(trainer, after)
  stages = [
    _stage(config, trainer, stage, params, seconds.get(stage.index), after)
    for stage in trainer.curriculum.stages
  ]
  # All stages read one corpus, so their tokens are not added up.
  unique = max(stage["tokens"] for stage in stages)
  tokens = sum(stage["tokens"] * stage["epochs"] for stage in stages)
  sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
  return {
    "name": config.name,
    "corpus": config.data.corpus,
    "devices": f"{mesh.devices.flat[0].device_kind}: {sizes}",
    "params": params,
    "vocabulary": trainer.denoiser.vocab.size,
    "rows_per_update": config.rows_per_update,
    "held_out_rows": len(trainer.data.validation),
    "stages": stages,
    "unique_tokens": unique,
    "tokens": round(tokens),
    "laws": scaling_laws.forecast(params, unique, tokens / unique),
    "notes": _notes(config, trainer),
    "warnings": config.objective.warnings([s.objective for s in config.stages]),
    "seconds": sum(stage["seconds"] or 0.0 for stage in stages),
  }


def _stage(
  config: Config,
  trainer: Trainer,
  stage: StagePlan,
  params: int,
  update_seconds: float | None,
  after: int,
) -> dict[str, Any]:
  """Returns what a stage is going to do.

  `objective` describes the objective in a few words, `tokens` counts those in
  the stage's rows, `flops` is 6 N D for N parameters and D tokens, `seconds` is
  the time of the updates left, None for a stage that is over.
  """
  s = stage.config
  tokens = trainer.data.manifest["rows"][stage_name(stage.index)]["tokens"]
  epochs = stage.updates * config.rows_per_update / stage.rows
  # A resumed run has only a part of its current stage left.
  left = stage.end - max(stage.start, after)
  return {
    "name": s.name,
    "unit": s.unit,
    "length": s.length,
    "objective": s.objective.describe(),
    "rows": stage.rows,
    "tokens": tokens,
    "epochs": epochs,
    "updates": stage.updates,
    "flops": scaling_laws.training_flops(params, tokens * epochs),
    "seconds": None if update_seconds is None else left * update_seconds,
  }


def num_params(denoiser: Denoiser) -> int:
  """Returns the number of parameters of a denoiser."""
  return int(parameter_overview.count_parameters(_shapes(denoiser)))


def _parameters(denoiser: Denoiser) -> str:
  """Returns a table of the parameters' names, shapes and shardings.

  On a terminal that is too narrow for it, without the shardings.
  """
  # By default clu adds means and deviations, for which it needs values;
  # shardings it reads off shapes.
  shapes, table = _shapes(denoiser), parameter_overview.get_parameter_overview
  whole = table(shapes, include_stats="sharding")
  if not console.is_terminal or len(whole.split("\n")[0]) <= console.width:
    return whole
  narrow = table(shapes, include_stats=False)
  return f"{narrow}\na wider terminal also shows how they are sharded"


def _shapes(denoiser: Denoiser):
  return jax.eval_shape(denoiser.init, jax.random.key(0))


def _notes(config: Config, trainer: Trainer) -> list[str]:
  """Returns sentences on kernels, padding, batches and determinism."""
  by_choice: dict[str, list[str]] = {}
  for length, choice in _attention(trainer):
    by_choice.setdefault(str(choice), []).append(str(length))
  lines = [
    choice + (f" (length {', '.join(at)})" if len(by_choice) > 1 else "")
    for choice, at in by_choice.items()
  ]
  rows, mesh = trainer.batch_size, trainer.mesh
  padding = padded_rows(rows, mesh) - rows
  if padding:
    lines.append(
      f"{rows} rows per microbatch on {data_shards(mesh)} data shards:"
      f" {padding} padding rows are added, computed but not counted"
    )
  every = config.optimizer.every
  if every > 1:
    lines.append(_steps(every, trainer.curriculum.updates))
  lines += _lora(trainer) + _larger_batches(trainer)
  return [*lines, determinism.promise(jax.default_backend())]


def _attention(trainer: Trainer) -> list[tuple[int, Choice]]:
  """Returns the rows' lengths in all stages, each with its kernel."""
  found = {
    (s.config.length, trainer.objective(s).cost().visibility)
    for s in trainer.curriculum.stages
  }
  kinds = sorted(found, key=lambda pair: (pair[0], pair[1].kind))
  return [(n, trainer.denoiser.attention(n, kind)) for n, kind in kinds]


def _lora(trainer: Trainer) -> list[str]:
  """Describes what LoRA saves; nothing without it."""
  if not trainer.has_base:
    return []
  mesh, full = trainer.mesh.abstract_mesh, trainer.without_lora()
  with_scores = footprint.hold_scores(c.name for _, c in _attention(trainer))
  found = [
    footprint.footprint(run, mesh, with_scores) for run in (trainer, full)
  ]
  counts = [sum(math.prod(p.shape) for p in f.params) for f in found]
  ours, theirs = (f"{f.total / 2**30:.2f} GiB" for f in found)
  stage = trainer.curriculum.stages[-1]
  share = trainer.update_flops(stage) / full.update_flops(stage)
  rank = trainer.denoiser.config.lora.rank
  return [
    f"LoRA of rank {rank}: {counts[0]:,} parameters are trained beside"
    f" {counts[1]:,}; an update needs {ours} per device at its peak (all"
    f" trained: {theirs}) and {share:.2f} of the FLOPs"
  ]


def _larger_batches(trainer: Trainer) -> list[str]:
  """Describes larger batches that fit; nothing where memory is not known."""
  memory = _memory()
  if memory is None:
    return []
  mesh = trainer.mesh.abstract_mesh
  with_scores = footprint.hold_scores(c.name for _, c in _attention(trainer))
  total = lambda run: footprint.footprint(run, mesh, with_scores).total
  most = min(stage.rows for stage in trainer.curriculum.stages)
  found = larger_batches.fitting(trainer, memory, total, most)
  own = trainer.accumulation * trainer.batch_size
  return larger_batches.describe(own, found)


def _memory() -> int | None:
  """Returns the bytes that JAX may use on a device, if it knows them."""
  # Not on a CPU, where large batches gain nothing.
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get("bytes_limit")


def _steps(every: int, updates: int) -> str:
  """Describes the steps of an optimizer that does not step every update."""
  steps, left = divmod(updates, every)
  return (
    f"optimizer.every={every}: {steps:,} steps, each with the mean"
    f" gradient of {every} updates and the learning rate of the last of them"
    + (f"; the gradients of the last {left} updates are not used" * (left > 0))
  )


# MARK: printing


def show(plan: dict[str, Any]) -> None:
  """Prints the stages, the token budget and the warnings."""
  title = f"{plan['name']}: {plan['corpus']}"
  table = Table(
    title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
  )
  for name in ("stage", "objective"):
    table.add_column(name, no_wrap=True)
  for name in ("length", "rows", "epochs", "updates", "time"):
    table.add_column(name, justify="right", no_wrap=True)
  for s in plan["stages"]:
    time = "done" if s["seconds"] is None else duration(s["seconds"])
    table.add_row(
      *(s["name"], s["objective"], f"{s['length']}", f"{s['rows']:,}"),
      *(f"{s['epochs']:.2f}", f"{s['updates']:,}", time),
    )
  console.print(table)
  warnings = (f"warning: {w}" for w in plan["warnings"])
  for line in (*_facts(plan), *plan["notes"], *warnings):
    console.print(line, soft_wrap=True)


def _facts(plan: dict[str, Any]) -> list[str]:
  laws, unique = plan["laws"], plan["unique_tokens"]
  where = "" if laws["in_fitted_range"] else " (outside the fitted range)"
  winner = lambda wins: "diffusion" if wins else "autoregression"
  if laws["losses_in_reach"]:
    by_loss = f"by fitted losses {winner(laws['diffusion_wins'])}"
  else:
    by_loss = (
      "the fitted losses don't apply here"
      f" ({laws['diffusion_loss']:.1f} nats for diffusion,"
      f" {laws['ar_loss']:.1f} for autoregression, but"
      f" {scaling_laws.UNIFORM_LOSS:.1f} for uniform guessing)"
    )
  return [
    f"{plan['params']:,} parameters, vocabulary {plan['vocabulary']:,},"
    f" {plan['rows_per_update']} rows per update,"
    f" {plan['held_out_rows']:,} validation rows; {plan['devices']}",
    f"training takes about {duration(plan['seconds'])} (from a short trial,"
    f" without evaluations); {laws['flops']:.2e} FLOPs",
    f"{unique:,} unique tokens, read {plan['tokens'] / unique:.2f} times: worth"
    f" {laws['effective_tokens_diffusion']:,.0f} fresh tokens for diffusion,"
    f" {laws['effective_tokens_ar']:,.0f} for autoregression",
    f"scaling laws{where}: on this much text diffusion wins above"
    f" {laws['critical_flops']:.1e} FLOPs, so here"
    f" {winner(laws['past_critical_flops'])}; {by_loss};"
    f" overfitting after about {laws['best_epochs']:,.0f} epochs",
  ]


if __name__ == "__main__":
  sys.argv.insert(1, "--mode=plan")
  runpy.run_module("mdm_jax.main", run_name="__main__", alter_sys=True)
