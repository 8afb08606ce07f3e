"""Which tokens of a row's blocks are masked, at a rate for each block.

Blocks are counted from the start of each text of a row. The rates of an update
are stratified over all its rows and blocks: `row_uniforms` and `lattice`.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from mdm_jax.data.batches import Batch
from mdm_jax.data.held_out import HeldOut
from mdm_jax.model.context import segment_positions
from mdm_jax.objectives import corruption
from mdm_jax.objectives.draws import Plan
from mdm_jax.objectives.noise import RateDistribution

# `max_masked` bounds the counts separately for this many ranges of the offset.
_INTERVALS = 64
_NO_MESH = jax.sharding.AbstractMesh((), ())


def most_blocks(length: int, block: int, segments: int) -> int:
  """Returns the largest number of blocks in a row of up to `segments` texts.

  Args:
    length: tokens per row.
    block: tokens per block; each text's last one may have fewer.
    segments: texts per row.
  """
  return min((length + segments * (block - 1)) // block, length)


def block_starts(
  segments: Int[Array, "*B L"], block: int
) -> Bool[Array, "*B L"]:
  """Returns which tokens are the first of a block."""
  return (segments > 0) & (segment_positions(segments) % block == 0)


@dataclasses.dataclass(frozen=True)
class Drawn:
  """Masked blocks.

  Attributes:
    xt: the corrupted tokens.
    masked: where they are masked.
    slot: number of each token's block in its row.
    counts: masked tokens of each block.
    lengths: tokens of each block that may be masked.
  """

  xt: Int[Array, "*B L"]
  masked: Bool[Array, "*B L"]
  slot: Int[Array, "*B L"]
  counts: Float[Array, "*B N"]
  lengths: Float[Array, "*B N"]

  def at_tokens(self, values: Float[Array, "*B N"]) -> Float[Array, "*B L"]:
    """Returns the value of each token's block."""
    return jnp.take_along_axis(values, self.slot, axis=-1)


def corrupt(
  keys: Key[Array, "*B"],
  batch: Batch,
  rate: Float[Array, "*B N"],
  block: int,
  mask: int,
) -> Drawn:
  """Masks ceil(rate * n) of each block's n tokens that may be masked.

  With one block per row, the masks are those of `corruption.corrupt`.
  """
  answer, blocks = batch.answer, rate.shape[-1]
  slot = jnp.cumsum(block_starts(batch.segments, block), axis=-1) - 1
  slot = jnp.clip(slot, 0, blocks - 1)
  inside = slot[..., None] == _along_last(jnp.arange(blocks), slot.ndim + 1)
  length = (inside & answer[..., None]).sum(axis=-2)
  count = corruption.num_masked(rate, length)
  draw = lambda key: jax.random.uniform(key, answer.shape[-1:])
  for _ in range(keys.ndim):
    draw = jax.vmap(draw)
  ranked = lambda x: jnp.argsort(jnp.argsort(x, axis=-1), axis=-1)
  # Sorted by block, then by noise: the first of a block are masked. By whole
  # numbers, as a sum of the two would round the noise.
  group = jnp.where(answer, slot, blocks) * answer.shape[-1]
  rank = ranked(group + ranked(draw(keys)))
  # Of the block's first token, and of the first that is not masked.
  first = jnp.cumsum(length, axis=-1) - length
  past = jnp.take_along_axis(first + count, slot, axis=-1)
  masked = answer & (rank < past)
  return Drawn(
    xt=jnp.where(masked, mask, batch.tokens),
    masked=masked,
    slot=slot,
    counts=count.astype(jnp.float32),
    lengths=length.astype(jnp.float32),
  )


def _along_last(values: Any, rank: int) -> Any:
  return jnp.expand_dims(values, range(rank - 1))


def lengths(held: HeldOut, block: int) -> Int[np.ndarray, "R N"]:
  """Returns how many tokens of each block of each row may be masked."""
  segments = np.asarray(held.rows.segments[:], np.int32)
  answer = np.asarray(held.rows.answer[:]) > 0
  starts = np.asarray(block_starts(jnp.asarray(segments), block))
  slot = np.maximum(np.cumsum(starts, axis=1) - 1, 0)
  found = np.zeros((len(slot), int(slot.max(initial=0)) + 1), np.int32)
  np.add.at(found, (np.arange(len(slot))[:, None], slot), answer)
  return found


# MARK: rates


def van_der_corput(count: int) -> Float[np.ndarray, "N"]:
  """Returns the first numbers of a sequence that fills [0, 1) evenly."""
  bits = max(count - 1, 1).bit_length()
  reverse = [int(f"{i:0{bits}b}"[::-1], 2) for i in range(count)]
  return np.array(reverse) / 2**bits


def row_uniforms(
  key: Key[Array, ""], rows: int, blocks: int
) -> Float[Array, "{rows}"]:
  """Draws a uniform in (0, 1] for each row's first block, stratified.

  Together with `lattice`, one uniform falls into each of rows * blocks strata.

  Args:
    key: draws the offset that all rows share.
    rows: rows per update.
    blocks: blocks per row. One block is masked diffusion, whose uniforms are
      returned: with odd rows mirrored, which balances the masked tokens. Rows
      of several blocks are balanced each by themselves.
  """
  if blocks == 1:
    return corruption.stratified_uniforms(key, rows)
  offset = 1 - jax.random.uniform(key)  # in (0, 1]: a rate of 0 masks nothing
  return (jnp.asarray(corruption.strata(rows), jnp.float32) + offset) / rows


def lattice(rows: int, blocks: int) -> np.ndarray:
  """Returns the shift of each block's uniform against its row's first block.

  The uniforms of a row are spread evenly over (0, 1], and those of all rows and
  blocks fall into different strata of width 1 / (rows * blocks).

  Args:
    rows: rows per update.
    blocks: blocks per row.
  """
  place = corruption.strata(blocks)  # its first entries are spread, too
  # Multiples of `rows` are spread evenly, but collide with those of other rows
  # (multiples of `blocks`): the remainders by `blocks` have to differ.
  same = math.gcd(rows, blocks)
  shift = rows * place + place // (blocks // same)
  return (shift / (rows * blocks)).astype(np.float32)


def by_block(
  u: Float[Array, "*B"], shifts: Float[np.ndarray, "N"]
) -> Float[Array, "*B N"]:
  """Returns u + shift, modulo 1 in (0, 1], for each block."""
  moved = u[..., None] + _along_last(shifts, u.ndim + 1)
  return jnp.where(moved > 1, moved - 1, moved)


def max_masked(rates: RateDistribution, plan: Plan, block: int) -> int:
  """Returns the maximum number of masked tokens per shard and microbatch.

  Every draw of an update is a function of one offset in (0, 1], whose range is
  cut into intervals. A row masks most if its tokens are in the blocks with the
  highest rates.

  Args:
    rates: the distribution of mask rates.
    plan: sizes of the stage.
    block: tokens per block.
  """
  blocks = most_blocks(plan.length, block, plan.most_segments)
  if blocks == 1:
    sizes = plan.rows, plan.most_asked, plan.shards, plan.accumulation
    return corruption.max_masked(rates, *sizes)
  each = -(-plan.batch // plan.shards)
  everything = each * plan.most_asked
  if block == 1:
    return everything
  counts = _most_by_block(rates, plan.rows, blocks, block)
  # Whole blocks, those with most masked tokens first, as far as there are
  # tokens. Other blocks of fewer tokens can each round up by one.
  counts = -np.sort(-counts, axis=-1)
  tokens = np.clip(plan.most_asked - block * np.arange(blocks), 0, block)
  shared = np.ceil(tokens / block * counts).sum(axis=-1) + blocks
  by_row = np.minimum(shared, counts.sum(axis=-1))
  grid = by_row.reshape(_INTERVALS, plan.accumulation, plan.batch)
  # Rows of padding, that make the shards equally large, mask nothing.
  grid = np.pad(grid, ((0, 0), (0, 0), (0, each * plan.shards - plan.batch)))
  by_shard = grid.reshape(_INTERVALS, plan.accumulation, plan.shards, each)
  return min(int(by_shard.sum(axis=-1).max()), everything)


def _most_by_block(
  rates: RateDistribution, rows: int, blocks: int, block: int
) -> Int[np.ndarray, "I R N"]:
  """Returns how many tokens a block can mask, by interval of the offset."""
  stratum = jnp.asarray(corruption.strata(rows), jnp.float32)
  # An interval's upper end, and some slack for rounding in float32.
  step = 1 / (rows * _INTERVALS) + 1e-5

  def count(offset: Float[Array, ""]) -> Int[Array, "R N"]:
    u = by_block((stratum + offset) / rows, lattice(rows, blocks)) + step
    # A uniform that passes 1 within the interval may be 1.
    rate = rates.rate(jnp.minimum(u, 1.0))
    return corruption.num_masked(rate, jnp.full(rate.shape, block))

  # One program, run on the host also when planning for a mesh whose devices
  # don't exist.
  with jax.sharding.use_abstract_mesh(_NO_MESH):
    offsets = jnp.arange(_INTERVALS) / _INTERVALS
    return np.asarray(jax.jit(lambda x: jax.lax.map(count, x))(offsets))
