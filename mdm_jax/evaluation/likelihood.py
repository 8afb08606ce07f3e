"""The held-out likelihood bound, over all mask rates, unsmoothed.

  NELBO per token = integral over r in (0, 1) of CE(r),

CE(r) being the mean cross-entropy per masked token at mask rate r (see
`diffusion/noise.py`). Every row is corrupted `masks_per_row` times, its rates
stratified over (0, 1], with keys that depend on the row alone: any two
checkpoints are measured on the same masks.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mdm_jax.core import distributed, rng
from mdm_jax.core.config import EvalConfig
from mdm_jax.core.sharding import (
  batch_sharding,
  data_shards,
  padded_rows,
  put,
)
from mdm_jax.data.packing import Rows
from mdm_jax.diffusion import corruption, objective
from mdm_jax.model.denoiser import Denoiser, Params

_SEED = 0  # of the evaluation masks, the same for every run
CURVE_RATES = np.round(np.arange(0.05, 1.01, 0.05), 2)


@dataclasses.dataclass(frozen=True)
class Likelihood:
  """A bound on the negative log-likelihood of held-out rows.

  Attributes:
    nelbo_per_token: nats per token.
    stderr: standard error of it, over rows.
    total_nats: of all rows together.
    rows: rows measured.
    tokens: real tokens in them.
  """

  nelbo_per_token: float
  stderr: float
  total_nats: float
  rows: int
  tokens: int

  @property
  def ppl_bound(self) -> float:
    """Perplexity is at most this."""
    return float(np.exp(self.nelbo_per_token))

  def bits_per_byte(self, num_bytes: int) -> float:
    """Bits per UTF-8 byte of the rows' text."""
    return self.total_nats / np.log(2) / num_bytes


class Evaluator:
  """Measures parameters on fixed rows with fixed masks; compiled once."""

  def __init__(
    self,
    config: EvalConfig,
    denoiser: Denoiser,
    mask_id: int,
    mesh: jax.sharding.Mesh,
    poll: Callable[[], None] = lambda: None,
  ):
    """Makes what measures; `poll` is called as long as batches are done."""
    self.config, self.denoiser, self.mesh = config, denoiser, mesh
    self._poll = poll
    self._rows_a_call = padded_rows(config.batch_size, mesh)
    self._masked_ce = jax.jit(
      functools.partial(_masked_ce, denoiser, mask_id),
      static_argnames="capacity",
    )

  def likelihood(self, params: Params, rows: Rows) -> Likelihood:
    """Returns the bound over all rows."""
    draws = self.config.masks_per_row
    which = np.repeat(np.arange(len(rows)), draws)
    rates = np.asarray(_row_rates(len(rows), draws)).reshape(-1)
    losses = self._losses(params, rows, which, rates, "nelbo")
    lengths = (rows.segments > 0).sum(axis=1)
    nats = losses.reshape(-1, draws).mean(axis=1) * lengths
    mean = nats.sum() / lengths.sum()
    # Of a ratio of sums over rows, to first order.
    residual = nats - mean * lengths
    variance = residual.var(ddof=1) / len(rows) if len(rows) > 1 else np.nan
    return Likelihood(
      nelbo_per_token=float(mean),
      stderr=float(np.sqrt(variance) / lengths.mean()),
      total_nats=float(nats.sum()),
      rows=len(rows),
      tokens=int(lengths.sum()),
    )

  def ce_by_mask_rate(self, params: Params, rows: Rows) -> dict[str, float]:
    """Returns CE(r), nats per masked token, at r = 0.05, 0.10, ..., 1."""
    which = np.tile(np.arange(len(rows)), len(CURVE_RATES))
    rates = np.repeat(CURVE_RATES, len(rows)).astype(np.float32)
    # Batches mix the rates, or the last ones would set the gather's size.
    order = np.arange(len(which)).reshape(len(CURVE_RATES), -1).T.reshape(-1)
    losses = np.empty(len(which))
    losses[order] = self._losses(
      params, rows, which[order], rates[order], "curve"
    )
    lengths = (rows.segments > 0).sum(axis=1)
    curve = losses.reshape(len(CURVE_RATES), -1) @ (lengths / lengths.sum())
    by_rate = zip(CURVE_RATES, curve, strict=True)
    return {f"{rate:.2f}": float(loss) for rate, loss in by_rate}

  def ce_in_range(
    self, params: Params, rows: Rows, low: float, high: float
  ) -> float:
    """Returns the CE of a masked token at r ~ U(low, high): no likelihood."""
    draws = self.config.masks_per_row
    which = np.repeat(np.arange(len(rows)), draws)
    rates = low + (high - low) * _row_rates(len(rows), draws)
    losses = self._losses(
      params, rows, which, np.asarray(rates).reshape(-1), "range"
    )
    lengths = (rows.segments > 0).sum(axis=1)
    return float(
      losses.reshape(-1, draws).mean(axis=1) @ (lengths / lengths.sum())
    )

  def _losses(
    self,
    params: Params,
    rows: Rows,
    which: Int[np.ndarray, "N"],
    rates: Float[np.ndarray, "N"],
    stream: str,
  ) -> Float[np.ndarray, "N"]:
    """Mean CE per masked token of each (row, rate), in batches."""
    size, total = self._rows_a_call, len(which)
    pad = -total % size
    which, rates = (
      np.pad(which, (0, pad), "wrap"),
      np.pad(rates, (0, pad), "wrap"),
    )
    capacity = self._capacity(rows, which, rates)
    results = []
    for start in range(0, total + pad, size):
      # One batch ahead of the devices, so that a poll means progress.
      jax.block_until_ready(results[-2:-1])
      self._poll()
      part = slice(start, start + size)
      place = lambda x: put(x, batch_sharding(self.mesh, x.ndim))
      picked = which[part]
      results.append(
        self._masked_ce(
          params,
          place(rows.tokens[picked].astype(np.int32)),
          place(rows.segments[picked].astype(np.int32)),
          place(rates[part]),
          place(picked.astype(np.int32)),
          place(np.arange(start, start + size, dtype=np.int32)),
          rng.stream(_SEED, stream),
          capacity=capacity,
        )
      )
    return np.concatenate(distributed.fetch(results))[:total]

  def _capacity(self, rows, which, rates) -> int:
    """The most masked tokens any shard of any batch will have."""
    lengths = (rows.segments > 0).sum(axis=1)[which]
    counts = np.asarray(
      corruption.num_masked(jnp.asarray(rates), jnp.asarray(lengths))
    )
    shards = data_shards(self.mesh)
    by_shard = counts.reshape(-1, self._rows_a_call // shards)
    most = by_shard.sum(axis=1).max()
    whole = rows.length * self._rows_a_call // shards
    # In eighths of the whole, so that a few rows more don't compile anew.
    step = max(whole // 8, 1)
    return min(int(-(-most // step) * step), whole)


def _row_rates(rows: int, draws: int) -> Float[Array, "N K"]:
  """Rates stratified over (0, 1] for each row, by the row's own offset."""
  keys = rng.per_row(rng.stream(_SEED, "row_rates"), jnp.arange(rows))
  offset = 1 - jax.vmap(jax.random.uniform)(keys)
  return (jnp.arange(draws, dtype=offset.dtype)[None] + offset[:, None]) / draws


def _masked_ce(
  denoiser: Denoiser,
  mask_id: int,
  params: Params,
  tokens: Int[Array, "B L"],
  segments: Int[Array, "B L"],
  rate: Float[Array, "B"],
  row: Int[Array, "B"],
  draw: Int[Array, "B"],
  key: Array,
  capacity: int,
) -> Float[Array, "B"]:
  """Corrupts and scores one batch; keys follow from the row and the draw."""
  keys = jax.vmap(
    lambda r, d: jax.random.fold_in(jax.random.fold_in(key, r), d)
  )
  real = segments > 0
  corrupted = corruption.corrupt(keys(row, draw), tokens, real, rate, mask_id)
  losses = objective.masked_cross_entropy(
    denoiser.logits,
    denoiser.head(params),
    denoiser.hidden(params, corrupted.xt, segments, rate),
    tokens,
    corrupted.masked,
    capacity,
    denoiser.num_real,
  )
  count = corrupted.masked.sum(axis=1).astype(losses.dtype)
  return losses.sum(axis=1) / jnp.maximum(count, 1)


def subset(rows: Rows, count: int | None) -> Rows:
  """Returns `count` rows spread evenly over all of them (None: all)."""
  if count is None or count >= len(rows):
    return rows
  picked = np.linspace(0, len(rows) - 1, count).round().astype(int)
  return Rows(rows.tokens[picked], rows.segments[picked])
