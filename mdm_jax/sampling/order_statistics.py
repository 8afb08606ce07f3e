"""In what order the tokens of texts were revealed, in numbers."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.sampling.generate import Samples

MEANING = {
  "kendall_tau": "1 from left to right, \u22121 from right to left",
  "jump": "tokens from those of the step before, on average",
  "adjacent": "share revealed beside a token known before",
}


class OrderStatistic(NamedTuple):
  """A number for each text; NaN where it means nothing.

  Attributes:
    rows: what it is.
    random: what it would be on average, had the same steps revealed as many
      tokens each, at the same positions, in random order.
  """

  rows: Float[np.ndarray, "B"]
  random: Float[np.ndarray, "B"]

  @property
  def mean(self) -> float:
    """Mean over the texts that have a number."""
    return _mean(self.rows)

  @property
  def random_mean(self) -> float:
    """Mean of `random`, likewise."""
    return _mean(self.random)


def order_statistics(
  samples: Samples, vocab: Vocabulary
) -> dict[str, OrderStatistic]:
  """Returns how left-to-right, and how scattered, the revealing was.

  A token counts in the step that revealed it last; given and cut-off ones do
  not count. Steps that revealed nothing are left out. With p the position of a
  token and s its step:

  kendall_tau: tau-b of p and s: pairs with p and s in the same order, less
    those in opposite order, over sqrt(pairs * pairs of different s). Random: 0.
  jump: mean |p - p'| over pairs of tokens from a step and from the one before.
    1 from left to right, one at a time. Random: the mean over all pairs.
  adjacent: the share of tokens with a neighbour that was given or has an
    earlier step. Random: its expectation, exactly.
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
  untied = np.count_nonzero(order)
  return float(order.sum() / math.sqrt(untied * len(order) or math.nan))


def _jump(
  where: Int[np.ndarray, "N"], turn: Int[np.ndarray, "N"]
) -> tuple[float, float]:
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
  known = np.full(len(given) + 2, never)  # a position's turn, at 1 more
  known[1:-1][given] = -1
  known[where + 1] = turn
  beside = np.stack([known[where], known[where + 2]])
  found = (beside.min(axis=0) < turn).mean()

  # At random, a token's turn is any, and its k drawn neighbours are any others:
  # none is earlier with probability C(later, k) / C(others, k).
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
