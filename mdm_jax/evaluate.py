"""From a checkpoint to numbers: likelihood, samples, the guide's targets."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mdm_jax.checkpoints.checkpoint import Checkpoints
from mdm_jax.config import Config, to_dict
from mdm_jax.core import strict_json
from mdm_jax.core.progress import console
from mdm_jax.core.sharding import data_shards
from mdm_jax.data import splits
from mdm_jax.data.held_out import HeldOut
from mdm_jax.data.prepared import PreparedData, training_ngrams, training_texts
from mdm_jax.evaluation import baselines, tables, targets
from mdm_jax.evaluation import samples as samples_lib
from mdm_jax.evaluation.evaluator import Evaluator
from mdm_jax.evaluation.judge import NgramJudge, make_judge
from mdm_jax.evaluation.judge import check as check_judge
from mdm_jax.evaluation.running_text import running_texts
from mdm_jax.measured_text import describe, open_rows
from mdm_jax.model.denoiser import Denoiser, Params
from mdm_jax.objectives.base import Objective, Plan
from mdm_jax.objectives.config import build
from mdm_jax.objectives.measured import (
  LOSS_BY_MASKED_SHARE,
  Curve,
  Measured,
  Part,
  to_json,
)
from mdm_jax.sampling.config import SampleConfig
from mdm_jax.sampling.generate import Samples, TextSampler, effective
from mdm_jax.trained_model import load_model
from mdm_jax.workdir import Workdir

_CURVE_ROWS = 64
# Fields of `eval` that the final results depend on.
_SHAPING = "final_rows", "masks_per_row", "samples", "judge"


class Measures:
  """What a model is measured with; each part is compiled once a process."""

  def __init__(
    self,
    config: Config,
    data: PreparedData,
    denoiser: Denoiser,
    mesh: jax.sharding.Mesh,
    poll: Callable[[], None] = lambda: None,
  ):
    """Makes what measures; `poll` is called between its longer parts."""
    check_judge(config.eval.judge)
    self._poll = poll
    self.config, self.data = config, data
    self.denoiser, self.mesh = denoiser, mesh
    self._draw_texts = TextSampler(
      denoiser, data.tokenizer, mesh, config.sample_length
    )
    self._objective = _objective(config, data, mesh)
    self._evaluator = Evaluator(
      config.eval, self._objective, denoiser, mesh, poll
    )

  def what(self, step: int | None, latest: int | None) -> dict[str, Any]:
    """Returns what tells the results of an evaluation from those of another.

    Args:
      step: of the checkpoint that is measured.
      latest: updates that the run has made.
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
    """Returns the stored results if an evaluation now would be of the same."""
    found = workdir.read_results() or {}
    what = self.what(checkpoints.best(), checkpoints.latest())
    same = all(found.get(name) == value for name, value in what.items())
    return found if same else None

  def validation(self, params: Params) -> tuple[Measured, dict[str, int]]:
    """Returns what chooses a checkpoint, and of how much text it is."""
    held = self.data.validation.subset(self.config.eval.rows)
    return self._measure(params, held), _sizes(held)

  def test(self, params: Params) -> Measured:
    """Returns all that is measured of the text that is reported.

    Curves, and what stands beside the likelihood, are of a few rows. Curves
    that choose how to sample are of validation text too: test text chooses
    nothing.
    """
    few = self._few(self.data.test)
    found = self._measure(params, self._reported)
    found = found.joined(self._measure(params, few, "values"))
    found = found.joined(self._measure(params, few, "curves"))
    return self._with_bands(found.joined(self._chosen_by(params)))

  def _measure(
    self, params: Params, held: HeldOut, part: Part = "likelihood"
  ) -> Measured:
    self._poll()
    return self._evaluator.measure(params, held, part)

  def _few(self, held: HeldOut) -> HeldOut:
    count = min(_CURVE_ROWS, self.config.eval.final_rows or _CURVE_ROWS)
    return held.subset(count)

  def _chosen_by(self, params: Params) -> Measured:
    """Returns the curves of validation text that choose how to sample."""
    held = self._few(self.data.validation)
    found = self._measure(params, held, "curves").curves.items()
    chosen = {
      f"validation_{name}": dataclasses.replace(curve, split="validation")
      for name, curve in found
      if curve.role == LOSS_BY_MASKED_SHARE
    }
    return Measured(curves=chosen)

  def _with_bands(self, measured: Measured) -> Measured:
    """Marks on curves by the masked share what each stage trains on."""
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
    """Returns how much text is reported."""
    return _sizes(self._reported)

  def baselines(self) -> dict[str, dict[str, Any]]:
    """Returns what others need for the same bytes of test text."""
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
    """Returns a few samples, to look at while a training goes on."""
    settings = self.config.sample
    return self._draw(params, settings, settings.num_samples)

  def _curve(self, params: Params) -> Curve | None:
    """Returns what the optimal schedule follows from; it takes a while."""
    if self.config.sample.schedule != "optimal":
      return None
    found = self._chosen_by(params)
    return found.curve_with_role(LOSS_BY_MASKED_SHARE, "validation")

  def samples(self, params: Params) -> dict[str, Any]:
    """Returns samples, one of them step by step, and all measures of them."""
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
    judge = make_judge(path, []) if path else self._ngrams
    copies = training_ngrams(config.rows, self._training)
    measure = samples_lib.TextMeasures(judge, copies, config.data.language)
    plain = samples_lib.untruncated(config.sample)
    count = len(drawn.texts)
    own = running_texts(data.test, data.tokenizer, count, config.sample_length)
    if len(own.texts) < count:
      console.print(f"warning: test text for comparison: {own.told}")
    measured = {
      "sampling": measure(drawn.texts),
      "untruncated": measure(self._draw(params, plain, count).texts),
      "held_out": measure(own.texts, own.documents),
    }
    return {
      name: samples_lib.as_plain(values) for name, values in measured.items()
    } | {"judge": judge.name, "test text": own.told}

  def _unmasking(self, drawn: Samples) -> dict[str, Any]:
    """The first sample as pieces of text, None where it is masked."""
    vocab, tokenizer = self.data.tokenizer.vocab, self.data.tokenizer
    steps = [
      [None if i == vocab.mask else tokenizer.decode([i]) for i in ids]
      for ids in drawn.path[:, 0].tolist()
    ]
    return {"settings": effective(self.config.sample), "steps": steps}


def evaluate_workdir(config: Config, workdir: Workdir) -> dict[str, Any]:
  """Measures a run's best checkpoint, writes and returns the results."""
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
  """Measures a step's parameters, writes results.json and prints tables."""
  measured = measures.test(params)
  run = checkpoints.progress(checkpoints.latest())
  wall, tokens = run["wall_seconds"], run["tokens_seen"]
  results = {
    **to_json(measured),
    **measures.sizes(),
    **measures.what(step, checkpoints.latest()),
    "baselines": measures.baselines(),
    "tokens_seen": tokens,
    "wall_seconds": wall,
    "tokens_per_second": tokens / wall,
    **measures.samples(params),
  }
  unmasking = results.pop("unmasking")
  table = targets.check(measured, results)
  results["targets"] = [dataclasses.asdict(t) for t in table]
  results = strict_json.plain(results)
  tables.show(measured, results)  # first: it may be that nothing can be stored
  workdir.write_results(results, unmasking)
  return results


def _sizes(held: HeldOut) -> dict[str, int]:
  return {
    "documents": held.documents,
    "rows": len(held),
    "tokens": int((np.asarray(held.rows.segments[:]) > 0).sum()),
    "bytes": held.num_bytes,
  }


def _objective(
  config: Config, data: PreparedData, mesh: jax.sharding.Mesh
) -> Objective:
  """Returns the objective of the last stage: a run is measured by its end."""
  stage = config.stages[-1]
  plan = Plan(
    accumulation=config.optimizer.accumulation,
    batch=config.data.batch_size,
    length=stage.length,
    shards=data_shards(mesh),
    most_asked=stage.length,
    most_segments=stage.length,
  )
  return build(
    *(config.objective, stage.objective, config.noise),
    *(data.tokenizer.vocab, plan),
  )
