"""Sampling schedules: how many tokens each step reveals.

A schedule is an integer table: entry [i, n] is how many of a row's n free
tokens are revealed before step i. Thus every row is complete after the last
step, and no step is idle while tokens outnumber steps. A budget instead looks
at the distributions, and reveals as many tokens as can safely be drawn
independently; it is never slower than an even pace over the remaining steps.

Fixed counts are better than revealing each token with some probability. Under
random order, a step that reveals tokens number s .. e - 1 at once has the
expected divergence

  sum over j in s .. e - 1 of (h_s - h_j),

where h_j is the mean loss of a masked token when j tokens are revealed
(Lavenant and Zanella 2025, arXiv 2510.25544; Chen, Cong and Li 2025, arXiv
2511.04647). An evaluation of a masked model measures h_j anyway, as its loss by
mask rate, so dynamic programming gives the optimal schedule for any number of
steps.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float64, Int32

from mdm_jax.core.errors import UserError
from mdm_jax.core.registry import Registry
from mdm_jax.objectives.measured import Curve
from mdm_jax.sampling import remasking
from mdm_jax.sampling.config import SampleConfig

# (num_steps, length, loss by mask rate or None) -> the fraction of a row's
# tokens revealed before each step, and 1 after the last: num_steps + 1 entries.
Shares = Callable[[int, int, Curve | None], Float64[np.ndarray, "S"]]
SCHEDULES: Registry[Shares] = Registry("sampling schedule", "sample.schedule")


@SCHEDULES.register("linear")
def linear(num_steps: int, *_: Any) -> Float64[np.ndarray, "S"]:
  """Returns the fraction revealed before each step: equal steps."""
  return np.arange(num_steps + 1) / num_steps


@SCHEDULES.register("cosine")
def cosine(num_steps: int, *_: Any) -> Float64[np.ndarray, "S"]:
  """Returns the fraction revealed before each step: few tokens at first.

  Source: MaskGIT, Chang et al. 2022, arXiv 2202.04200.
  """
  shares = 1 - np.cos(np.pi / 2 * np.arange(num_steps + 1) / num_steps)
  shares[-1] = 1  # exactly: cos(pi / 2) is not 0 in floating point
  return shares


def optimal(
  losses: Float64[np.ndarray, "L"], num_steps: int
) -> Float64[np.ndarray, "S"]:
  """Returns the schedule of least expected divergence under random order.

  Args:
    losses: h_j for j = 0 .. L - 1 revealed tokens, in nats.
    num_steps: number of steps; those beyond L reveal nothing.

  Returns:
    The fraction revealed before each step, and 1 after the last.
  """
  length, steps = len(losses), min(num_steps, len(losses))
  total = np.concatenate([[0.0], np.cumsum(losses)])
  # cost[s, e]: the divergence of a step that reveals tokens s .. e - 1.
  start, end = np.arange(length)[:, None], np.arange(length + 1)[None]
  cost = (end - start) * losses[:, None] - (total[None] - total[:length, None])
  cost = np.where(end > start, cost, np.inf)
  # best[e]: the least cost of revealing e tokens in the steps so far, with the
  # argmin kept for backtracking.
  best, before = cost[0], []
  for _ in range(steps - 1):
    by_start = best[:length, None] + cost
    before.append(by_start.argmin(axis=0))
    best = by_start.min(axis=0)
  bounds = [length]
  for choice in reversed(before):
    bounds.append(int(choice[bounds[-1]]))
  bounds += [0] * (num_steps + 1 - len(bounds))
  return np.array(bounds[::-1]) / length


def losses_by_revealed(
  curve: Curve, length: int
) -> Float64[np.ndarray, "{length}"]:
  """Returns h_j for j = 0 .. length - 1 from a curve of loss by mask rate.

  Interpolates linearly, and is constant below the lowest measured rate. Made
  non-increasing in j: only measurement noise could make it rise.
  """
  masked = 1 - np.arange(length) / length
  losses = np.interp(masked, np.array(curve.x), np.array(curve.y))
  return np.minimum.accumulate(losses)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pace:
  """A schedule as tables over n = 0 .. L, a row's number of free tokens.

  Leaves are int32 arrays, or shapes during abstract evaluation.

  Attributes:
    revealed: tokens revealed before each of S steps and after the last
      [S + 1, L + 1].
    put_back: tokens that each step remasks [S, L + 1].
  """

  revealed: Any
  put_back: Any


def pace(config: SampleConfig, length: int, curve: Curve | None = None) -> Pace:
  """Returns the tables of a config's schedule and remasking.

  Args:
    config: how to sample.
    length: tokens per row L.
    curve: loss by mask rate; only read by the optimal schedule.

  Raises:
    UserError: the schedule is optimal and `curve` is None.
  """
  shares = SCHEDULES[config.schedule](config.num_steps, length, curve)
  if remasking.METHODS[config.remasking].pauses:
    # The pause consists of idle steps, so these are kept.
    counts = table(remasking.with_pause(shares), length)
  else:
    even = table(shares, length)
    counts = without_idle_steps(even)
    if config.remasking != "none":
      # Rows with fewer tokens than steps keep their idle steps, to remask in.
      counts[:, : config.num_steps] = even[:, : config.num_steps]
  back = remasking.counts(config.remasking, config.remasking_rate, counts)
  return Pace(counts, back)


@SCHEDULES.register("optimal")
def _optimal(
  num_steps: int, length: int, curve: Curve | None
) -> Float64[np.ndarray, "S"]:
  if curve is None:
    raise UserError(
      "sample.schedule=optimal needs the loss at each mask rate, which this run"
      " has not measured: run --mode=eval --config.sample.schedule=linear first"
      " (not every objective measures it)"
    )
  return optimal(losses_by_revealed(curve, length), num_steps)


def table(
  shares: Float64[np.ndarray, "S"], length: int
) -> Int32[np.ndarray, "S {length}+1"]:
  """Returns how many of n = 0 .. length tokens are revealed before a step."""
  # 3 / 25 of 25 tokens should be 3, but may round to slightly less.
  counts = np.floor(shares[:, None] * np.arange(length + 1) + 1e-9)
  return counts.astype(np.int32)


def without_idle_steps(
  counts: Int32[np.ndarray, "S N"],
) -> Int32[np.ndarray, "S N"]:
  """Adjusts counts so that every step reveals a token while there are enough.

  Args:
    counts: as from `table`; the last row is the number of free tokens.
  """
  counts, steps, free = counts.copy(), len(counts) - 1, counts[-1]
  # Forwards, each step reveals a token at least; backwards, each leaves one for
  # every step after it.
  for i in range(1, steps + 1):
    counts[i] = np.maximum(counts[i], counts[i - 1] + 1)
  for i in range(steps, -1, -1):
    counts[i] = np.minimum(counts[i], free - (steps - i))
  return np.clip(counts, 0, free).astype(np.int32)


# MARK: budgets


def within_entropy(
  entropies: Float[Array, "B N"], bound: float
) -> Bool[Array, "B N"]:
  """Selects the longest prefix that an entropy bound allows (EB-sampler).

  The divergence of drawing tokens independently is at most the sum of their
  entropies less the largest one. Source: Ben-Hamu et al. 2025, arXiv
  2505.24857.

  Args:
    entropies: in nats, by rank; +inf ends a prefix.
    bound: most divergence, in nats.
  """
  # For the first token this is 0, so it is always taken. Unless it is inf: then
  # it is NaN, which no bound admits.
  shared = jnp.cumsum(entropies, axis=1) - jax.lax.cummax(entropies, axis=1)
  return jnp.cumprod(shared <= bound, axis=1).astype(bool)
