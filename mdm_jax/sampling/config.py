"""Configuration of sampling: order, schedule, remasking, filters, length."""

import dataclasses
from typing import Literal

from mdm_jax.core.errors import UserError
from mdm_jax.core.fields import POSITIVE, SHARE, SIZE, field


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
  """How text is drawn; a filter or limit that is None is off."""

  num_samples: int = field(4, "number of texts to draw", POSITIVE)
  length: int | None = field(
    None, "tokens per text (None: the last stage's length)", SIZE
  )
  num_steps: int = field(
    20, "maximum number of steps, each one denoiser call", "[1, 65536]"
  )
  order: str = field(
    "spread",
    "order in which masked tokens are revealed",
    registry="mdm_jax.sampling.order:ORDERS",
  )
  end_last: bool = field(
    False,
    "with an order by logits: reveal positions whose likeliest token is"
    " end-of-text after all others",
  )
  block_length: int | None = field(
    None,
    "tokens per block; blocks are filled from left to right (None: one block)",
    SIZE,
  )
  schedule: str = field(
    "linear",
    "how many tokens each step reveals; optimal: least expected divergence,"
    " by the last evaluation's loss at each mask rate",
    registry="mdm_jax.sampling.schedule:SCHEDULES",
  )
  entropy_bound: float | None = field(
    None,
    "reveal tokens while (sum of entropies - largest) <= this many nats"
    " (EB-sampler)",
    "[0, 1e6]",
  )
  threshold: float | None = field(
    None, "reveal every token whose top probability exceeds this", SHARE
  )
  remasking: str = field(
    "none",
    "which revealed tokens are masked again",
    registry="mdm_jax.sampling.remasking:METHODS",
  )
  remasking_rate: float = field(
    0.05,
    "largest fraction of the revealed tokens that a step masks again",
    SHARE,
  )
  cache: Literal["none", "prefix", "dual"] = field(
    "none",
    "approximate cache of a masked model: keys and values before the current"
    " block (prefix), or before and behind it (dual), are those of the last"
    " call over the whole row",
  )
  cache_refresh: int | None = field(
    None,
    "with a cache, read the whole row at least every so many steps (None: when"
    " its block changes)",
    POSITIVE,
  )
  hole_length: Literal["likeliest", "drawn"] = field(
    "likeliest",
    "tokens of a hole whose length is not told, [MASK:1-8]: the likeliest"
    " number, or drawn anew for each text",
  )
  hole_rule: Literal["auto", "bayes"] = field(
    "auto",
    "how likely each of these numbers is; auto: as the model learned, if it was"
    " trained with `data.untold_holes`, else by Bayes' rule",
  )
  guidance: float = field(
    0.0,
    "classifier-free guidance weight w: logits u + (1 + w)(c - u), with (c) and"
    " without (u) the prompt (0: off, one denoiser call per step)",
    "[0, 1000]",
  )
  temperature: float = field(0.8, "divides the logits", "[1e-30, 1e30]")
  temperature_range: tuple[float, float] | None = field(
    (0.3, 0.8),
    "range that the temperature is clamped to, with a warning",
    "[1e-30, 1e30]",
  )
  top_k: int | None = field(50, "keep the k most likely tokens", POSITIVE)
  min_p: float | None = field(
    None,
    "drop tokens with less than min_p times the highest probability",
    SHARE,
  )
  top_p: float | None = field(
    0.9,
    "keep the fewest most likely tokens whose probabilities sum to this",
    SHARE,
  )
  seed: int = field(0, "random seed of the samples", "[0, 4294967295]")

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
      raise UserError(
        f"{path}.temperature_range={temperatures} must be (low, high)"
      )
    given = lambda *names: [n for n in names if getattr(self, n) is not None]
    budgets = given("entropy_bound", "threshold")
    if len(budgets) == 2:
      raise UserError(
        f"{path}.entropy_bound and {path}.threshold both decide how many"
        " tokens a step reveals; set one of them to None"
      )
    self._check_cache(path)
    other = given("block_length") + budgets
    if other and self.schedule != "linear":
      raise UserError(
        f"{path}.schedule={self.schedule} has no effect beside"
        f" {path}.{other[0]}; set {path}.schedule=linear"
      )
    if budgets and self.remasking != "none":
      raise UserError(
        f"{path}.remasking={self.remasking} needs a fixed number of tokens"
        f" per step; set {path}.{budgets[0]}=None or {path}.remasking=none"
      )

  def _check_cache(self, path: str) -> None:
    if self.cache != "none" and self.block_length is None:
      raise UserError(
        f"{path}.cache={self.cache} needs blocks; set {path}.block_length, such"
        f" as 32, or {path}.cache=none"
      )
    if self.cache != "none" and self.guidance:
      raise UserError(
        f"{path}.cache={self.cache} has one cache, and {path}.guidance="
        f"{self.guidance} two calls; set {path}.guidance=0.0"
      )
