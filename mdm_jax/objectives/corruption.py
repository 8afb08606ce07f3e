"""The forward process: which tokens of x0 are masked to make xt.

A row with rate r and n real tokens loses exactly ceil(r n) of them, drawn
uniformly without replacement. Against independent coin flips with probability
r this has the same expected bound: over r ~ U(0, 1) both draw every count
1..n equally often after weighting, and given the count both are uniform
(integral of C(n,k) r^(k-1) (1-r)^(n-k) dr = 1/k). What it adds: no row is ever
without a masked token, the estimate varies less, and the number of masked
tokens in a batch is bounded before it is drawn, so the vocabulary projection
needs no spare room.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from mdm_jax.objectives.noise import RateDistribution

# ceil(r n) must not jump where r n is a whole number but for float32 rounding.
_ROUNDING = 1e-6
# Of the offset that an update's rows share, to bound the masked tokens.
_INTERVALS = 64
_NO_MESH = jax.sharding.AbstractMesh((), ())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Corrupted:
  """A corrupted batch: the denoiser's input, and where it is asked."""

  xt: Int[Array, "*B L"]
  masked: Bool[Array, "*B L"]


def strata(rows: int) -> np.ndarray:
  """Returns which of `rows` strata each row of an update draws from.

  The order is by bit reversal (van der Corput), so that every aligned run of
  rows, a microbatch or a device's shard, is itself spread over all strata.
  """
  bits = max(rows - 1, 1).bit_length()
  reverse = [int(f"{i:0{bits}b}"[::-1], 2) for i in range(rows)]
  return np.argsort(np.argsort(reverse))


def stratified_uniforms(
  key: Key[Array, ""], rows: int
) -> Float[Array, "{rows}"]:
  """Draws one uniform in (0, 1] a row, one in every stratum of width 1/rows.

  All rows share one offset (Kingma et al. 2021, arXiv 2107.00630, app. I.1),
  measured from below in even rows and from above in odd ones: each is uniform
  by itself, and the mean of any two neighbours does not vary at all.
  """
  offset = 1 - jax.random.uniform(key)  # in (0, 1]: a rate of 0 masks nothing
  return (
    jnp.asarray(strata(rows), jnp.float32) + _offsets(offset, rows)
  ) / rows


def _offsets(offset: Float[Array, ""], rows: int) -> Float[Array, "{rows}"]:
  """Mirrors odd rows; the first stratum, which 0 belongs to, is row 0's."""
  return jnp.where(jnp.arange(rows) % 2, 1 - offset, offset)


def num_masked(
  rate: Float[Array, "*B"], length: Int[Array, "*B"]
) -> Int[Array, "*B"]:
  """Returns ceil(rate * length), at least 1 where rate > 0."""
  count = jnp.ceil(rate * length.astype(rate.dtype) * (1 - _ROUNDING))
  count = count.astype(length.dtype)
  return jnp.where(rate > 0, jnp.clip(count, jnp.minimum(1, length), length), 0)


def max_masked(
  rates: RateDistribution,
  rows: int,
  length: int,
  shards: int,
  microbatches: int = 1,
) -> int:
  """Bounds the masked tokens of each shard of each microbatch of an update.

  Shards have equally many rows, the last ones of a microbatch padding if that
  has too few. Rates do not decrease in the uniforms, so between two offsets
  even rows have at most what they have at the higher one, odd rows at the lower
  one.
  """
  with jax.sharding.use_abstract_mesh(_NO_MESH):  # it may have no devices
    edges = jnp.linspace(0, 1, _INTERVALS + 1)
    offsets = jax.vmap(lambda offset: _offsets(offset, rows))(edges)
    stratum = strata(rows).astype(np.float32)[None]
    upper = (stratum + jnp.maximum(offsets[:-1], offsets[1:])) / rows
    counts = num_masked(rates.rate(upper), jnp.full(upper.shape, length))
  grid = np.asarray(counts).reshape(_INTERVALS, microbatches, -1)
  grid = np.pad(grid, ((0, 0), (0, 0), (0, -grid.shape[2] % shards)))
  by_shard = grid.reshape(_INTERVALS, microbatches * shards, -1).sum(axis=-1)
  return int(by_shard.max())


def corrupt(
  keys: Key[Array, "*B"],
  x0: Int[Array, "*B L"],
  real: Bool[Array, "*B L"],
  rate: Float[Array, "*B"],
  mask_id: int,
) -> Corrupted:
  """Draws xt given x0: masks ceil(rate * n) of the n real tokens of each row.

  Args:
    keys: one key a row (`rng.per_row`), so that a row's mask depends on nothing
      else in the batch.
    x0: clean tokens.
    real: False at padding, which is never masked.
    rate: the share to mask; 0 gives x0 back, 1 masks every real token.
    mask_id: what a masked token becomes.
  """
  draw = lambda key: jax.random.uniform(key, x0.shape[-1:])
  for _ in range(keys.ndim):
    draw = jax.vmap(draw)
  noise = jnp.where(real, draw(keys), 2.0)  # padding ranks last
  rank = jnp.argsort(jnp.argsort(noise, axis=-1), axis=-1)
  count = num_masked(rate, real.sum(axis=-1))
  masked = rank < count[..., None]
  return Corrupted(jnp.where(masked, mask_id, x0), masked)
