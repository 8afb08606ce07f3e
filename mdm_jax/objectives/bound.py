"""The likelihood bound (NELBO) of a masked diffusion model on held-out text.

  NELBO per token = integral over r in (0, 1) of CE(r),

where CE(r) is the mean cross-entropy per masked token at mask rate r, without
label smoothing (see `noise.py`). Every row is corrupted several times, with
rates stratified over (0, 1]. Keys depend only on the row and the draw, so all
checkpoints are measured on the same masks.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Key

from mdm_jax.core import rng
from mdm_jax.core.standard_errors import ratio
from mdm_jax.data.batches import Batch
from mdm_jax.data.held_out import DOCUMENT, ROW, SEGMENT, HeldOut
from mdm_jax.model.context import row_context
from mdm_jax.objectives import corruption
from mdm_jax.objectives.base import Examples, Objective
from mdm_jax.objectives.measured import (
  LOSS_BY_MASKED_SHARE,
  SCORE,
  SEED,
  Curve,
  Jobs,
  Measured,
  Nats,
  Part,
  Value,
  likelihood,
)
from mdm_jax.objectives.noise import RateDistribution, RateRange

CURVE_RATES = np.round(np.arange(0.05, 1.01, 0.05), 2)
_CURVE = "ce_by_mask_rate"
_UNIT = "nats per masked token"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedBound(Objective):
  """The evaluation half of the masked objective; `Masked` adds the training.

  Attributes:
    rates: the distribution of a row's mask rate in training.
    mask: id of the mask token.
  """

  rates: RateDistribution
  mask: int

  headline: ClassVar[str] = "nelbo_per_token"

  def jobs(self, held: HeldOut, part: Part, draws: int) -> Jobs:
    """Returns one job per row and mask rate, see `Objective.jobs`.

    Rates cover (0, 1] for the likelihood, the stage's range for the values,
    and are `CURVE_RATES` for the curve.
    """
    rows = len(held)
    u, key = self._uniforms(part, rows, draws)
    rates = self._rates(part, u)
    which = np.repeat(np.arange(rows), rates.shape[1])
    rates = rates.reshape(-1)
    asked = _num_masked(rates, row_lengths(held)[which])
    numbers = np.arange(len(which))
    return Jobs(key, which, numbers, np.asarray(asked), {"rate": rates})

  def _uniforms(
    self, part: Part, rows: int, draws: int
  ) -> tuple[Float32[np.ndarray, "N K"], Key[Array, ""]]:
    """Returns stratified uniforms, or the curve's rates; and the jobs' key."""
    match part:
      case "likelihood":
        return row_rates(rows, draws), rng.stream(SEED, "nelbo")
      case "values":
        return row_rates(rows, draws), rng.stream(SEED, "range")
      case "curves":
        rates = np.tile(CURVE_RATES.astype(np.float32), (rows, 1))
        return rates, rng.stream(SEED, "curve")

  def _rates(
    self, part: Part, u: Float32[np.ndarray, "*N"]
  ) -> Float32[np.ndarray, "*N"]:
    """Returns mask rates for uniforms."""
    if part != "values":
      return u
    # The stage's own range, without its rehearsal.
    low, high = self._range()
    return low + (high - low) * u

  def _counts(self, jobs: Jobs, held: HeldOut) -> Int[np.ndarray, "N"]:
    """Returns by which number each job's costs are divided for a mean."""
    del held
    return jobs.asked

  def pose(
    self,
    batch: Batch,
    keys: Key[Array, "B"],
    given: Mapping[str, Array],
    capacity: int,
  ) -> Examples:
    """Masks the rows; every masked token has weight 1."""
    x0, rate = batch.tokens, given["rate"]
    drawn = corruption.corrupt(keys, x0, batch.answer, rate, self.mask)
    return Examples(
      tokens=drawn.xt,
      context=row_context(batch.segments, condition=rate),
      targets=x0,
      asked=drawn.masked,
      weights=jnp.ones_like(rate, shape=x0.shape),
      capacity=capacity,
    )

  def values(
    self, part: Part, jobs: Jobs, nats: Nats, held: HeldOut
  ) -> Measured:
    """Returns the NELBO, the CE over the stage's mask rates, or the curve."""
    # A row without tokens to predict costs 0 nats: the divisor only avoids 0/0.
    count = np.maximum(self._counts(jobs, held), 1).astype(nats.by_row.dtype)
    by_row = (nats.by_row / count).reshape(len(held), -1)
    by_text = nats.by_text * (1 / count)[:, None]
    lengths = row_lengths(held)
    found = Measured(headline=self.headline)
    match part:
      case "likelihood":
        by_text = by_text.reshape(*by_row.shape, -1).mean(axis=1)
        bound = _bound(by_row.mean(axis=1), by_text, held)
        return dataclasses.replace(found, values=bound)
      case "values":
        # Rows weighted by length: a mean over tokens, like the NELBO.
        loss = by_row.mean(axis=1) @ (lengths / lengths.sum())
        low, high = self._range()
        title = f"CE at mask rates {low:g} to {high:g}"
        value = Value(float(loss), title, _UNIT, role=SCORE)
        values = {f"stage_ce/{low:g},{high:g}": value}
        return dataclasses.replace(found, values=values)
      case "curves":
        by_rate = np.ascontiguousarray(by_row.T, np.float64)
        losses = by_rate @ (lengths / lengths.sum())
        return dataclasses.replace(found, curves=_curve(losses))

  def _range(self) -> tuple[float, float]:
    inside = isinstance(self.rates, RateRange)
    return (self.rates.low, self.rates.high) if inside else (0.0, 1.0)


def row_rates(rows: int, draws: int) -> Float32[np.ndarray, "N K"]:
  """Returns `draws` mask rates per row, stratified over (0, 1].

  Each row has one random offset, so a row's rates do not depend on how many
  rows there are.
  """
  return np.asarray(_row_rates(rows, draws))


# Compiled whole, as `_num_masked`: one by one, these operations take longer to
# compile than the first evaluation takes to run.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _row_rates(rows: int, draws: int) -> Float[Array, "N K"]:
  keys = rng.per_row(rng.stream(SEED, "row_rates"), jnp.arange(rows))
  # From [0, 1) to (0, 1]: a rate of 0 would mask nothing.
  offset = 1 - jax.vmap(jax.random.uniform)(keys)
  strata = jnp.arange(draws, dtype=offset.dtype)[None]
  return (strata + offset[:, None]) / draws


_num_masked = jax.jit(corruption.num_masked)


def row_lengths(held: HeldOut) -> Int[np.ndarray, "N"]:
  """Returns the number of tokens per row that may be masked."""
  return np.asarray(held.rows.answer[:]).sum(axis=1)


def text_lengths(held: HeldOut) -> Int[np.ndarray, "M"]:
  """Returns the number of tokens per text that may be masked."""
  row, segment = held.texts[:, ROW], held.texts[:, SEGMENT]
  if "answer" not in held.rows.fields:
    return held.segment_sizes()[row, segment]
  inside = held.rows.segments[:][row] == segment[:, None]
  return (inside & held.rows.answer[row]).sum(axis=1)


def _bound(
  by_row: Float[np.ndarray, "N"],
  by_text: Float[np.ndarray, "N S"],
  held: HeldOut,
) -> dict[str, Value]:
  """Returns the NELBO over all rows, with a standard error over documents.

  The texts packed into a row share its mask rate. A text contributes the losses
  of its own masked tokens, scaled like the row's: (row length / masked tokens
  of the row) * sum of losses. So the texts of a row add up to the row's NELBO,
  and the error is that of the ratio nats / tokens (`standard_errors.ratio`).

  Args:
    by_row: mean cross-entropy per masked token, for each row.
    by_text: each text's share of its row's mean.
    held: the rows.
  """
  lengths = row_lengths(held)
  row, segment = held.texts[:, ROW], held.texts[:, SEGMENT]
  # Segments count from 1; 0 is padding.
  parts = by_text[row, segment - 1] * lengths[row]
  sizes = text_lengths(held)
  all_asked = "answer" not in held.rows.fields
  return likelihood(
    "nelbo",
    "NELBO",
    total_nats=float((by_row * lengths).sum()),
    tokens=int(lengths.sum()),
    # `num_bytes` counts whole texts, so it is unknown for a subset of tokens.
    num_bytes=held.num_bytes if all_asked else None,
    stderr=ratio(parts, sizes, held.texts[:, DOCUMENT]).stderr,
    exact=False,
  )


def _curve(losses: Float[np.ndarray, "R"]) -> dict[str, Curve]:
  curve = Curve(
    tuple(CURVE_RATES.tolist()),
    tuple(losses.tolist()),
    "Cross-entropy by mask rate",
    _UNIT,
    LOSS_BY_MASKED_SHARE,
    x_title="mask rate",
    point="CE at mask rate {}",
    form=".2f",
    note="How well masked tokens are predicted at each mask rate. The area"
    " under the curve is the NELBO. The bands are the mask rates that each"
    " stage trains on.",
  )
  return {_CURVE: curve}
