"""Which revealed tokens are masked again, to be drawn a second time.

Source: ReMDM, Wang et al. 2025, arXiv 2503.00307. There each revealed token
goes back with a probability sigma, at most (1 - alpha_s) / alpha_t, and so many
more masked ones are revealed that the expected number still follows the
schedule. Here both are counts, so the number follows it exactly:

cap      sigma = min(rate, its most)
rescale  sigma = rate x its most
conf     as cap, but tokens that were unlikely when drawn go back rather
loop     as cap, while the schedule rests at 0.9 for half of the steps

All but `conf` keep every token's marginal distribution where a step draws one
token. Several are drawn apart from each other, as without a corrector: they
need not fit together, and what is drawn again given them is off in its marginal
too. What `conf` puts back depends on what was drawn: likely tokens become more
frequent, however many a step draws.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float64, Int, Int32, Key

from mdm_jax.core.registry import Registry

# The paper's loop: up to a share, rest there, and reveal what is left.
_LOOP_SHARE, _LOOP_FROM, _LOOP_UNTIL = 0.9, 0.45, 0.95


@dataclasses.dataclass(frozen=True)
class Way:
  """How many tokens go back, and which.

  Attributes:
    share: (rate, tokens before a step, after it, at most) -> how many go back
      on average. Counts are arrays [steps, free tokens of a row].
    unlikely_first: tokens that were unlikely when drawn go back rather.
    rests: the schedule rests for half of the steps.
  """

  share: Callable[[float, Any, Any, Any], Any]
  unlikely_first: bool = False
  rests: bool = False


WAYS: Registry[Way] = Registry("way of remasking", "sample.remasking")


def _capped(rate: float, before: Any, after: Any, most: Any) -> Any:
  return np.minimum(rate * before, most)


WAYS.register("none", Way(lambda rate, before, after, most: 0 * most))
WAYS.register("cap", Way(_capped))
WAYS.register("rescale", Way(lambda rate, before, after, most: rate * most))
WAYS.register("conf", Way(_capped, unlikely_first=True))
WAYS.register(
  "loop",
  Way(
    lambda rate, before, after, most: np.where(
      before == after, np.minimum(rate * before, most), 0
    ),
    rests=True,
  ),
)


def rest(shares: Float64[np.ndarray, "S"]) -> Float64[np.ndarray, "S"]:
  """Returns the shares of the loop: the given ones, hurried, then a rest."""
  steps = np.linspace(0, 1, len(shares))
  hurried = np.interp(steps / _LOOP_FROM, steps, shares) * _LOOP_SHARE
  last = (steps - _LOOP_UNTIL) / (1 - _LOOP_UNTIL) * (1 - _LOOP_SHARE)
  return hurried + np.clip(last, 0, None)


def counts(
  remasking: str, rate: float, table: Int32[np.ndarray, "S N"]
) -> Int32[np.ndarray, "S-1 N"]:
  """Returns how many of n tokens each step of a schedule puts back.

  Args:
    remasking: the way, by its name.
    rate: as in the table above.
    table: of a schedule; entry [i, n] is revealed before step i.
  """
  before, after = table[:-1].astype(float), table[1:]
  most = np.minimum(before, table[-1] - after)
  share = WAYS[remasking].share(rate, before, after, most)
  # Less than a token a step adds up to one in some.
  summed = np.floor(np.cumsum(share, axis=0) + 1e-9)
  return np.minimum(np.diff(summed, axis=0, prepend=0), most).astype(np.int32)


def chosen(
  remasking: str,
  row_keys: Key[Array, "B"],
  eligible: Bool[Array, "B L"],
  confidence: Float[Array, "B L"],
  number: Int[Array, "B"],
) -> Bool[Array, "B L"]:
  """Draws which `number` of the eligible tokens are put back.

  All alike, or where unlikely ones go first with weights exp(-confidence), one
  after the other (the paper's softmax).
  """
  draw = lambda key: jax.random.gumbel(key, eligible.shape[1:])
  score = jax.vmap(draw)(row_keys)
  if WAYS[remasking].unlikely_first:
    score = score - confidence
  score = jnp.where(eligible, score, -jnp.inf)
  place = jnp.argsort(jnp.argsort(-score, axis=1), axis=1)
  return eligible & (place < number[:, None])
