"""Searches sampling settings whose texts are closest to held-out text.

Rounds go from coarse to fine: each adds settings near the best so far, draws
more texts of each than the round before, with the same seeds for all, and keeps
the best (successive halving: Jamieson and Talwalkar 2016, arXiv 1502.07943).
Every round draws new texts, so that luck in one doesn't help in the next.

The best settings are those whose texts are at most as repetitive and at least
as diverse as text itself, up to a standard error of the difference, and
which a judge finds likeliest among these. The last round, with the most texts,
allows half an error: settings on the edge would miss it with new texts.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mdm_jax.core.standard_errors import Estimate
from mdm_jax.sampling.config import SampleConfig
from mdm_jax.sampling.order import ORDERS
from mdm_jax.sampling.tokens import effective_temperature

JUDGE = "judge_nll"
# 1: must not exceed the text's own value; -1: must not be below it.
CRITERIA = {
  **{f"seq_rep_{n}": 1 for n in (2, 3, 4)},
  **{"unigram_entropy": -1, "distinct_2": -1, "unique_starts@1": -1},
}
_LEAST_ERROR = 0.002  # a share of 0 ± 0 is known no better than this
_UNKNOWN_ERROR = 0.1  # relative, of a value from a single document

Measured = Mapping[str, Estimate]
# (settings, number of texts, seed) -> what the texts are like.
Measure = Callable[[SampleConfig, int, int], Measured]


@dataclasses.dataclass(frozen=True)
class Trial:
  """Settings, and what texts drawn with them are like.

  Attributes:
    settings: how the texts were sampled.
    measured: their metrics.
    beyond: standard errors by which they are more repetitive or less diverse
      than is allowed, summed over the criteria; 0 if none is violated.
  """

  settings: SampleConfig
  measured: Measured
  beyond: float

  @property
  def rank(self) -> tuple[float, float]:
    """Sorts trials, the best first."""
    return self.beyond, self.measured[JUDGE].value


@dataclasses.dataclass(frozen=True)
class Round:
  """One round of the search.

  Attributes:
    name: what it varies.
    propose: settings to add, given the best so far.
    texts: texts to draw with each settings.
    keep: settings that the next round goes on with.
    errors: standard errors of a difference from held-out text that are allowed.
  """

  name: str
  propose: Callable[[Sequence[SampleConfig]], list[SampleConfig]]
  texts: int
  keep: int
  errors: float = 1.0


def beyond(measured: Measured, own: Measured, errors: float) -> float:
  """Returns by how much texts violate the criteria; see `Trial.beyond`.

  Args:
    measured: metrics of the texts.
    own: the same metrics of held-out texts.
    errors: standard errors of a difference that are allowed.
  """
  total = 0.0
  for name, sign in CRITERIA.items():
    error = math.hypot(_error(own[name]), _error(measured[name]))
    excess = sign * (measured[name].value - own[name].value)
    total += max(excess / max(error, _LEAST_ERROR) - errors, 0.0)
  return total


def _error(found: Estimate) -> float:
  known = math.isfinite(found.stderr)
  return found.stderr if known else _UNKNOWN_ERROR * abs(found.value)


def rounds(
  run: SampleConfig, num_steps: int, texts: int, has_curve: bool
) -> tuple[Round, ...]:
  """Returns the rounds of a search.

  Args:
    run: the run's own settings, which are tried first; the coarse grid has
      their order.
    num_steps: denoiser calls.
    texts: half the number for each settings of the last round.
    has_curve: whether the loss by mask rate is known, which the schedule
      `optimal` follows.
  """
  few, middle = max(3 * texts // 8, 1), max(3 * texts // 4, 1)
  first = [at_steps(run, num_steps), *coarse(plain(run, num_steps))]
  return (
    Round("temperature, truncation", lambda _: first, few, 4),
    Round("order", orders, few, 4),
    Round(
      "schedule, remasking", lambda best: paces(best, has_curve), middle, 4
    ),
    Round("finer", finer, middle, 3),
    Round("choice", looser, 2 * texts, 1, errors=0.5),
  )


def search(
  plan: Sequence[Round],
  measure: Measure,
  own: Callable[[int], Measured],
  seed: int,
  begin: Callable[[Round, int], Any] = lambda *_: None,
  report: Callable[[Round, list[Trial]], Any] = lambda *_: None,
) -> list[list[Trial]]:
  """Runs the rounds; returns the trials of each, the best first.

  Args:
    plan: the rounds.
    measure: draws texts and measures them.
    own: metrics of as many held-out texts.
    seed: the first round's seed; the next ones have the following ones.
    begin: called before each round, with the number of its settings.
    report: called after each round, with its trials, the best first.
  """
  best: list[SampleConfig] = []
  found = []
  for number, part in enumerate(plan):
    settings = dict.fromkeys([*best, *part.propose(best)])
    text = own(part.texts)
    begin(part, len(settings))
    trials = []
    for one in settings:
      measured = measure(one, part.texts, (seed + number) % 2**32)
      trials.append(Trial(one, measured, beyond(measured, text, part.errors)))
    trials.sort(key=lambda trial: trial.rank)
    report(part, trials)
    found.append(trials)
    best = [trial.settings for trial in trials[: part.keep]]
  return found


# MARK: proposals


def at_steps(settings: SampleConfig, num_steps: int) -> SampleConfig:
  """Returns settings with other denoiser calls, in the form of a trial's."""
  return dataclasses.replace(
    settings,
    num_steps=num_steps,
    temperature=effective_temperature(settings),
    temperature_range=None,
    num_samples=1,
    seed=0,
  )


def plain(settings: SampleConfig, num_steps: int) -> SampleConfig:
  """Returns settings with nothing but their order: T = 1, linear, no filters.

  Args:
    settings: the run's; length and guidance are kept, too.
    num_steps: denoiser calls.
  """
  return dataclasses.replace(
    at_steps(settings.untruncated(), num_steps),
    schedule="linear",
    remasking="none",
    block_length=None,
    cache="none",
    cache_refresh=None,
    entropy_bound=None,
    threshold=None,
  )


def coarse(start: SampleConfig) -> list[SampleConfig]:
  """Returns a grid of temperature by top-p, and by min-p."""
  grid = [
    {"temperature": t, "top_p": p}
    for t in (0.6, 0.7, 0.8, 0.9, 1.0)
    for p in (0.8, 0.9, 0.95, None)
  ]
  grid += [
    {"temperature": t, "min_p": p}
    for t in (0.8, 1.0)
    for p in (0.02, 0.05, 0.1)
  ]
  return [dataclasses.replace(start, **fields) for fields in grid]


def orders(best: Sequence[SampleConfig]) -> list[SampleConfig]:
  """Returns the two best settings with every other order."""
  return [
    dataclasses.replace(one, order=name) for one in best[:2] for name in ORDERS
  ]


def paces(best: Sequence[SampleConfig], has_curve: bool) -> list[SampleConfig]:
  """Returns the best settings with other schedules and with remasking."""
  schedules = "cosine", "optimal"
  found = [{"schedule": s} for s in schedules[: 1 + has_curve]]
  found += [
    {"remasking": name, "remasking_rate": rate}
    for name in ("cap", "conf")
    for rate in (0.05, 0.15)
  ]
  return [dataclasses.replace(best[0], **fields) for fields in found]


def finer(best: Sequence[SampleConfig]) -> list[SampleConfig]:
  """Returns neighbours of the best settings."""
  one = best[0]
  near = [{"temperature": one.temperature + d} for d in (-0.05, 0.05)]
  if one.top_p is None and one.min_p is None:
    near += [{"top_p": 0.98}]
  if one.top_p is not None:
    # By what is cut off, the number that matters.
    near += [{"top_p": 1 - (1 - one.top_p) * by} for by in (0.7, 1.4)]
  if one.min_p is not None:
    near += [{"min_p": one.min_p * by} for by in (0.7, 1.4)]
  if one.remasking != "none":
    near += [{"remasking_rate": one.remasking_rate * by} for by in (0.5, 2)]
  rounded = ({k: round(v, 4) for k, v in fields.items()} for fields in near)
  return [dataclasses.replace(one, **fields) for fields in rounded]


def looser(best: Sequence[SampleConfig]) -> list[SampleConfig]:
  """Returns the two best settings, each with two weaker truncations.

  The judge prefers strict ones: where the best are not diverse enough with new
  texts, one of these is.
  """
  return [
    dataclasses.replace(one, **_loosened(one, by))
    for one in best[:2]
    for by in (1.5, 2.25)
  ]


def _loosened(one: SampleConfig, by: float) -> dict[str, float]:
  if one.min_p is not None:
    return {"min_p": round(one.min_p / by, 4)}
  if one.top_p is not None:
    return {"top_p": round(1 - (1 - one.top_p) / by, 4)}
  return {"temperature": round(one.temperature + 0.1 * (by - 1), 4)}
