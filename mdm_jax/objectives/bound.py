"""What is measured of a masked model on held-out text, and how it is called."""

from collections.abc import Sequence

from mdm_jax.data.config import StageConfig
from mdm_jax.objectives.measured import (
  LOSS_BY_MASKED_SHARE,
  SCORE,
  Chart,
  Curve,
  Likelihood,
  Value,
)

HEADLINE = "nelbo_per_token"
CURVE = "ce_by_mask_rate"
_UNIT = "nats per masked token"

# What of the log is drawn over updates.
CHARTS = {
  "train/loss": Chart("Training loss", _UNIT),
  f"validation/{HEADLINE}": Chart(
    "Validation NELBO", "nats per token", "validation/nelbo_stderr"
  ),
  "train/mask_rate": Chart("Mask rate", "mean over rows", low=0),
}


def describe(stage: StageConfig) -> str:
  """Returns which mask rates a stage trains on, in words."""
  told = "mask rate {:g}\u2013{:g}".format(*rates(stage))
  if stage.objective.rehearsal:
    told += f", any in {stage.objective.rehearsal:.0%} of rows"
  return told


def rates(stage: StageConfig) -> tuple[float, float]:
  """Returns the range of mask rates that a stage is made for."""
  return stage.objective.mask_rate or (0.0, 1.0)


def bands(
  stages: Sequence[StageConfig],
) -> tuple[tuple[float, float, str], ...]:
  """Returns the range of each stage, to be marked on the curve."""
  return tuple((*rates(stage), stage.name) for stage in stages)


def likelihood(
  total_nats: float, tokens: int, num_bytes: int, stderr: float
) -> Likelihood:
  """Returns the bound over all mask rates."""
  return Likelihood(
    "nelbo", "NELBO", total_nats, tokens, num_bytes, stderr, exact=False
  )


def in_range(low: float, high: float, loss: float) -> dict[str, Value]:
  """Returns the mean CE of a masked token over a range of mask rates."""
  title = f"CE at mask rates {low:g} to {high:g}"
  name = f"stage_ce/{low:g},{high:g}"
  return {name: Value(loss, title, _UNIT, role=SCORE)}


def curve(by_rate: Sequence[tuple[float, float]]) -> Curve:
  """Returns the mean CE of a masked token at each of some mask rates."""
  x, y = zip(*by_rate, strict=True)
  return Curve(
    tuple(map(float, x)),
    tuple(map(float, y)),
    "Cross-entropy by mask rate",
    _UNIT,
    LOSS_BY_MASKED_SHARE,
    x_title="mask rate",
    point="CE at mask rate {}",
    form=".2f",
    note="How well a token is guessed when this share of the text is hidden."
    " The area under the curve is the NELBO. The bands are the mask rates each"
    " stage is made for.",
  )
