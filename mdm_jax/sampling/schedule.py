"""How many tokens each step reveals.

A schedule is a table: entry [i, n] is how many of a row's n free tokens are
revealed before step i. It is made once, in integers, so that every row ends
after exactly its tokens, and no step is idle while there are more tokens than
steps. A budget instead looks at the distributions, and reveals as many tokens
as are safe to draw apart; it is never slower than an even pace over the steps
that are left, and so ends in time too.

Fixed counts are better than drawing who is revealed by coin flips. Under a
random order the expected divergence of a step that reveals the tokens number
s .. e - 1 at once is

  sum over j in s .. e - 1 of (h_s - h_j),

h_j being the mean loss of a masked token where j are revealed (Lavenant and
Zanella 2025, arXiv 2510.25544; Chen, Cong and Li 2025, arXiv 2511.04647).
h_j is what an evaluation of a masked model measures anyway, its curve of the
loss by the masked share, so the best schedule of any number of steps follows
from it by dynamic programming.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float64, Int32, Int64

from mdm_jax.core.errors import UserError
from mdm_jax.core.registry import Registry
from mdm_jax.objectives.measured import Curve
from mdm_jax.sampling import remasking
from mdm_jax.sampling.config import SampleConfig

# (steps, tokens of a row, loss by masked share if it was measured) -> the share
# of the tokens that is revealed before each step, and 1 after the last.
Shares = Callable[[int, int, Curve | None], Float64[np.ndarray, "S"]]
SCHEDULES: Registry[Shares] = Registry("sampling schedule", "sample.schedule")


@SCHEDULES.register("linear")
def linear(num_steps: int, *_: Any) -> Float64[np.ndarray, "S"]:
  """Returns the share revealed before each step, the same in every step."""
  return np.arange(num_steps + 1) / num_steps


@SCHEDULES.register("cosine")
def cosine(num_steps: int, *_: Any) -> Float64[np.ndarray, "S"]:
  """Returns the share revealed before each step, slow at first.

  Source: Chang et al. 2022, arXiv 2202.04200 (MaskGIT).
  """
  shares = 1 - np.cos(np.pi / 2 * np.arange(num_steps + 1) / num_steps)
  shares[-1] = 1
  return shares


def optimal(
  losses: Float64[np.ndarray, "L"], num_steps: int
) -> Float64[np.ndarray, "S"]:
  """Returns the shares with the least expected divergence, by random order.

  Args:
    losses: h_j for j = 0 .. L - 1 revealed tokens.
    num_steps: at most so many parts.
  """
  length, steps = len(losses), min(num_steps, len(losses))
  total = np.concatenate([[0.0], np.cumsum(losses)])
  start, end = np.arange(length)[:, None], np.arange(length + 1)[None]
  cost = (end - start) * losses[:, None] - (total[None] - total[:length, None])
  cost = np.where(end > start, cost, np.inf)
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


def expected_divergence(
  losses: Float64[np.ndarray, "L"], bounds: Int64[np.ndarray, "S"]
) -> float:
  """Returns the divergence of a schedule under random order, in nats.

  Args:
    losses: h_j for j = 0 .. L - 1 revealed tokens.
    bounds: tokens revealed before each step, and after the last.
  """
  return float(
    sum(
      (losses[s] - losses[s:e]).sum()
      for s, e in zip(bounds, bounds[1:], strict=False)
    )
  )


def losses_by_revealed(
  curve: Curve, length: int
) -> Float64[np.ndarray, "{length}"]:
  """Returns h_j of a row of `length` from a curve of loss by masked share.

  Between the shares that were measured it is linear, below the lowest constant;
  and it never rises with j, which only noise could make it do.
  """
  masked = 1 - np.arange(length) / length
  losses = np.interp(masked, np.array(curve.x), np.array(curve.y))
  return np.minimum.accumulate(losses)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pace:
  """How many of n = 0 .. L free tokens a row has revealed, and puts back.

  Arrays of int32, or shapes where nothing is computed.

  Attributes:
    revealed: before each of S steps, and after the last, [S + 1, L + 1].
    put_back: in each step, [S, L + 1].
  """

  revealed: Any
  put_back: Any


def pace(
  config: SampleConfig,
  length: int,
  curve: Curve | None = None,
) -> Pace:
  """Returns the pace of rows of `length` tokens.

  Args:
    config: how to draw.
    length: of a row; it may have any number of free tokens.
    curve: loss by masked share; only read for the optimal schedule.

  Raises:
    UserError: the optimal schedule has no curve to follow from.
  """
  shares = SCHEDULES[config.schedule](config.num_steps, length, curve)
  if remasking.WAYS[config.remasking].rests:
    counts = table(remasking.rest(shares), length)
  else:
    even = table(shares, length)
    counts = without_idle_steps(even)
    if config.remasking != "none":
      # More steps than tokens are steps to put tokens back in.
      counts[:, : config.num_steps] = even[:, : config.num_steps]
  back = remasking.counts(config.remasking, config.remasking_rate, counts)
  return Pace(counts, back)


@SCHEDULES.register("optimal")
def _optimal(
  num_steps: int, length: int, curve: Curve | None
) -> Float64[np.ndarray, "S"]:
  if curve is None:
    raise UserError(
      "sample.schedule=optimal follows the curve of the loss by the masked"
      " share of the text, and this run has none: --mode=eval"
      " --config.sample.schedule=linear measures it, if the objective does"
    )
  return optimal(losses_by_revealed(curve, length), num_steps)


def table(
  shares: Float64[np.ndarray, "S"], length: int
) -> Int32[np.ndarray, "S {length}+1"]:
  """Returns how many of n = 0 .. length tokens each step finds revealed."""
  # A share such as 3 / 25 of 25 is a whole number but for rounding.
  counts = np.floor(shares[:, None] * np.arange(length + 1) + 1e-9)
  return counts.astype(np.int32)


def without_idle_steps(
  counts: Int32[np.ndarray, "S N"],
) -> Int32[np.ndarray, "S N"]:
  """Moves counts apart: every step reveals a token while there are enough."""
  counts, steps, free = counts.copy(), len(counts) - 1, counts[-1]
  for i in range(1, steps + 1):
    counts[i] = np.maximum(counts[i], counts[i - 1] + 1)
  for i in range(steps, -1, -1):
    counts[i] = np.minimum(counts[i], free - (steps - i))
  return np.clip(counts, 0, free).astype(np.int32)


# MARK: budgets: as many as are safe


def within_entropy(
  entropies: Float[Array, "B N"], bound: float
) -> Bool[Array, "B N"]:
  """Takes the longest prefix whose joint error is at most the bound, in nats.

  Tokens drawn apart can share at most the sum of their entropies but the
  largest. Source: Ben-Hamu et al. 2025, arXiv 2505.24857.
  """
  shared = jnp.cumsum(entropies, axis=1) - jax.lax.cummax(entropies, axis=1)
  return jnp.cumprod(shared <= bound, axis=1).astype(bool)
