"""What samples are like, beside held-out text of the same length.

Measured three times with the same measures: samples as the run's settings draw
them, samples of the model itself (T = 1, nothing cut off), and held-out text.
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
  """All measures of texts, with what they compare them to."""

  def __init__(
    self,
    judge: Judge,
    training: Ngrams | Sequence[str],
    language: str = "en",
  ):
    """Names what texts are compared to, and the language they are in."""
    self._judge = judge
    self._language = language
    self._copies = CopyIndex(training)

  def __call__(
    self, texts: Sequence[str], documents: Clusters = None
  ) -> dict[str, Estimate]:
    """Returns every measure of these texts, by name.

    Args:
      texts: to be measured.
      documents: that each is from (None: each is a draw of its own).
    """
    return measure(texts, self._language, documents, self._judge, self._copies)


def untruncated(config: SampleConfig) -> SampleConfig:
  """Returns settings that draw from the model's own distribution."""
  return dataclasses.replace(
    config,
    temperature=1.0,
    temperature_range=None,
    top_k=None,
    min_p=None,
    top_p=None,
  )


def as_plain(measured: dict[str, Estimate]) -> dict[str, dict[str, Any]]:
  """Returns JSON values and titles; None for what could not be measured."""
  number = lambda x: None if x != x else float(x)
  return {
    name: {"title": METRICS[name].heading}
    | {"value": number(m.value), "stderr": number(m.stderr), "n": m.n}
    | ({"reason": m.reason} if m.reason else {})
    for name, m in measured.items()
  }
