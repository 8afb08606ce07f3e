"""The forward process q(xt | x0): which tokens of x0 are masked.

In a row with mask rate r and n real tokens, exactly ceil(r n) are masked, drawn
uniformly without replacement. The expected bound is the same as with
independent masking at probability r: over r ~ U(0, 1), both weigh every count
1..n equally, and given the count both are uniform
(integral of C(n,k) r^(k-1) (1-r)^(n-k) dr = 1/k). Exact counts have three
advantages: every row has a masked token, the estimate has a lower variance, and
the number of masked tokens per batch has a bound known in advance, so the
gather before the vocabulary projection needs no spare capacity.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from mdm_jax.objectives.noise import RateDistribution

# Relative slack: when r n is an integer, a float32 error in the rate must not
# make ceil(r n) one too large.
_ROUNDING = 1e-6
# `max_masked` bounds the counts separately for this many ranges of the offset.
_INTERVALS = 64
_NO_MESH = jax.sharding.AbstractMesh((), ())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Corrupted:
  """A corrupted batch: the denoiser's input xt, and which tokens are masked."""

  xt: Int[Array, "*B L"]
  masked: Bool[Array, "*B L"]


def strata(rows: int) -> np.ndarray:
  """Returns the stratum of each row of an update, a permutation of 0..rows-1.

  In bit-reversed (van der Corput) order, so that every aligned block of rows,
  such as a microbatch or a device's shard, is itself spread over all strata.
  """
  bits = max(rows - 1, 1).bit_length()
  reverse = [int(f"{i:0{bits}b}"[::-1], 2) for i in range(rows)]
  # Ranks, not the reversals: these have gaps unless `rows` is a power of two.
  return np.argsort(np.argsort(reverse))


def stratified_uniforms(
  key: Key[Array, ""], rows: int
) -> Float[Array, "{rows}"]:
  """Draws one uniform in (0, 1] per row, one in every stratum of width 1/rows.

  All rows share one random offset within their stratum (Kingma et al. 2021,
  arXiv 2107.00630, app. I.1), mirrored in odd rows. Each value is uniform by
  itself, and the mean of two neighboring rows does not vary at all. So with
  uniform mask rates every update masks the same number of tokens, up to
  rounding, and the gather buffer can be small.
  """
  offset = 1 - jax.random.uniform(key)  # in (0, 1]: a rate of 0 masks nothing
  return (
    jnp.asarray(strata(rows), jnp.float32) + _offsets(offset, rows)
  ) / rows


def _offsets(offset: Float[Array, ""], rows: int) -> Float[Array, "{rows}"]:
  """Returns each row's offset: mirrored in odd rows.

  Mirroring gives a value in [0, 1), so an odd row could draw exactly 0 if it
  had the first stratum; that one belongs to row 0.
  """
  return jnp.where(jnp.arange(rows) % 2, 1 - offset, offset)


def num_masked(
  rate: Float[Array, "*B"], length: Int[Array, "*B"]
) -> Int[Array, "*B"]:
  """Returns ceil(rate * length), and at least 1 where rate and length > 0."""
  count = jnp.ceil(rate * length.astype(rate.dtype) * (1 - _ROUNDING))
  count = count.astype(length.dtype)
  # A tiny rate still masks a token, but not in a row of padding (length 0).
  return jnp.where(rate > 0, jnp.clip(count, jnp.minimum(1, length), length), 0)


def max_masked(
  rates: RateDistribution,
  rows: int,
  length: int,
  shards: int,
  microbatches: int = 1,
) -> int:
  """Returns the maximum number of masked tokens per shard and microbatch.

  Every draw of an update is a function of one offset in (0, 1]. That range is
  cut into intervals; rates do not decrease in the uniforms, so within an
  interval even rows mask most at its upper end and odd (mirrored) rows at its
  lower end.

  Args:
    rates: the distribution of mask rates.
    rows: rows per update.
    length: maximum number of maskable tokens per row.
    shards: data shards, each with the same number of rows; the end of a
      microbatch is padded if it doesn't divide.
    microbatches: microbatches per update.
  """

  # One program: compiled one by one, these operations took a second.
  @jax.jit
  def counts() -> Int[Array, "I N"]:
    edges = jnp.linspace(0, 1, _INTERVALS + 1)
    offsets = jax.vmap(lambda offset: _offsets(offset, rows))(edges)
    stratum = strata(rows).astype(np.float32)[None]
    upper = (stratum + jnp.maximum(offsets[:-1], offsets[1:])) / rows
    return num_masked(rates.rate(upper), jnp.full(upper.shape, length))

  # Runs on the host, also when planning for a mesh whose devices don't exist.
  with jax.sharding.use_abstract_mesh(_NO_MESH):
    grid = np.asarray(counts()).reshape(_INTERVALS, microbatches, -1)
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
    keys: one key per row (`rng.per_row`), so that a row's mask does not depend
      on the rest of the batch.
    x0: clean tokens.
    real: False at positions that are never masked, such as padding.
    rate: share of tokens to mask; 0 returns x0, 1 masks every real token.
    mask_id: id of the mask token.

  Returns:
    xt, and True where it is masked.
  """
  draw = lambda key: jax.random.uniform(key, x0.shape[-1:])
  for _ in range(keys.ndim):
    draw = jax.vmap(draw)
  # The tokens with the lowest noise are masked. Noise is below 1, so 2 ranks
  # padding last.
  noise = jnp.where(real, draw(keys), 2.0)
  # Sorting the order again gives each token's rank.
  rank = jnp.argsort(jnp.argsort(noise, axis=-1), axis=-1)
  count = num_masked(rate, real.sum(axis=-1))
  masked = rank < count[..., None]
  return Corrupted(jnp.where(masked, mask_id, x0), masked)
