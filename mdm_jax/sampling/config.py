"""Configuration of sampling: order, schedule, remasking, filters, length."""

import dataclasses

from mdm_jax.core.errors import UserError
from mdm_jax.core.fields import POSITIVE, SHARE, SIZE, field


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
  """How text is drawn; a filter or limit that is None is off."""

  num_samples: int = field(4, "texts", POSITIVE)
  length: int | None = field(
    None, "tokens a text (None: the last stage's)", SIZE
  )
  num_steps: int = field(
    20, "steps, one denoiser call each, at most", "[1, 65536]"
  )
  order: str = field(
    "spread",
    "which masked tokens are revealed first",
    registry="mdm_jax.sampling.order:ORDERS",
  )
  block_length: int | None = field(
    None,
    "tokens of a block; each is finished before the next (None: one)",
    SIZE,
  )
  schedule: str = field(
    "linear",
    "tokens a step; optimal: the least divergence by the last evaluation's"
    " loss at every mask rate",
    registry="mdm_jax.sampling.schedule:SCHEDULES",
  )
  entropy_bound: float | None = field(
    None,
    "Reveal tokens while (sum of entropies - largest) <= this many nats"
    " (EB-sampler)",
    "[0, 1e6]",
  )
  threshold: float | None = field(
    None,
    "Reveal every token whose top probability exceeds this",
    SHARE,
  )
  remasking: str = field(
    "none",
    "which revealed tokens are put back",
    registry="mdm_jax.sampling.remasking:WAYS",
  )
  remasking_rate: float = field(
    0.05,
    "share of the revealed tokens that a step puts back, at most",
    SHARE,
  )
  guidance: float = field(
    0.0,
    "weight of logits with the prompt over those without (0: one call)",
    "[0, 1000]",
  )
  temperature: float = field(0.8, "divides the logits", "[1e-30, 1e30]")
  temperature_range: tuple[float, float] | None = field(
    (0.3, 0.8),
    "the temperature is clamped to this, with a warning",
    "[1e-30, 1e30]",
  )
  top_k: int | None = field(50, "keep the k likeliest tokens", POSITIVE)
  min_p: float | None = field(
    None, "drop tokens below min_p times the likeliest's probability", SHARE
  )
  top_p: float | None = field(
    0.9, "then the fewest that reach this mass", SHARE
  )
  seed: int = field(0, "of the samples", "[0, 4294967295]")

  def untruncated(self) -> "SampleConfig":
    """Returns these settings with temperature 1 and no filters."""
    return dataclasses.replace(
      self,
      temperature=1.0,
      temperature_range=None,
      top_k=None,
      min_p=None,
      top_p=None,
    )

  def check(self, path: str) -> None:
    """Raises UserError if two settings contradict each other."""
    temperatures = self.temperature_range
    if temperatures and not temperatures[0] <= temperatures[1]:
      raise UserError(f"{path}.temperature_range={temperatures} must rise")
    given = lambda *names: [n for n in names if getattr(self, n) is not None]
    budgets = given("entropy_bound", "threshold")
    if len(budgets) == 2:
      raise UserError(
        f"{path}.entropy_bound and {path}.threshold both say how much a step"
        " reveals; set one of them to None"
      )
    other = given("block_length") + budgets
    if other and self.schedule != "linear":
      raise UserError(
        f"{path}.schedule={self.schedule} has no meaning beside"
        f" {path}.{other[0]}; set {path}.schedule=linear"
      )
    if budgets and self.remasking != "none":
      raise UserError(
        f"{path}.remasking={self.remasking} needs a fixed number of tokens a"
        f" step; set {path}.{budgets[0]}=None or {path}.remasking=none"
      )
