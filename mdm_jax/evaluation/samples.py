"""Text metrics of samples, next to those of held-out text of the same length.

The same metrics are applied to samples with the run's settings, to samples from
the model's own distribution (temperature 1, no filters), and to held-out text.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from mdm_jax.core.standard_errors import Clusters, Estimate
from mdm_jax.data.ngrams import Ngrams
from mdm_jax.evaluation.judge import Judge
from mdm_jax.evaluation.text_metrics import METRICS, CopyIndex, measure
from mdm_jax.sampling.config import SampleConfig


class TextMeasures:
  """All text metrics, with their judge and an index of the training text."""

  def __init__(
    self,
    judge: Judge,
    training: Ngrams | Sequence[str],
    language: str = "en",
  ):
    """Indexes the training text.

    Args:
      judge: language model that scores texts.
      training: training text, or its n-grams if they are indexed already; used
        to detect copies.
      language: ISO 639-1 code of the texts.
    """
    self._judge = judge
    self._language = language
    self._copies = CopyIndex(training)

  def __call__(
    self, texts: Sequence[str], documents: Clusters = None
  ) -> dict[str, Estimate]:
    """Returns all metrics of some texts, by name.

    Args:
      texts: texts to measure.
      documents: document that each text is from, for standard errors; None if
        texts are independent, as samples are.
    """
    return measure(texts, self._language, documents, self._judge, self._copies)


def untruncated(config: SampleConfig) -> SampleConfig:
  """Returns a config with temperature 1 and no filters."""
  return dataclasses.replace(
    config,
    temperature=1.0,
    temperature_range=None,
    top_k=None,
    min_p=None,
    top_p=None,
  )


def as_plain(measured: dict[str, Estimate]) -> dict[str, dict[str, Any]]:
  """Returns metrics as JSON, with their titles; None for undefined values."""
  # JSON has no NaN; x != x is true for NaN only.
  number = lambda x: None if x != x else float(x)
  return {
    name: {"title": METRICS[name].heading}
    | {"value": number(m.value), "stderr": number(m.stderr), "n": m.n}
    | ({"reason": m.reason} if m.reason else {})
    for name, m in measured.items()
  }
