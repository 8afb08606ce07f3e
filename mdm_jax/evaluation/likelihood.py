"""The held-out likelihood bound, over all mask rates, unsmoothed.

  NELBO per token = integral over r in (0, 1) of CE(r),

CE(r) being the mean cross-entropy per masked token at mask rate r (see
`objectives/noise.py`). Every row is corrupted `masks_per_row` times, its rates
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
from mdm_jax.core.sharding import (
  batch_sharding,
  data_shards,
  padded_rows,
  put,
)
from mdm_jax.core.standard_errors import ratio
from mdm_jax.data.held_out import DOCUMENT, ROW, SEGMENT, HeldOut
from mdm_jax.data.rows import Rows
from mdm_jax.evaluation.config import EvalConfig
from mdm_jax.model.context import row_context
from mdm_jax.model.denoiser import Denoiser, Params
from mdm_jax.objectives import corruption, cross_entropy

_SEED = 0  # of the evaluation masks, the same for every run
CURVE_RATES = np.round(np.arange(0.05, 1.01, 0.05), 2)


@dataclasses.dataclass(frozen=True)
class Likelihood:
  """A bound on the negative log-likelihood of held-out rows.

  Attributes:
    nelbo_per_token: nats per token.
    stderr: standard error of it, over documents; nan of a single one.
    total_nats: of all rows together.
    rows: rows measured.
    tokens: real tokens in them.
    documents: that they are from.
  """

  nelbo_per_token: float
  stderr: float
  total_nats: float
  rows: int
  tokens: int
  documents: int

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
      static_argnames=("capacity", "num_texts"),
    )

  def likelihood(self, params: Params, held: HeldOut) -> Likelihood:
    """Returns the bound over all rows, its error over their documents.

    A row's texts share its masks. What a text has of the row's bound are the
    losses of its own masked tokens, in the row's measure: (row length / masked
    tokens of the row) times their sum. So texts add up to their row, and the
    error is that of `standard_errors.ratio`, nats by tokens.
    """
    draws, rows = self.config.masks_per_row, held.rows
    which = np.repeat(np.arange(len(rows)), draws)
    rates = np.asarray(_row_rates(len(rows), draws)).reshape(-1)
    losses, shares = self._losses(params, rows, which, rates, "nelbo")
    lengths = (rows.segments > 0).sum(axis=1)
    nats = losses.reshape(-1, draws).mean(axis=1) * lengths
    mean = nats.sum() / lengths.sum()
    row, segment = held.texts[:, ROW], held.texts[:, SEGMENT]
    by_text = shares.reshape(len(rows), draws, -1).mean(axis=1)
    by_text = by_text[row, segment - 1] * lengths[row]
    sizes = held.segment_sizes()[row, segment]
    error = ratio(by_text, sizes, held.texts[:, DOCUMENT]).stderr
    return Likelihood(
      nelbo_per_token=float(mean),
      stderr=error,
      total_nats=float(nats.sum()),
      rows=len(rows),
      tokens=int(lengths.sum()),
      documents=held.documents,
    )

  def ce_by_mask_rate(self, params: Params, rows: Rows) -> dict[str, float]:
    """Returns CE(r), nats per masked token, at r = 0.05, 0.10, ..., 1."""
    which = np.tile(np.arange(len(rows)), len(CURVE_RATES))
    rates = np.repeat(CURVE_RATES, len(rows)).astype(np.float32)
    # Batches mix the rates, or the last ones would set the gather's size.
    order = np.arange(len(which)).reshape(len(CURVE_RATES), -1).T.reshape(-1)
    losses = np.empty(len(which))
    losses[order], _ = self._losses(
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
    losses, _ = self._losses(
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
  ) -> tuple[Float[np.ndarray, "N"], Float[np.ndarray, "N S"]]:
    """Mean CE per masked token of each (row, rate), in batches.

    Returns:
      It, and what each text of the row has of it.
    """
    size, total = self._rows_a_call, len(which)
    pad = -total % size
    which, rates = (
      np.pad(which, (0, pad), "wrap"),
      np.pad(rates, (0, pad), "wrap"),
    )
    capacity = self._capacity(rows, which, rates)
    # Rounded up: with another text of a row nothing is compiled anew.
    texts = 1 << int(rows.segments[:].max() - 1).bit_length()
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
          num_texts=texts,
        )
      )
    by_row, by_text = zip(*distributed.fetch(results), strict=True)
    return np.concatenate(by_row)[:total], np.concatenate(by_text)[:total]

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
  num_texts: int,
) -> tuple[Float[Array, "B"], Float[Array, "B S"]]:
  """Corrupts and scores one batch; keys follow from the row and the draw.

  Returns:
    Mean cross-entropy per masked token of each row, and the part of it that is
    of each of the row's first `num_texts` texts.
  """
  keys = jax.vmap(
    lambda r, d: jax.random.fold_in(jax.random.fold_in(key, r), d)
  )
  real = segments > 0
  corrupted = corruption.corrupt(keys(row, draw), tokens, real, rate, mask_id)
  losses = cross_entropy.masked_cross_entropy(
    denoiser.logits,
    denoiser.head(params),
    denoiser.hidden(
      params, corrupted.xt, row_context(segments, condition=rate)
    ),
    tokens,
    corrupted.masked,
    capacity,
    denoiser.vocab,
  )
  count = jnp.maximum(corrupted.masked.sum(axis=1).astype(losses.dtype), 1)
  of = segments[:, :, None] == jnp.arange(1, num_texts + 1)[None, None]
  by_text = jnp.where(of, losses[:, :, None], 0).sum(axis=1)
  return losses.sum(axis=1) / count, by_text / count[:, None]
