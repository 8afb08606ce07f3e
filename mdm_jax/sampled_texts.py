"""Draws texts from a model, and measures them beside held-out text."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from mdm_jax.config import Config
from mdm_jax.core.progress import console
from mdm_jax.core.standard_errors import Clusters, Estimate
from mdm_jax.data.held_out import HeldOut
from mdm_jax.data.ngrams import Ngrams
from mdm_jax.data.prepared import PreparedData, training_ngrams, training_texts
from mdm_jax.evaluation import text_metrics
from mdm_jax.evaluation.huggingface_judge import check as check_judge
from mdm_jax.evaluation.judge import Judge, NgramJudge, make_judge
from mdm_jax.evaluation.running_text import (
  count_within_documents,
  running_texts,
)
from mdm_jax.model.denoiser import Denoiser, Params
from mdm_jax.objectives.base import Decoding
from mdm_jax.objectives.measured import Curve
from mdm_jax.sampling import template
from mdm_jax.sampling.call import Canvas
from mdm_jax.sampling.config import SampleConfig
from mdm_jax.sampling.generate import TextSampler, effective
from mdm_jax.sampling.samples import Samples

# Held-out texts for each sample: they cost no denoiser calls.
_MORE = 16


@dataclasses.dataclass(frozen=True)
class HeldOutTexts:
  """What held-out texts of the samples' length and number are like.

  Attributes:
    metrics: the text metrics, by name.
    count: number of texts; fewer than samples where there is too little text.
    description: how many texts of how many documents, in one line.
  """

  metrics: dict[str, Estimate]
  count: int
  description: str


class SampledTexts:
  """Draws texts with one model's parameters, and measures them.

  Programs are compiled once; the judge and the training text's n-grams are made
  when they are first needed.

  Attributes:
    method: how the model is sampled, and which settings apply.
  """

  def __init__(
    self,
    config: Config,
    data: PreparedData,
    denoiser: Denoiser,
    mesh: jax.sharding.Mesh,
    measure_curve: Callable[[Params], Curve | None],
    poll: Callable[[], None] = lambda: None,
    *,
    decoding: Decoding,
  ):
    """Builds the sampler.

    Args:
      config: the run's config, perhaps with other `eval` and `sample` settings.
      data: the run's rows and tokenizer.
      denoiser: the model.
      mesh: the devices.
      measure_curve: measures the loss by mask rate.
      poll: called before texts are drawn; may raise to stop.
      decoding: how the model can be sampled; its objective says so.
    """
    # First: a judge that can't be loaded should fail before the training.
    check_judge(config.eval.judge)
    self._config, self._data, self._poll = config, data, poll
    self._measure_curve = measure_curve
    self._sampler = TextSampler(
      *(denoiser, data.tokenizer, mesh, self._length(decoding)),
      decoding=decoding,
    )
    # Here too, so that a mistake ends the run before the training.
    self.method = self._sampler.method
    self.method.check(config.sample)

  def _length(self, decoding: Decoding) -> int:
    """Returns the tokens of a row to draw."""
    del decoding
    return self._config.sample_length

  def sample(self, params: Params) -> Samples:
    """Draws a few texts, to look at while a run trains."""
    settings = self._config.sample
    return self.draw(params, settings, settings.num_samples)

  def samples(
    self, params: Params, tuned: SampleConfig | None = None
  ) -> dict[str, Any]:
    """Draws texts and measures them.

    Args:
      params: the averaged parameters.
      tuned: the tuned sampling settings, if there are any.

    Returns:
      Plain values: the settings, some of the texts, one of them step by step,
      and their metrics.
    """
    config, shown = self._config, self._config.sample.num_samples
    count = max(config.eval.samples, shown)
    drawn = self.draw(params, config.sample, count)
    results = {
      "sampling": effective(config.sample, self.method.unused),
      "samples": drawn.texts[:shown],
      "unmasking": self._unmasking(drawn),
    }
    if tuned:
      results["tuned"] = effective(tuned)
    if config.eval.samples:
      results["text_metrics"] = self.text_metrics(params, drawn.texts, tuned)
    return results

  def draw(
    self,
    params: Params,
    settings: SampleConfig,
    count: int,
    curve: Curve | None = None,
  ) -> Samples:
    """Draws texts without a prompt.

    Args:
      params: the averaged parameters.
      settings: how to sample.
      count: number of texts.
      curve: loss by mask rate, for the schedule `optimal` (None: it is measured
        if needed, which takes a while).
    """
    tokenizer, length = self._data.tokenizer, self._config.sample_length
    free = template.canvas([""] * count, tokenizer, length)
    return self._draw(params, free, settings, curve)

  def _draw(
    self,
    params: Params,
    canvas: Canvas,
    settings: SampleConfig,
    curve: Curve | None,
  ) -> Samples:
    if settings.schedule == "optimal" and curve is None:
      curve = self._measure_curve(params)
    self._poll()
    return self._sampler.draw(params, canvas, settings, curve)

  @functools.cached_property
  def training(self) -> list[str]:
    """The training text, perhaps a sample of it."""
    return training_texts(self._config.rows)

  @functools.cached_property
  def ngrams(self) -> NgramJudge:
    """An n-gram model of the training text."""
    return NgramJudge(self.training)

  @functools.cached_property
  def judge(self) -> Judge:
    """The judge of texts: an n-gram model unless another one is given."""
    source, mesh = self._config.eval.judge, self._config.mesh
    return make_judge(source, [], mesh) if source else self.ngrams

  def of_texts(
    self, texts: Sequence[str], documents: Clusters = None
  ) -> dict[str, Estimate]:
    """Returns the metrics of some texts; see `text_metrics.measure`."""
    return text_metrics.measure(
      texts,
      documents,
      language=self._config.data.language,
      judge=self.judge,
      copies=self._copies,
    )

  def text_metrics(
    self,
    params: Params,
    drawn: Sequence[str],
    tuned: SampleConfig | None = None,
  ) -> dict[str, Any]:
    """Returns the metrics of samples and of test text as plain values.

    Args:
      params: the averaged parameters.
      drawn: texts drawn with the run's settings.
      tuned: the tuned sampling settings, if there are any.
    """
    config, count = self._config, len(drawn)
    measured = {"sampling": self.of_texts(drawn)}
    # Also at T = 1 without filters: the model's own distribution.
    others = {"tuned": tuned, "untruncated": config.sample.untruncated()}
    for name, settings in others.items():
      if settings:
        texts = self.draw(params, settings, count).texts
        measured[name] = self.of_texts(texts)
    own = self.held_out(self._data.test, count)
    measured["held_out"] = own.metrics
    return {
      name: text_metrics.as_json(values) for name, values in measured.items()
    } | {"judge": self.judge.name, "test text": own.description}

  def held_out(
    self, held: HeldOut, count: int, pool: int | None = None
  ) -> HeldOutTexts:
    """Measures held-out texts, to compare samples with.

    Args:
      held: the held-out rows.
      count: number of texts.
      pool: samples whose pooled metrics are compared (None: count).
    """
    # Texts of the samples' length: shorter ones repeat less, so the metrics
    # could not be compared.
    texts = functools.partial(running_texts, held, self._data.tokenizer)
    length, pool = self._config.sample_length, pool or count
    own = texts(count, length)
    description = own.description
    if len(own.texts) < count:
      console.print(f"warning: reference texts: {description}")
    metrics = self.of_texts(own.texts, own.documents)
    there_are = count_within_documents(held, length)
    if (most := min(_MORE * pool, there_are)) > pool:
      more = texts(most, length)
      metrics |= text_metrics.of_pools(pool, more.texts, more.documents)
      description += f"; diversity of {pool} is the mean over choices of {most}"
    return HeldOutTexts(metrics, len(own.texts), description)

  @functools.cached_property
  def _copies(self) -> Ngrams | None:
    return training_ngrams(self._config.rows, self.training)

  def _unmasking(self, drawn: Samples) -> dict[str, Any]:
    """Returns the first sample at every step: its pieces, None where masked."""
    vocab, tokenizer = self._data.tokenizer.vocab, self._data.tokenizer
    steps = [
      [None if i == vocab.mask else tokenizer.decode([i]) for i in ids]
      for ids in drawn.path[:, 0].tolist()
    ]
    settings = effective(self._config.sample, self.method.unused)
    return {"settings": settings, "steps": steps}
