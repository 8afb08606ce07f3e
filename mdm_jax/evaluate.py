"""Evaluates a checkpoint: likelihood bound, samples, the guide's targets."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mdm_jax import tuned_sampling
from mdm_jax.blueprint import held_out_objective
from mdm_jax.checkpoints.checkpoint import Checkpoints
from mdm_jax.config import Config, to_dict
from mdm_jax.core import strict_json
from mdm_jax.data import corpora, splits
from mdm_jax.data.held_out import HeldOut
from mdm_jax.data.prepared import PreparedData
from mdm_jax.evaluation import baselines, tables, targets
from mdm_jax.evaluation.evaluator import Evaluator
from mdm_jax.measured_text import describe, open_rows
from mdm_jax.model.denoiser import Denoiser, Params
from mdm_jax.objectives.measured import (
  LOSS_BY_MASKED_SHARE,
  Curve,
  Measured,
  to_json,
)
from mdm_jax.sampled_answers import SampledAnswers
from mdm_jax.sampled_texts import SampledTexts
from mdm_jax.sampling.config import SampleConfig
from mdm_jax.trained_model import load_model
from mdm_jax.workdir import Workdir

# A curve reads its rows once for every mask rate.
_CURVE_ROWS = 64
# Fields of `eval` that change the final results.
_SHAPING = "final_rows", "masks_per_row", "samples", "judge"


class Measures:
  """Evaluates parameters of one model, on held-out text and by its samples.

  Programs are compiled once and used for every evaluation of the process.

  Attributes:
    config: the run's config, perhaps with other settings.
    data: the run's rows and tokenizer.
    denoiser: the model.
    mesh: the devices.
    texts: draws and measures samples.
    with_answers: whether its test text is prompts with answers.
  """

  def __init__(
    self,
    config: Config,
    data: PreparedData,
    denoiser: Denoiser,
    mesh: jax.sharding.Mesh,
    poll: Callable[[], None] = lambda: None,
  ):
    """Builds the evaluator and the sampler.

    Args:
      config: the run's config, perhaps with other `eval` and `sample` settings.
      data: the run's rows and tokenizer.
      denoiser: the model.
      mesh: the devices.
      poll: called between the longer parts; may raise to stop.
    """
    self._poll = poll
    self.config, self.data = config, data
    self.denoiser, self.mesh = denoiser, mesh
    self._objective = held_out_objective(config, data.tokenizer.vocab, mesh)
    # Texts with answers are measured by their answers to held-out prompts.
    self.with_answers = corpora.has_answers(config.data, splits.TEST)
    kind = SampledAnswers if self.with_answers else SampledTexts
    self.texts = kind(
      *(config, data, denoiser, mesh, self._sampling_curve, poll),
      decoding=self._objective.decoding(),
    )
    self._evaluator = Evaluator(
      config.eval, self._objective, denoiser, mesh, poll
    )

  def what(
    self,
    step: int | None,
    latest: int | None,
    tuned: SampleConfig | None = None,
  ) -> dict[str, Any]:
    """Returns what the results of an evaluation depend on.

    Args:
      step: the checkpoint that is measured.
      latest: the newest checkpoint.
      tuned: the tuned sampling settings, if there are any.
    """
    config = self.config
    of_eval = {name: getattr(config.eval, name) for name in _SHAPING}
    settings = {"eval": of_eval, "sample": to_dict(config)["sample"]}
    if tuned:
      settings["tuned"] = strict_json.plain(tuned_sampling.values(tuned))
    return {
      "checkpoint": step,
      "updates": latest,
      "text": describe(self.data, config, splits.TEST),
      "settings": settings,
    }

  def read_final(
    self, workdir: Workdir, checkpoints: Checkpoints
  ) -> dict[str, Any] | None:
    """Returns stored results, or None if evaluating now could change them."""
    # Results of an earlier update, of another text or with other settings must
    # not be taken for those of this one.
    found = workdir.read("results.json") or {}
    tuned = tuned_sampling.read(workdir, self.config)
    what = self.what(checkpoints.best(), checkpoints.latest(), tuned)
    same = all(found.get(name) == value for name, value in what.items())
    return found if same else None

  def validation(self, params: Params) -> tuple[Measured, dict[str, int]]:
    """Measures validation text; the result chooses the best checkpoint.

    Returns:
      The measured numbers, and how much text they are of.
    """
    held = self.data.validation.subset(self.config.eval.rows)
    return self._evaluator.measure(params, held), _sizes(held)

  def test(self, params: Params) -> Measured:
    """Measures the test text: all numbers that are reported.

    Curves and secondary numbers are measured on a few rows only. Curves that
    the sampler's `optimal` schedule follows are measured on validation text as
    well: test text chooses nothing.
    """
    few = self._few(self.data.test)
    found = self._evaluator.measure(params, self._reported)
    found = found.joined(self._evaluator.measure(params, few, "values"))
    found = found.joined(self._evaluator.measure(params, few, "curves"))
    return self._with_bands(found.joined(self._chosen_by(params)))

  def _few(self, held: HeldOut) -> HeldOut:
    count = min(_CURVE_ROWS, self.config.eval.final_rows or _CURVE_ROWS)
    return held.subset(count)

  def _chosen_by(self, params: Params) -> Measured:
    """Returns validation curves for the sampler's `optimal` schedule."""
    held = self._few(self.data.validation)
    found = self._evaluator.measure(params, held, "curves").curves.items()
    chosen = {
      f"validation_{name}": dataclasses.replace(curve, split="validation")
      for name, curve in found
      if curve.role == LOSS_BY_MASKED_SHARE
    }
    return Measured(curves=chosen)

  def _sampling_curve(self, params: Params) -> Curve | None:
    found = self._chosen_by(params)
    return found.curve_with_role(LOSS_BY_MASKED_SHARE, "validation")

  def _with_bands(self, measured: Measured) -> Measured:
    """Marks on the curves the mask rates that each stage trains on."""
    found = ((s.objective.masked_share(), s.name) for s in self.config.stages)
    bands = tuple((*share, name) for share, name in found if share)
    curves = {
      name: dataclasses.replace(curve, bands=bands)
      if curve.role == LOSS_BY_MASKED_SHARE
      else curve
      for name, curve in measured.curves.items()
    }
    return dataclasses.replace(measured, curves=curves)

  def sizes(self) -> dict[str, int]:
    """Returns how much test text is measured."""
    return _sizes(self._reported)

  def baselines(self) -> dict[str, dict[str, Any]]:
    """Returns what n-gram models and xz need for the same test text.

    Nothing for answers: those models are given no prompt.
    """
    if self.with_answers:
      return {}
    return baselines.baselines(
      self.texts.training,
      self._reported,
      self.data.tokenizer,
      self.texts.ngrams,
      self._poll,
    )

  @functools.cached_property
  def _reported(self) -> HeldOut:
    return self.data.test.subset(self.config.eval.final_rows)


def evaluate_workdir(config: Config, workdir: Workdir) -> dict[str, Any]:
  """Evaluates a run's best checkpoint.

  Writes results.json and unmasking.json, and prints tables.

  Args:
    config: the run's config, perhaps with other `eval` and `sample` settings.
    workdir: the run's folder.

  Returns:
    The results, as in results.json.
  """
  data, config = open_rows(config, workdir)
  with Checkpoints(workdir.path) as checkpoints:
    model = load_model(workdir, config, checkpoints=checkpoints)
    with jax.set_mesh(model.mesh):
      measures = Measures(config, data, model.denoiser, model.mesh)
      return evaluate_params(
        workdir, measures, checkpoints, model.step, model.params
      )


def evaluate_params(
  workdir: Workdir,
  measures: Measures,
  checkpoints: Checkpoints,
  step: int,
  params: Params,
) -> dict[str, Any]:
  """Evaluates parameters; prints tables and writes results.json.

  Args:
    workdir: the run's folder.
    measures: evaluates them.
    checkpoints: the run's, for its tokens and seconds so far.
    step: update of the checkpoint that has the parameters.
    params: the averaged parameters.

  Returns:
    The results, as in results.json.
  """
  tuned = tuned_sampling.read(workdir, measures.config)
  measured = measures.test(params)
  run = checkpoints.progress(checkpoints.latest())
  wall, tokens = run["wall_seconds"], run["tokens_seen"]
  # JSON has no NaN: numbers that are undefined become None.
  results = strict_json.plain(
    {
      **to_json(measured),
      **measures.sizes(),
      **measures.what(step, checkpoints.latest(), tuned),
      "baselines": measures.baselines(),
      "tokens_seen": tokens,
      "wall_seconds": wall,
      "tokens_per_second": tokens / wall,
      **measures.texts.samples(params, tuned),
    }
  )
  # Stored in a file of its own.
  unmasking = results.pop("unmasking")
  # The guide's targets are of free text.
  found = [] if measures.with_answers else targets.check(measured, results)
  table = [dataclasses.asdict(t) for t in found]
  results["targets"] = strict_json.plain(table)
  tables.show(measured, results)  # before the write, which may fail
  workdir.write("unmasking.json", unmasking)
  workdir.write("results.json", results)
  return results


def _sizes(held: HeldOut) -> dict[str, int]:
  return {
    "documents": held.documents,
    "rows": len(held),
    "tokens": int(np.asarray(held.rows.answer).sum()),
    "bytes": held.num_bytes,
  }
