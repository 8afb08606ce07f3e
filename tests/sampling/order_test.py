"""Orders by brute force: which positions are first."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampling_harness as harness

from mdm_jax.core.errors import UserError
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.sampling import order

FROM_LOGITS = "confidence", "margin", "entropy"
rank = jax.jit(order.rank)
score = jax.jit(lambda name, x: order.ORDERS[name](x), static_argnums=0)
priority = jax.jit(order.priority, static_argnums=(0, 3))


def first_of(name, rows, length, step=0):
  """The positions of each row, the first one first."""
  scores = priority(name, harness.row_keys(rows), jnp.int32(step), length)
  return np.argsort(-np.asarray(scores), axis=1, kind="stable")


# MARK: orders by position


def test_random_draws_all_permutations_alike(mesh):
  first = first_of("random", 24_000, 4)
  counts = np.bincount(first @ [64, 16, 4, 1], minlength=256)
  every = [np.dot(p, [64, 16, 4, 1]) for p in itertools.permutations(range(4))]
  assert counts[every].sum() == 24_000
  assert abs(harness.chi_square(counts[every], np.ones(24))) < 4


def test_random_is_drawn_anew_at_every_step(mesh):
  first, second = (first_of("random", 24_000, 3, step)[:, 0] for step in (0, 1))
  pairs = np.bincount(3 * first + second, minlength=9)
  assert abs(harness.chi_square(pairs, np.ones(9))) < 4


@pytest.mark.parametrize("length", [8, 64])
def test_any_first_positions_are_spread_evenly(mesh, length):
  for row in first_of("spread", 64, length):
    for count in 2 ** np.arange(length.bit_length()):
      assert (np.diff(np.sort(row[:count])) == length // count).all()


@pytest.mark.parametrize("length", [3, 12])
def test_other_lengths_leave_positions_out(mesh, length):
  """The order is that of the next power of two, shifted and without some."""
  size = 2 ** (length - 1).bit_length()
  reverse = [
    int(f"{n:0{size.bit_length() - 1}b}"[::-1], 2) for n in range(size)
  ]
  whole = np.argsort(reverse)
  shifted = [(whole - shift) % size for shift in range(size)]
  want = {tuple(row[row < length].tolist()) for row in shifted}
  got = {tuple(row.tolist()) for row in first_of("spread", 512, length)}
  assert got == want


def test_the_first_of_a_spread_is_anywhere(mesh):
  first = first_of("spread", 16_000, 8)[:, 0]
  counts = np.bincount(first, minlength=8)
  assert abs(harness.chi_square(counts, np.ones(8))) < 4


def test_a_spread_is_kept_from_step_to_step(mesh):
  np.testing.assert_array_equal(
    first_of("spread", 16, 12, step=0), first_of("spread", 16, 12, step=5)
  )


def test_left_to_right_is_left_to_right(mesh):
  np.testing.assert_array_equal(
    first_of("left_to_right", 3, 9), np.tile(np.arange(9), (3, 1))
  )


# MARK: orders that ask


def some_logits(positions=400, vocab=7, seed=0):
  numbers = np.random.default_rng(seed)
  logits = 2 * numbers.normal(size=(positions, vocab)).astype(np.float32)
  hidden = numbers.random(logits.shape) < 0.3
  hidden[:, 0] = False
  return np.where(hidden, -np.inf, logits).astype(np.float32)


@pytest.mark.parametrize("name", FROM_LOGITS)
def test_a_score_is_what_its_name_says(mesh, name):
  logits = some_logits()
  p = np.exp(logits.astype(np.float64))
  p /= p.sum(axis=1, keepdims=True)
  top = np.sort(p, axis=1)[:, ::-1]
  want = {
    "confidence": top[:, 0],
    "margin": top[:, 0] - top[:, 1],
    "entropy": (p * np.log(np.maximum(p, 1e-300))).sum(axis=1),
  }[name]
  got = np.asarray(score(name, jnp.asarray(logits)))
  np.testing.assert_allclose(got, want, atol=2e-6)


def test_scores_tell_positions_apart_differently(mesh):
  """Each of three positions is the surest by one score only."""
  p = np.array([[0.5, 0.49, 0.01], [0.45, 0.275, 0.275]])
  logits = jnp.log(jnp.asarray(p, jnp.float32))
  best = {n: int(np.argmax(score(n, logits))) for n in FROM_LOGITS}
  assert best == {"confidence": 0, "margin": 1, "entropy": 0}
  p = np.array([[0.6, 0.1, 0.1, 0.1, 0.1], [0.59, 0.41, 0, 0, 0]])
  with np.errstate(divide="ignore"):
    logits = jnp.asarray(np.log(p), jnp.float32)
  best = {n: int(np.argmax(score(n, logits))) for n in FROM_LOGITS}
  assert best == {"confidence": 0, "margin": 0, "entropy": 1}


def test_an_unknown_order_is_reported_with_the_nearest():
  with pytest.raises(UserError, match="sample.order='margins'.*'margin'"):
    order.reads_logits("margins")


# MARK: ranks


def test_a_rank_is_by_mask_block_both_priorities_and_place(mesh):
  numbers = np.random.default_rng(0)
  masked = numbers.random((300, 9)) < 0.6
  first = numbers.integers(-2, 3, (300, 9)).astype(np.float32)
  first[numbers.random((300, 9)) < 0.1] = -np.inf
  first[numbers.random((300, 9)) < 0.1] = np.inf
  then = numbers.integers(0, 2, (300, 9)).astype(np.float32)
  block = np.arange(9) // 4
  got = rank(*map(jnp.asarray, (masked, block, first, then)))
  want = [
    sorted(range(9), key=lambda j: (not row[j], block[j], -by[j], -tie[j], j))
    for row, by, tie in zip(masked, first, then, strict=True)
  ]
  np.testing.assert_array_equal(got, want)


def test_of_equal_positions_the_left_ones_are_first(mesh):
  """And there are exactly so many: no threshold keeps all that are tied."""
  masked = np.ones((2, 6), bool)
  masked[1, :2] = False
  equal = jnp.zeros((2, 6))
  got = rank(jnp.asarray(masked), jnp.zeros(6, jnp.int32), equal, equal)
  np.testing.assert_array_equal(got, [range(6), [2, 3, 4, 5, 0, 1]])


def test_rounding_errors_do_not_order_equal_scores(mesh):
  numbers = np.random.default_rng(0)
  scores = np.repeat(numbers.random((200, 1)), 8, axis=1)
  noisy = (scores + 1e-7 * numbers.normal(size=scores.shape)).astype(np.float32)
  got = np.asarray(order.rounded(jnp.asarray(noisy)))
  assert (got == got[:, :1]).all(axis=1).mean() > 0.98
  np.testing.assert_allclose(got, scores, atol=1.3e-4)
  assert order.rounded(jnp.array([-jnp.inf]))[0] == -jnp.inf


def test_likely_ends_come_after_everything_else():
  vocab = Vocabulary(8, end=2)
  sure_end = jnp.zeros(8).at[2].set(9.0)
  unsure = jnp.zeros(8).at[1].set(0.1)
  logits = jnp.stack([sure_end, unsure, sure_end / 3])
  for name in ("confidence", "margin", "entropy"):
    scores = order.ORDERS[name](logits)
    assert scores.argmax() == 0  # an order by itself ends the text
    found = order.ends_last({name: scores}, logits, vocab)[name]
    # Among ends, the surest is still first.
    assert jnp.argsort(-found).tolist() == [1, 0, 2]
