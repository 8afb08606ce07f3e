"""Visibility of positions, against a rule spelled out pair by pair."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.core import rng
from mdm_jax.core.errors import UserError
from mdm_jax.model.context import (
  CAUSAL,
  FULL,
  OPENING,
  Context,
  Opening,
  Visibility,
  make_side,
  row_context,
  segment_positions,
  visible,
)

SEGMENTS = np.array(
  [[1, 1, 1, 1, 1, 2, 2, 2, 0, 0], [1, 2, 2, 2, 2, 2, 2, 2, 2, 3]]
)
S = 3  # tokens of a block
ENDS = "causal", "full"  # of attention that opens
_positions = jax.jit(segment_positions)


def sees(kind, p, noisy_query, q, noisy_key) -> bool:
  """Whether position p sees position q of the same segment."""
  if kind == "full":
    return True
  if kind == "causal":
    return q <= p
  mine, other = p // S, q // S
  if kind == "blocks":
    return other <= mine
  if kind == "noisy":
    return other == mine
  if noisy_query:
    return other == mine if noisy_key else other < mine
  return not noisy_key and other <= mine


def by_pairs(kind, segments, positions, noisy):
  rows, length = segments.shape
  pairs = np.zeros((rows, length, length), bool)
  for b in range(rows):
    for i in range(length):
      for j in range(length):
        pairs[b, i, j] = segments[b, i] == segments[b, j] and sees(
          *(kind, positions[b, i], noisy[b, i], positions[b, j], noisy[b, j])
        )
  return pairs


@pytest.mark.parametrize("kind", ["full", "causal", "blocks", "noisy", "dual"])
def test_the_one_rule_is_that_of_every_pair_on_packed_rows(kind):
  """For `dual`, a row is its corrupted copy and then itself."""
  segments = np.tile(SEGMENTS, (1, 2)) if kind == "dual" else SEGMENTS
  positions = np.asarray(_positions(SEGMENTS))
  if kind == "dual":
    positions = np.tile(positions, (1, 2))
  noisy = np.arange(segments.shape[1])[None] < SEGMENTS.shape[1]
  noisy = np.broadcast_to(noisy, segments.shape)

  @jax.jit
  def pairs(segments, positions, noisy):
    noisy = noisy if kind == "dual" else None
    visibility = Visibility(kind, S)
    side = Context(segments, positions, visibility=visibility, noisy=noisy).side
    return visible(side, side)

  np.testing.assert_array_equal(
    pairs(segments, positions, noisy),
    by_pairs(kind, segments, positions, noisy),
  )


def opened(share, segments=SEGMENTS):
  """Which keys each query sees while attention opens."""

  @jax.jit
  def pairs(segments, share):
    keys = rng.per_row(rng.stream(0, "opening"), jnp.arange(len(segments)))
    opening = Opening(jnp.full(len(segments), share), keys)
    side = row_context(segments, visibility=OPENING, opening=opening).side
    return visible(side, side)

  return np.asarray(pairs(segments, jnp.float32(share)))


def test_attention_opens_from_causal_to_bidirectional():
  """On packed rows: no share opens another text, and a larger one only adds."""
  positions = np.asarray(_positions(SEGMENTS))
  ends = [by_pairs(k, SEGMENTS, positions, SEGMENTS < 0) for k in ENDS]
  causal, full = ends
  stages = [opened(share) for share in (0, 0.25, 0.75, 1)]
  np.testing.assert_array_equal(stages[0], causal)
  np.testing.assert_array_equal(stages[-1], full)
  for before, after in itertools.pairwise(stages):
    assert (before <= after).all() and (before != after).any()


def test_a_share_of_the_later_positions_is_open():
  """The share itself, in each row by its own draws."""
  rows = np.ones((2, 256), int)
  later = np.triu(np.ones((256, 256), bool), 1)
  found = opened(0.3, rows)[:, later]
  error = (0.3 * 0.7 / found.shape[1]) ** 0.5
  assert np.abs(found.mean(axis=1) - 0.3).max() < 5 * error
  assert np.abs((found[0] & found[1]).mean() - 0.09) < 5 * error


def test_noisy_queries_see_clean_blocks_before_them():
  """A corrupted row against the keys of the clean one, as in two passes."""
  positions = np.asarray(_positions(SEGMENTS))

  @jax.jit
  def pairs(segments, positions):
    q = make_side(Visibility("noisy", S), segments, positions)
    k = make_side(Visibility("blocks", S), segments, positions)
    return visible(q, k)

  both = np.tile(SEGMENTS, (1, 2)), np.tile(positions, (1, 2))
  noisy = np.repeat([[True, False]], SEGMENTS.shape[1], axis=1)
  noisy = np.broadcast_to(noisy, both[0].shape)
  length = SEGMENTS.shape[1]
  want = by_pairs("dual", *both, noisy)[:, :length, length:]
  np.testing.assert_array_equal(pairs(SEGMENTS, positions), want)


def test_an_empty_slot_is_seen_by_nobody():

  @jax.jit
  def pairs():
    empty = jnp.full((1, 3), -1)
    segments = jnp.array([[0, 1, 1]])
    found = []
    for kind in (FULL, CAUSAL, Visibility("blocks", S)):
      q = make_side(kind, segments, segment_positions(segments))
      k = make_side(kind, empty, jnp.zeros_like(empty))
      found.append(visible(q, k))
    return jnp.stack(found)

  assert not pairs().any()


def test_positions_restart_in_each_segment():
  segments = np.array([[1, 1, 2, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 2]])
  want = [[0, 1, 0, 1, 2, 0, 1], [0, 1, 2, 3, 4, 5, 0]]
  np.testing.assert_array_equal(_positions(segments), want)
  of_calls = jax.jit(lambda x: row_context(x).positions)(segments[None])
  np.testing.assert_array_equal(of_calls, np.array(want)[None])


def test_what_can_not_be_is_refused():
  with pytest.raises(UserError, match="a block of 0 tokens; nearest valid: 1"):
    Visibility("blocks", 0)
  segments = jnp.ones((1, 4), jnp.int32)
  with pytest.raises(ValueError, match="dual without Context.noisy"):
    _ = row_context(segments, visibility=Visibility("dual", 2)).side
