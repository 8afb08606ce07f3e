"""Plans a run before it trains: stages, updates, time, scaling laws.

  python -m mdm_jax.plan --config=configs/quickstart.py

is short for `python -m mdm_jax.main --mode=plan`; with `--json` the last line
is the plan as JSON.
"""

import dataclasses
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
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.model.placement import training_mesh
from mdm_jax.planning import calibration, scaling_laws
from mdm_jax.planning.scaling_laws import Forecast
from mdm_jax.training.curriculum import StagePlan
from mdm_jax.training.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class StageForecast:
  """What one stage is going to do.

  Attributes:
    name: of the stage.
    unit: the unit of text that it reads, as in `sentences`.
    length: tokens per row.
    asked: the objective's settings in a few words, such as its mask rates.
    rows: number of prepared rows.
    tokens: tokens in these rows.
    epochs: passes over these rows.
    updates: optimizer updates.
    flops: training compute, 6 N D for N parameters and D tokens.
    seconds: for the updates left, as timed here; None for a stage that is over.
  """

  name: str
  unit: str
  length: int
  asked: str
  rows: int
  tokens: int
  epochs: float
  updates: int
  flops: float
  seconds: float | None


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a run is going to do.

  Attributes:
    name: of the run.
    corpus: name of the training text.
    devices: their kind, and the mesh.
    params: number of parameters of the denoiser.
    parameters: a table of their names, shapes and shardings.
    vocabulary: number of ids, padding of the table included.
    rows_per_update: the effective batch size.
    held_out_rows: validation rows that there are.
    stages: in order.
    unique_tokens: tokens in the rows of the largest stage.
    tokens: tokens that all updates read, repeats included.
    laws: what scaling laws predict for this compute and corpus.
    notes: sentences on how the run uses these devices.
    warnings: sentences.
  """

  name: str
  corpus: str
  devices: str
  params: int
  parameters: str
  vocabulary: int
  rows_per_update: int
  held_out_rows: int
  stages: tuple[StageForecast, ...]
  unique_tokens: int
  tokens: int
  laws: Forecast
  notes: tuple[str, ...]
  warnings: tuple[str, ...]

  @property
  def seconds(self) -> float:
    """Seconds of all updates left, without evaluations and saves."""
    return sum((s.seconds or 0.0 for s in self.stages), 0.0)


def plan_run(config: Config) -> dict[str, Any]:
  """Prints the plan of a run and returns it as plain values."""
  data = prepare(config.rows)
  mesh = training_mesh(config.mesh, config.model)
  with jax.set_mesh(mesh):
    plan = make_plan(config, make_trainer(config, data, mesh))
  show(plan)
  values = dataclasses.asdict(plan) | {"seconds": plan.seconds}
  del values["parameters"]  # a table for people
  # JSON has no infinity: a crossover that never comes is null.
  never = {k: None for k, v in values["laws"].items() if v == math.inf}
  return values | {"laws": values["laws"] | never}


def make_plan(config: Config, trainer: Trainer, after: int = 0) -> Plan:
  """Returns the plan of a run, timing a few updates on the current mesh.

  The trial has a training state of its own, which is freed: call this before
  the run's state exists.

  Args:
    config: the run's config.
    trainer: makes its updates.
    after: updates already made.
  """
  data, mesh = trainer.data, trainer.mesh
  params = num_params(trainer.denoiser)
  seconds = calibration.update_seconds(trainer, after)
  counts = data.manifest["rows"]
  stages = tuple(
    _forecast(config, stage, counts, params, seconds.get(stage.index), after)
    for stage in trainer.curriculum.stages
  )
  # All stages read one corpus, so their tokens are not added up.
  unique = max(stage.tokens for stage in stages)
  tokens = sum(stage.tokens * stage.epochs for stage in stages)
  sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
  return Plan(
    name=config.name,
    corpus=config.data.corpus,
    devices=f"{mesh.devices.flat[0].device_kind}: {sizes}",
    params=params,
    parameters=_parameters(trainer.denoiser),
    vocabulary=data.tokenizer.vocab.size,
    rows_per_update=config.rows_per_update,
    held_out_rows=len(data.validation),
    stages=stages,
    unique_tokens=unique,
    tokens=round(tokens),
    laws=scaling_laws.forecast(params, unique, tokens / unique),
    notes=tuple(_notes(config, trainer)),
    warnings=tuple(
      config.objective.warnings([s.objective for s in config.stages])
    ),
  )


def _notes(config: Config, trainer: Trainer) -> list[str]:
  """Returns sentences on attention kernels, padding and determinism."""
  lengths = sorted({s.config.length for s in trainer.curriculum.stages})
  by_choice: dict[str, list[str]] = {}
  for length in lengths:
    choice = str(trainer.denoiser.attention(length))
    by_choice.setdefault(choice, []).append(str(length))
  lines = [
    choice + (f" (length {', '.join(at)})" if len(by_choice) > 1 else "")
    for choice, at in by_choice.items()
  ]
  rows = trainer.batch_size
  padded = padded_rows(rows, trainer.mesh)
  if padded > rows:
    lines.append(
      f"{rows} rows a microbatch on {data_shards(trainer.mesh)} data shards:"
      f" {padded - rows} rows of padding go along, computed and not counted"
    )
  every, updates = config.optimizer.every, trainer.curriculum.updates
  if every > 1:
    lines.append(_steps(every, updates))
  return [*lines, determinism.promise(jax.default_backend())]


def _steps(every: int, updates: int) -> str:
  """Describes the steps of an optimizer that does not step every update."""
  steps, left = divmod(updates, every)
  return (
    f"optimizer.every={every}: {steps:,} steps, each by the mean gradient of"
    f" {every} updates and with the last one's learning rate"
    + (f"; what the last {left} of all updates add up is not used" * (left > 0))
  )


def _forecast(
  config: Config,
  stage: StagePlan,
  counts: dict[str, Any],
  params: int,
  update_seconds: float | None,
  after: int,
) -> StageForecast:
  s = stage.config
  tokens = counts[f"stage_{stage.index + 1}"]["tokens"]
  epochs = stage.updates * config.rows_per_update / stage.rows
  # A resumed run has only a part of its current stage left.
  left = stage.end - max(stage.start, after)
  return StageForecast(
    name=s.name,
    unit=s.unit,
    length=s.length,
    asked=s.objective.describe(),
    rows=stage.rows,
    tokens=tokens,
    epochs=epochs,
    updates=stage.updates,
    flops=scaling_laws.training_flops(params, tokens * epochs),
    seconds=None if update_seconds is None else left * update_seconds,
  )


def num_params(denoiser: Denoiser) -> int:
  """Returns the number of parameters of a denoiser."""
  return int(parameter_overview.count_parameters(_shapes(denoiser)))


def _parameters(denoiser: Denoiser) -> str:
  """Returns a table of the parameters' names, shapes and shardings."""
  # By default clu adds means and deviations, for which it needs values;
  # shardings it reads off shapes.
  shapes = _shapes(denoiser)
  kind = "sharding"
  return parameter_overview.get_parameter_overview(shapes, include_stats=kind)


def _shapes(denoiser: Denoiser):
  return jax.eval_shape(denoiser.init, jax.random.key(0))


# MARK: printing


def show(plan: Plan) -> None:
  """Prints the parameters, the stages, the token budget and the warnings."""
  console.print(plan.parameters, soft_wrap=True, markup=False, highlight=False)
  console.print(_stage_table(plan))
  for line in (
    *_facts(plan),
    *plan.notes,
    *(f"warning: {w}" for w in plan.warnings),
  ):
    console.print(line, soft_wrap=True)


def _stage_table(plan: Plan) -> Table:
  title = f"{plan.name}: {plan.corpus}"
  table = Table(
    title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
  )
  for name in ("stage", "asks"):
    table.add_column(name, no_wrap=True)
  for name in ("length", "rows", "epochs", "updates", "time"):
    table.add_column(name, justify="right", no_wrap=True)
  for s in plan.stages:
    time = "done" if s.seconds is None else duration(s.seconds)
    numbers = f"{s.length}", f"{s.rows:,}", f"{s.epochs:.2f}", f"{s.updates:,}"
    table.add_row(s.name, s.asked, *numbers, time)
  return table


def _facts(plan: Plan) -> list[str]:
  laws = plan.laws
  where = "" if laws.in_fitted_range else " (outside the fitted range)"
  by_compute = "diffusion" if laws.past_critical_flops else "autoregression"
  if laws.losses_in_reach:
    winner = "diffusion" if laws.diffusion_wins else "autoregression"
    by_loss = f"by fitted losses {winner}"
  else:
    by_loss = (
      f"the fitted losses don't reach here ({laws.diffusion_loss:.1f} nats for"
      f" diffusion, {laws.ar_loss:.1f} for autoregression, and"
      f" {scaling_laws.UNIFORM_LOSS:.1f} for guessing)"
    )
  return [
    f"{plan.params:,} parameters, vocabulary {plan.vocabulary:,},"
    f" {plan.rows_per_update} rows an update, {plan.held_out_rows:,} validation"
    f" rows; {plan.devices}",
    f"training {duration(plan.seconds)} by a short trial, evaluations not"
    f" counted; {laws.flops:.2e} FLOPs",
    f"{plan.unique_tokens:,} unique tokens, read"
    f" {plan.tokens / plan.unique_tokens:.2f} times: worth"
    f" {laws.effective_tokens_diffusion:,.0f} fresh ones to diffusion,"
    f" {laws.effective_tokens_ar:,.0f} to autoregression",
    f"scaling laws{where}: past {laws.critical_flops:.1e} FLOPs diffusion wins"
    f" on this much text, so here {by_compute}; {by_loss};"
    f" overfitting after about {laws.best_epochs:,.0f} epochs",
  ]


if __name__ == "__main__":
  sys.argv.insert(1, "--mode=plan")
  runpy.run_module("mdm_jax.main", run_name="__main__", alter_sys=True)
