"""Remasking: masks some revealed tokens again, so that they are redrawn.

Source: ReMDM, Wang et al. 2025, arXiv 2503.00307. There every revealed token is
remasked with probability sigma, at most sigma_max = (1 - alpha_s) / alpha_t,
and more masked tokens are revealed in return, so that the expected number of
revealed tokens follows the schedule. Here both are exact counts:

cap      sigma = min(rate, sigma_max)
rescale  sigma = rate * sigma_max
conf     like cap, but prefers tokens that had a low probability when drawn
loop     like cap, while the schedule pauses at 0.9 for half of the steps

With one token per step, all but `conf` preserve every token's marginal
distribution. Several tokens per step are drawn independently, as without
remasking: they need not fit together, and a token redrawn given them is off in
its marginal, too. `conf` makes likely tokens more frequent in any case, since
what it remasks depends on what was drawn.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float64, Int, Int32, Key

from mdm_jax.core.registry import Registry

# The paper's loop: reveal 0.9 until 0.45 of the steps, pause, go on at 0.95.
_LOOP_SHARE, _LOOP_FROM, _LOOP_UNTIL = 0.9, 0.45, 0.95


@dataclasses.dataclass(frozen=True)
class Method:
  """A remasking method: how many tokens, and which.

  Attributes:
    share: (rate, before, after, most) -> mean number of tokens that each step
      remasks, where the arguments are the tokens revealed before and after the
      step and the most that can be remasked [steps, free tokens of a row].
    unlikely_first: prefer tokens that had a low probability when drawn.
    pauses: the schedule pauses for half of the steps.
  """

  share: Callable[[float, Any, Any, Any], Any]
  unlikely_first: bool = False
  pauses: bool = False


METHODS: Registry[Method] = Registry("remasking method", "sample.remasking")


def _capped(rate: float, before: Any, after: Any, most: Any) -> Any:
  return np.minimum(rate * before, most)


METHODS.register("none", Method(lambda rate, before, after, most: 0 * most))
METHODS.register("cap", Method(_capped))
METHODS.register(
  "rescale", Method(lambda rate, before, after, most: rate * most)
)
METHODS.register("conf", Method(_capped, unlikely_first=True))
METHODS.register(
  "loop",
  Method(
    lambda rate, before, after, most: np.where(
      before == after, np.minimum(rate * before, most), 0
    ),
    pauses=True,
  ),
)


def with_pause(shares: Float64[np.ndarray, "S"]) -> Float64[np.ndarray, "S"]:
  """Returns a schedule that is compressed in time, then pauses, for `loop`."""
  steps = np.linspace(0, 1, len(shares))
  hurried = np.interp(steps / _LOOP_FROM, steps, shares) * _LOOP_SHARE
  last = (steps - _LOOP_UNTIL) / (1 - _LOOP_UNTIL) * (1 - _LOOP_SHARE)
  return hurried + np.clip(last, 0, None)


def counts(
  remasking: str, rate: float, table: Int32[np.ndarray, "S N"]
) -> Int32[np.ndarray, "S-1 N"]:
  """Returns how many of n tokens each step of a schedule remasks.

  Args:
    remasking: name of the method.
    rate: as in the table in the module's docstring.
    table: schedule; entry [i, n] is the number revealed before step i.
  """
  before, after = table[:-1].astype(float), table[1:]
  # sigma_max as a count: for each remasked token the step reveals another one,
  # and it has only so many masked ones.
  most = np.minimum(before, table[-1] - after)
  share = METHODS[remasking].share(rate, before, after, most)
  # Accumulate fractions: a mean of 0.3 tokens is one token in some steps.
  summed = np.floor(np.cumsum(share, axis=0) + 1e-9)
  return np.minimum(np.diff(summed, axis=0, prepend=0), most).astype(np.int32)


def chosen(
  remasking: str,
  row_keys: Key[Array, "B"],
  eligible: Bool[Array, "B L"],
  confidence: Float[Array, "B L"],
  number: Int[Array, "B"],
) -> Bool[Array, "B L"]:
  """Draws, without replacement, which eligible tokens to remask.

  Args:
    remasking: name of the method. It draws uniformly, or with `unlikely_first`
      with weights exp(-confidence), the paper's softmax.
    row_keys: one key per row.
    eligible: tokens that may be remasked.
    confidence: their probability when they were drawn.
    number: how many to remask in each row.
  """
  # The top of log weights plus Gumbel noise is a draw without replacement.
  draw = lambda key: jax.random.gumbel(key, eligible.shape[1:])
  score = jax.vmap(draw)(row_keys)
  if METHODS[remasking].unlikely_first:
    score = score - confidence
  score = jnp.where(eligible, score, -jnp.inf)
  place = jnp.argsort(jnp.argsort(-score, axis=1), axis=1)
  return eligible & (place < number[:, None])
