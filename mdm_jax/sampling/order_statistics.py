"""Order statistics of samples: how left-to-right, how scattered they are."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.sampling.samples import Samples

MEANING = {
  "kendall_tau": "1 from left to right, \u22121 from right to left",
  "jump": "mean distance, in tokens, to those of the previous step",
  "adjacent": "fraction revealed next to a token known before",
}


class OrderStatistic(NamedTuple):
  """A statistic of each text; NaN where it is undefined.

  Attributes:
    rows: its value.
    random: its expectation if the same positions had been revealed in random
      order, with the same number of tokens in every step.
  """

  rows: Float[np.ndarray, "B"]
  random: Float[np.ndarray, "B"]

  @property
  def mean(self) -> float:
    """Mean over the texts where the value is defined."""
    return _mean(self.rows)

  @property
  def random_mean(self) -> float:
    """Mean of `random` over the texts where it is defined."""
    return _mean(self.random)


def order_statistics(
  samples: Samples, vocab: Vocabulary
) -> dict[str, OrderStatistic]:
  """Returns statistics of the order in which tokens were revealed.

  A token counts at the step that revealed it last; given tokens and those cut
  off do not count. Steps that revealed nothing are skipped. With p the position
  of a token and s its step:

  kendall_tau: Kendall's tau-b of p and s: concordant minus discordant pairs
    over sqrt(pairs * pairs with different s). In random order: 0.
  jump: mean |p - p'| over pairs of tokens from successive steps; 1 for one
    token per step from left to right. In random order: the mean over all pairs.
  adjacent: the fraction of tokens next to a token that was given or revealed
    in an earlier step. In random order: the exact expectation.

  Args:
    samples: the texts and their paths.
    vocab: the special ids.
  """
  first = samples.path[0]
  given = (first != vocab.mask) & (first != vocab.pad)
  rows = [_row(*pair) for pair in zip(samples.step, given, strict=True)]
  columns = ([row[name] for row in rows] for name in MEANING)
  pairs = (np.array(column).reshape(-1, 2) for column in columns)
  return {
    name: OrderStatistic(pair[:, 0], pair[:, 1])
    for name, pair in zip(MEANING, pairs, strict=True)
  }


def _row(
  step: Int[np.ndarray, "L"], given: Bool[np.ndarray, "L"]
) -> dict[str, tuple[float, float]]:
  where = np.flatnonzero(step >= 0)
  if not len(where):
    return dict.fromkeys(MEANING, (math.nan, math.nan))
  _, turn = np.unique(step[where], return_inverse=True)
  return {
    "kendall_tau": (_kendall_tau(turn), 0.0),
    "jump": _jump(where, turn),
    "adjacent": _adjacent(where, turn, given),
  }


def _kendall_tau(turn: Int[np.ndarray, "N"]) -> float:
  order = np.sign(turn[None, :] - turn[:, None])[np.triu_indices(len(turn), 1)]
  # Positions have no ties, so only pairs of the same step lack an order. If all
  # were revealed in one step, tau is NaN.
  untied = np.count_nonzero(order)
  return float(order.sum() / math.sqrt(untied * len(order) or math.nan))


def _jump(
  where: Int[np.ndarray, "N"], turn: Int[np.ndarray, "N"]
) -> tuple[float, float]:
  # All pairs of positions; those of successive turns are jumps.
  distance = np.abs(where[None, :] - where[:, None])
  follows = turn[None, :] == turn[:, None] + 1
  if not follows.any():
    return math.nan, math.nan
  pairs = len(where) * (len(where) - 1)
  return float(distance[follows].mean()), float(distance.sum() / pairs)


def _adjacent(
  where: Int[np.ndarray, "N"],
  turn: Int[np.ndarray, "N"],
  given: Bool[np.ndarray, "L"],
) -> tuple[float, float]:
  never = turn.max() + 1
  # The turn in which a position becomes known, padded by one on both sides so
  # that every position has two neighbours.
  known = np.full(len(given) + 2, never)
  known[1:-1][given] = -1
  known[where + 1] = turn
  beside = np.stack([known[where], known[where + 2]])
  found = (beside.min(axis=0) < turn).mean()

  # In random order a token's turn is random, and so are those of its k drawn
  # neighbours. With `later` tokens in this turn or later, other than itself,
  # no neighbour is earlier with probability C(later, k) / C(others, k).
  count, others = np.bincount(turn), len(where) - 1
  later = others - (np.cumsum(count) - count)
  drawn = ((beside >= 0) & (beside < never)).sum(axis=0)
  none = [
    np.average([math.comb(n, k) for n in later], weights=count)
    / math.comb(others, k)
    for k in range(drawn.max() + 1)
  ]
  alone = np.where((beside < 0).any(axis=0), 0.0, np.array(none)[drawn])
  return float(found), float(1 - alone.mean())


def _mean(values: Float[np.ndarray, "B"]) -> float:
  known = values[np.isfinite(values)]
  return float(known.mean()) if len(known) else math.nan
