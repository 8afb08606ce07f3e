"""Evaluates a checkpoint: likelihood bound, samples, the guide's targets."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mdm_jax.blueprint import held_out_objective
from mdm_jax.checkpoints.checkpoint import Checkpoints
from mdm_jax.config import Config, to_dict
from mdm_jax.core import strict_json
from mdm_jax.core.progress import console
from mdm_jax.data import splits
from mdm_jax.data.held_out import HeldOut
from mdm_jax.data.prepared import PreparedData, training_ngrams, training_texts
from mdm_jax.evaluation import baselines, tables, targets, text_metrics
from mdm_jax.evaluation.evaluator import Evaluator
from mdm_jax.evaluation.huggingface_judge import check as check_judge
from mdm_jax.evaluation.judge import NgramJudge, make_judge
from mdm_jax.evaluation.running_text import running_texts
from mdm_jax.measured_text import describe, open_rows
from mdm_jax.model.denoiser import Denoiser, Params
from mdm_jax.objectives.measured import (
  LOSS_BY_MASKED_SHARE,
  Curve,
  Measured,
  to_json,
)
from mdm_jax.sampling.config import SampleConfig
from mdm_jax.sampling.generate import TextSampler, effective
from mdm_jax.sampling.samples import Samples
from mdm_jax.trained_model import load_model
from mdm_jax.workdir import Workdir

# A curve reads its rows once for every mask rate.
_CURVE_ROWS = 64
# Fields of `eval` that change the final results.
_SHAPING = "final_rows", "masks_per_row", "samples", "judge"


class Measures:
  """Evaluates parameters of one model, on held-out text and by its samples.

  Programs are compiled once and used for every evaluation of the process.
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
    # First: a judge that can't be loaded should fail before the training.
    check_judge(config.eval.judge)
    self._poll = poll
    self.config, self.data = config, data
    self.denoiser, self.mesh = denoiser, mesh
    self._draw_texts = TextSampler(
      denoiser, data.tokenizer, mesh, config.sample_length
    )
    self._objective = held_out_objective(config, data.tokenizer.vocab, mesh)
    self._evaluator = Evaluator(
      config.eval, self._objective, denoiser, mesh, poll
    )

  def what(self, step: int | None, latest: int | None) -> dict[str, Any]:
    """Returns what the results of an evaluation depend on.

    Args:
      step: the checkpoint that is measured.
      latest: the newest checkpoint.
    """
    config = self.config
    settings = {name: getattr(config.eval, name) for name in _SHAPING}
    return {
      "checkpoint": step,
      "updates": latest,
      "text": describe(self.data, config, splits.TEST),
      "settings": {"eval": settings, "sample": to_dict(config)["sample"]},
    }

  def read_final(
    self, workdir: Workdir, checkpoints: Checkpoints
  ) -> dict[str, Any] | None:
    """Returns stored results, or None if evaluating now could change them."""
    # Results of an earlier update, of another text or with other settings must
    # not be taken for those of this one.
    found = workdir.read("results.json") or {}
    what = self.what(checkpoints.best(), checkpoints.latest())
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
    """Returns what n-gram models and xz need for the same test text."""
    return baselines.baselines(
      self._training,
      self._reported,
      self.data.tokenizer,
      self._ngrams,
      self._poll,
    )

  @functools.cached_property
  def _reported(self) -> HeldOut:
    return self.data.test.subset(self.config.eval.final_rows)

  @functools.cached_property
  def _training(self) -> list[str]:
    return training_texts(self.config.rows)

  @functools.cached_property
  def _ngrams(self) -> NgramJudge:
    return NgramJudge(self._training)

  def sample(self, params: Params) -> Samples:
    """Draws a few texts, to look at while a run trains."""
    settings = self.config.sample
    return self._draw(params, settings, settings.num_samples)

  def _curve(self, params: Params) -> Curve | None:
    """Returns the curve that the `optimal` schedule follows, if it is chosen.

    It takes a while: the curve is measured with these parameters.
    """
    if self.config.sample.schedule != "optimal":
      return None
    found = self._chosen_by(params)
    return found.curve_with_role(LOSS_BY_MASKED_SHARE, "validation")

  def samples(self, params: Params) -> dict[str, Any]:
    """Draws texts and measures them.

    Returns:
      Plain values: the settings, some of the texts, one of them step by step,
      and their metrics.
    """
    config, shown = self.config, self.config.sample.num_samples
    count = max(config.eval.samples, shown)
    drawn = self._draw(params, config.sample, count)
    results = {
      "sampling": effective(config.sample),
      "samples": drawn.texts[:shown],
      "unmasking": self._unmasking(drawn),
    }
    if config.eval.samples:
      results["text_metrics"] = self._text_metrics(params, drawn)
    return results

  def _draw(
    self, params: Params, settings: SampleConfig, count: int
  ) -> Samples:
    curve = self._curve(params)
    self._poll()
    return self._draw_texts(params, [""] * count, settings, curve)

  def _text_metrics(self, params: Params, drawn: Samples) -> dict[str, Any]:
    config, data = self.config, self.data
    path = config.eval.judge
    # Unless another judge is given, it is the n-gram model of the baselines.
    judge = make_judge(path, []) if path else self._ngrams
    measure = functools.partial(
      text_metrics.measure,
      language=config.data.language,
      judge=judge,
      copies=training_ngrams(config.rows, self._training),
    )
    # Also at T = 1 without filters: the model's own distribution.
    plain = config.sample.untruncated()
    count = len(drawn.texts)
    # Held-out texts of the samples' length: shorter ones repeat less, so the
    # metrics could not be compared.
    own = running_texts(data.test, data.tokenizer, count, config.sample_length)
    if len(own.texts) < count:
      console.print(f"warning: reference texts: {own.description}")
    measured = {
      "sampling": measure(drawn.texts),
      "untruncated": measure(self._draw(params, plain, count).texts),
      "held_out": measure(own.texts, own.documents),
    }
    return {
      name: text_metrics.as_json(values) for name, values in measured.items()
    } | {"judge": judge.name, "test text": own.description}

  def _unmasking(self, drawn: Samples) -> dict[str, Any]:
    """Returns the first sample at every step: its pieces, None where masked."""
    vocab, tokenizer = self.data.tokenizer.vocab, self.data.tokenizer
    steps = [
      [None if i == vocab.mask else tokenizer.decode([i]) for i in ids]
      for ids in drawn.path[:, 0].tolist()
    ]
    return {"settings": effective(self.config.sample), "steps": steps}


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
  measured = measures.test(params)
  run = checkpoints.progress(checkpoints.latest())
  wall, tokens = run["wall_seconds"], run["tokens_seen"]
  # JSON has no NaN: numbers that are undefined become None.
  results = strict_json.plain(
    {
      **to_json(measured),
      **measures.sizes(),
      **measures.what(step, checkpoints.latest()),
      "baselines": measures.baselines(),
      "tokens_seen": tokens,
      "wall_seconds": wall,
      "tokens_per_second": tokens / wall,
      **measures.samples(params),
    }
  )
  # Stored in a file of its own.
  unmasking = results.pop("unmasking")
  table = [dataclasses.asdict(t) for t in targets.check(measured, results)]
  results["targets"] = strict_json.plain(table)
  tables.show(measured, results)  # before the write, which may fail
  workdir.write("unmasking.json", unmasking)
  workdir.write("results.json", results)
  return results


def _sizes(held: HeldOut) -> dict[str, int]:
  return {
    "documents": held.documents,
    "rows": len(held),
    "tokens": int((np.asarray(held.rows.segments[:]) > 0).sum()),
    "bytes": held.num_bytes,
  }
