"""Finds the sampling settings whose texts are closest to held-out text.

  python -m mdm_jax.main --mode=tune --workdir=runs/quickstart

The search measures texts against validation text. Its result is measured on
seeds that chose nothing, against test text, beside the run's own settings and
the bare model.
"""

import dataclasses
import functools
from typing import Any

import jax

from mdm_jax import tuned_sampling
from mdm_jax.checkpoints.checkpoint import Checkpoints
from mdm_jax.config import Config
from mdm_jax.core import strict_json
from mdm_jax.core.errors import UserError
from mdm_jax.core.progress import console, progress_bar, with_error
from mdm_jax.data import splits
from mdm_jax.evaluate import Measures
from mdm_jax.evaluation import tables, targets, text_metrics
from mdm_jax.measured_text import describe, open_rows
from mdm_jax.model.denoiser import Params
from mdm_jax.objectives.measured import (
  LOSS_BY_MASKED_SHARE,
  Curve,
  curve_in,
  from_json,
)
from mdm_jax.sampling.config import SampleConfig
from mdm_jax.studies import search
from mdm_jax.studies.search import Measured, Round, Trial
from mdm_jax.trained_model import load_model
from mdm_jax.workdir import Workdir

_MOST_STEPS = 25  # denoiser calls, unless more are asked for
_SHOWN = "seq_rep_2", "unigram_entropy", "distinct_2", search.JUDGE


def tune_workdir(config: Config, workdir: Workdir) -> dict[str, Any]:
  """Tunes the sampling of a run's best checkpoint; writes sampling.json.

  Results of the same checkpoint in results.json get the tuned settings' texts
  as a further column.

  Args:
    config: the run's config, perhaps with other settings; `sample.num_steps`
      is the number of denoiser calls (25 if the run's own is more), and
      `eval.samples` scales the number of texts (`search.rounds`).
    workdir: the run's folder.

  Returns:
    The content of sampling.json.

  Raises:
    UserError: there is no checkpoint, or the run had other data.
  """
  if not config.eval.samples:
    raise UserError(
      "--mode=tune draws eval.samples texts for each of its settings: set"
      " --config.eval.samples=64"
    )
  saved = workdir.read_config().sample.num_steps
  data, config = open_rows(config, workdir)
  asked = config.sample.num_steps
  num_steps = min(saved, _MOST_STEPS) if asked == saved else asked
  with Checkpoints(workdir.path) as checkpoints:
    model = load_model(workdir, config, checkpoints=checkpoints)
    latest = checkpoints.latest()
  old = workdir.read("results.json") or {}
  curve = curve_in(old, LOSS_BY_MASKED_SHARE, "validation")
  with jax.set_mesh(model.mesh):
    measures = Measures(config, data, model.denoiser, model.mesh)
    if measures.with_answers:
      raise UserError(
        "--mode=tune finds settings for free text, and this run answers"
        " prompts; --mode=compare compares settings by its answers"
      )
    if "order" in measures.texts.method.unused:
      raise UserError(
        "--mode=tune tries orders and schedules, and this model draws from left"
        " to right; --mode=compare --ways=temperature compares temperatures"
      )
    best, rounds = _search(measures, model.params, num_steps, curve)
    drawn = measures.texts.draw(
      model.params, config.sample, config.eval.samples
    )
    metrics = measures.texts.text_metrics(model.params, drawn.texts, best)
  found = strict_json.plain(
    {
      "checkpoint": model.step,
      "settings": tuned_sampling.values(best),
      "chosen_by": describe(data, config, splits.VALIDATION),
      "seeds_from": _first_seed(config),
      "rounds": rounds,
      "text_metrics": metrics,
    }
  )
  workdir.write(tuned_sampling.FILE, found)
  _add_column(workdir, old, measures.what(model.step, latest, best), found)
  return found


def _search(
  measures: Measures, params: Params, num_steps: int, curve: Curve | None
) -> tuple[SampleConfig, list[dict[str, Any]]]:
  """Returns the best settings, and what was tried in each round."""
  config = measures.config
  plan = search.rounds(
    config.sample, num_steps, config.eval.samples, curve is not None
  )
  if curve is None:
    console.print(
      "the schedule `optimal` is left out: this run has no loss by mask rate"
      " (--mode=eval measures it, if the objective has one)",
      soft_wrap=True,
    )
  validation = measures.data.validation
  # Texts of which the pooled metrics are compared: never more than the result
  # is measured with, because distinct shares fall with their number.
  pool = lambda count: min(count, config.eval.samples)
  own = functools.cache(
    lambda count: measures.texts.held_out(validation, count, pool(count))
  )
  with progress_bar("settings") as bar:
    task = bar.add_task("tuning", total=None)

    def measure(settings: SampleConfig, count: int, seed: int) -> Measured:
      settings = dataclasses.replace(settings, seed=seed)
      texts = measures.texts.draw(params, settings, count, curve).texts
      bar.advance(task)
      found = measures.texts.of_texts(texts)
      size = min(pool(count), own(count).count)
      return found | text_metrics.of_pools(size, texts)

    tried = search.search(
      *(plan, measure, lambda count: own(count).metrics, _first_seed(config)),
      lambda part, size: bar.reset(task, description=part.name, total=size),
      _print_round,
    )
  text = {p.name: text_metrics.as_json(own(p.texts).metrics) for p in plan}
  rounds = [
    {
      "varies": part.name,
      "texts": part.texts,
      "validation": text[part.name],
      "tried": [_as_json(trial) for trial in trials],
    }
    for part, trials in zip(plan, tried, strict=True)
  ]
  return tried[-1][0].settings, rounds


def _first_seed(config: Config) -> int:
  # An evaluation draws with the run's seed: it must choose nothing.
  return (config.sample.seed + 1) % 2**32


def _as_json(trial: Trial) -> dict[str, Any]:
  numbers = {
    name: {"value": trial.measured[name].value}
    | {"stderr": trial.measured[name].stderr}
    for name in (*search.CRITERIA, search.JUDGE)
  }
  settings = tuned_sampling.values(trial.settings)
  return {"settings": settings, "beyond": trial.beyond, **numbers}


def _print_round(part: Round, trials: list[Trial]) -> None:
  best = trials[0]
  numbers = ", ".join(
    f"{name} {with_error(found.value, found.stderr)}"
    for name, found in best.measured.items()
    if name in _SHOWN
  )
  console.print(
    f"{part.name}: {len(trials)} settings, {part.texts} texts each; best:"
    f" {tuned_sampling.in_words(best.settings)}: {numbers}",
    soft_wrap=True,
  )


def _add_column(
  workdir: Workdir,
  results: dict[str, Any],
  what: dict[str, Any],
  found: dict[str, Any],
) -> None:
  """Prints the tuned texts' metrics, and adds them to results.json.

  Only if that has results of the same checkpoint, text and settings.
  """
  metrics = found["text_metrics"]
  console.print(tables.text_table(metrics))
  settings = results.get("settings", {}) | {"tuned": what["settings"]["tuned"]}
  if what != {name: results.get(name) for name in what} | {
    "settings": settings
  }:
    console.print("--mode=eval adds these columns to results.json")
    return
  results |= {"settings": settings, "text_metrics": metrics}
  lines = targets.check(from_json(results), results)
  results["targets"] = strict_json.plain([dataclasses.asdict(t) for t in lines])
  console.print(tables.target_table(results["targets"]))
  workdir.write("results.json", results)
