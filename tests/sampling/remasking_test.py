"""Remasking: how many tokens, which ones, and what stays as it was."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampling_harness as harness
from sampling_harness import EOS, MASK, PAD, Joint, Pairs, settings

from mdm_jax.sampling import remasking, schedule
from mdm_jax.sampling.schedule import Pace

KINDS = "cap", "rescale", "conf", "loop"
FOUR, PAIRS = Joint(length=4), Pairs(length=12)

chosen = jax.jit(remasking.chosen, static_argnums=0)


def pace_of(kind, rate=0.3, steps=8, length=24, name="linear"):
  config = settings(
    num_steps=steps, remasking=kind, remasking_rate=rate, schedule=name
  )
  return schedule.pace(config, length)


# MARK: how many


def shares_of(kind, rate, revealed):
  """How many the paper puts back on average, of each number of tokens."""
  before, after = revealed[:-1].astype(float), revealed[1:]
  free = revealed[-1]
  with np.errstate(invalid="ignore", divide="ignore"):
    most = np.minimum(1, (1 - after / free) / (before / free))
  sigma = np.minimum(rate, most)
  if kind == "rescale":
    sigma = rate * most
  if kind == "loop":
    sigma = np.where(before == after, sigma, 0)
  return np.nan_to_num(sigma) * before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_counts_are_the_papers_on_average(kind, name):
  for rate, steps in itertools.product([0.0, 0.02, 0.3, 1.0], [1, 5, 24, 40]):
    pace = pace_of(kind, rate, steps, name=name)
    want = np.cumsum(shares_of(kind, rate, pace.revealed), axis=0)
    got = np.cumsum(pace.put_back, axis=0)
    assert (got <= want + 1e-6).all()
    assert (got > want - 1 - 1e-6).all()
    assert (pace.put_back >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_never_above_the_limit(kind):
  for rate, steps in itertools.product([0.05, 0.5, 1.0], [1, 4, 11, 24, 40]):
    pace = pace_of(kind, rate, steps)
    before, after = pace.revealed[:-1], pace.revealed[1:]
    assert (pace.put_back <= before).all()
    assert (pace.put_back <= pace.revealed[-1] - after).all()
    assert (pace.put_back[0] == 0).all() and (pace.put_back[-1] == 0).all()


def test_no_remasking_puts_nothing_back():
  assert (pace_of("none", rate=1.0).put_back == 0).all()


def test_a_loop_hurries_then_rests_then_ends():
  shares = remasking.with_pause(schedule.linear(200))
  at = np.arange(201) / 200
  assert (shares[0], shares[-1]) == (0, pytest.approx(1))
  np.testing.assert_allclose(shares[at <= 0.45], at[at <= 0.45] * 2)
  np.testing.assert_allclose(shares[(at > 0.45) & (at <= 0.95)], 0.9)
  last = at > 0.95
  np.testing.assert_allclose(shares[last], 0.9 + (at[last] - 0.95) * 2)


def test_a_loop_puts_back_only_while_it_rests():
  pace = pace_of("loop", rate=0.2, steps=40, length=100)
  rests = pace.revealed[1:, 100] == pace.revealed[:-1, 100]
  assert rests.sum() == 20
  np.testing.assert_array_equal(pace.put_back[rests, 100], 10)
  np.testing.assert_array_equal(pace.put_back[~rests, 100], 0)


# MARK: which

ELIGIBLE = np.array([1, 1, 0, 1, 1, 0], bool)
CONFIDENCE = np.array([0.9, 0.1, 0.5, 0.0, 1.0, 0.2], np.float32)


def choose(kind, number, rows=20_000):
  wide = lambda a: jnp.broadcast_to(jnp.asarray(a), (rows, *a.shape))
  counts = jnp.full(rows, number, jnp.int32)
  keys = harness.row_keys(rows)
  return np.asarray(
    chosen(kind, keys, wide(ELIGIBLE), wide(CONFIDENCE), counts)
  )


def without_replacement(weights, number):
  """Probabilities of the sets that are drawn one after the other."""
  result = {}
  for way in itertools.permutations(np.flatnonzero(weights), number):
    left, share = weights.sum(), 1.0
    for at in way:
      share *= weights[at] / left
      left -= weights[at]
    result[frozenset(way)] = result.get(frozenset(way), 0.0) + share
  return result


@pytest.mark.parametrize("kind", KINDS)
def test_so_many_of_the_eligible_are_chosen(mesh, kind):
  for number, want in [(0, 0), (1, 1), (3, 3), (4, 4), (9, 4)]:
    got = choose(kind, number, rows=200)
    assert not got[:, ~ELIGIBLE].any()
    assert (got.sum(axis=1) == want).all()


@pytest.mark.parametrize("kind", KINDS)
def test_sets_are_chosen_by_their_weights(mesh, kind):
  """One after the other, by exp(-confidence) under conf and else alike."""
  weights = np.exp(-CONFIDENCE * (kind == "conf")) * ELIGIBLE
  sets = without_replacement(weights.astype(np.float64), 2)
  got = choose(kind, 2) @ (1 << np.arange(6))
  counts = [(got == sum(1 << at for at in s)).sum() for s in sets]
  assert sum(counts) == len(got)
  assert abs(harness.chi_square(counts, list(sets.values()))) < 4


def test_rows_choose_for_themselves(mesh):
  got = choose("cap", 1, rows=2_000)
  assert (got[0::2] != got[1::2]).any(axis=1).mean() > 0.5


# MARK: in the sampler


def transitions(path, free):
  """What each step reveals and puts back, by the path alone."""
  hidden = (path == MASK) & free[None]
  return hidden[:-1] & ~hidden[1:], ~hidden[:-1] & hidden[1:]


def some_rows(rows=32):
  """Half of them have given tokens, of any text id."""
  x = harness.blank(rows, 12)
  numbers = np.random.default_rng(0)
  given = numbers.random((rows // 2, 12)) < 0.25
  x[: rows // 2][given] = numbers.integers(0, 5, given.sum())
  return x


@functools.cache
def run_pairs(kind, eos, mesh):
  config = settings(num_steps=8, remasking=kind, remasking_rate=0.4)
  return harness.draw(config, PAIRS, PAIRS.params(eos=eos), some_rows(), mesh)


@pytest.mark.parametrize("kind", KINDS)
def test_the_path_shows_what_is_put_back(mesh, kind):
  for eos in (-1e4, 0.0):
    drawn, free = run_pairs(kind, eos, mesh), some_rows() == MASK
    _, back = transitions(drawn.path, free)
    np.testing.assert_array_equal(drawn.put_back, back.sum(axis=(0, 2)))
    assert drawn.put_back.sum() > 10
    assert not (drawn.path[-1] == MASK).any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_tokens_follows_the_schedule(mesh, kind):
  drawn, free = run_pairs(kind, -1e4, mesh), some_rows() == MASK
  total = free.sum(axis=1)
  pace = pace_of(kind, 0.4, steps=8, length=12)
  hidden = ((drawn.path == MASK) & free[None]).sum(axis=2)
  np.testing.assert_array_equal(total - hidden, pace.revealed[:, total])
  _, back = transitions(drawn.path, free)
  np.testing.assert_array_equal(back.sum(axis=2), pace.put_back[:, total])


@pytest.mark.parametrize("kind", ["cap", "conf"])
def test_only_older_tokens_that_were_drawn_are_put_back(mesh, kind):
  x = some_rows()
  drawn, free = run_pairs(kind, 0.0, mesh), x == MASK
  for at in drawn.path:
    np.testing.assert_array_equal(
      at[~free & (at != PAD)], x[~free & (at != PAD)]
    )
  before, after = drawn.path[:-1], drawn.path[1:]
  back = (before != MASK) & (after == MASK)
  assert not (before[back] == EOS).any()
  assert not (before[back] == PAD).any()
  ends = (before == EOS) & free[None]
  assert ends.any()
  assert np.isin(after[ends], [EOS, PAD]).all()


def test_a_token_of_this_step_is_not_put_back(mesh):
  """With two steps and all put back, the second would have none to put."""
  x = harness.blank(16, 12)
  revealed = np.zeros((5, 13), np.int32)
  revealed[:, 12] = 0, 4, 4, 8, 12
  back = np.zeros((4, 13), np.int32)
  back[1, 12] = 4
  config = settings(num_steps=4, remasking="cap")
  drawn = harness.draw(
    config, PAIRS, PAIRS.params(eos=-1e4), x, mesh, pace=Pace(revealed, back)
  )
  shown = drawn.path != MASK
  np.testing.assert_array_equal(shown.sum(axis=2)[:, 0], [0, 4, 4, 8, 12])
  assert not (shown[1] & shown[2]).any()  # all four are others


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_has_ended_stays_as_it_is(mesh, kind):
  drawn, free = run_pairs(kind, 0.0, mesh), some_rows() == MASK
  hidden = ((drawn.path == MASK) & free[None]).any(axis=2)
  assert (~hidden[5]).sum() > 4
  assert (hidden[:-1] >= hidden[1:]).all()
  np.testing.assert_array_equal(drawn.calls, hidden.sum(axis=0))


def test_a_row_does_not_depend_on_rows_that_go_on(mesh):
  drawn = run_pairs("cap", 0.0, mesh)
  config = settings(num_steps=8, remasking="cap", remasking_rate=0.4)
  params, x = PAIRS.params(eos=0.0), some_rows()
  for row in range(len(x)):
    keys = harness.row_keys([row])
    alone = harness.draw(config, PAIRS, params, x[[row]], mesh, keys)
    np.testing.assert_array_equal(alone.path[:, 0], drawn.path[:, row])
    assert alone.calls[0] == drawn.calls[row]


def test_more_steps_than_tokens_put_more_back(mesh):
  """Which is what remasking is for: as many steps as one likes."""
  config = settings(num_steps=40, remasking="cap", remasking_rate=0.2)
  x = harness.blank(8, 12)
  drawn = harness.draw(config, PAIRS, PAIRS.params(eos=-1e4), x, mesh)
  pace = schedule.pace(config, 12)
  np.testing.assert_array_equal(drawn.put_back, pace.put_back[:, 12].sum())
  assert (drawn.put_back > 12).all()
  assert (drawn.calls == 40).all()


@pytest.mark.parametrize("kind", ["cap", "rescale"])
def test_a_text_that_ends_puts_back_what_its_length_allows(mesh, kind):
  config = settings(num_steps=8, remasking=kind, remasking_rate=0.4)
  params, x = PAIRS.params(eos=-1e4), some_rows()
  params["bias"][6, EOS] = 1e4
  x[:] = MASK
  drawn = harness.draw(config, PAIRS, params, x, mesh)
  hidden = (drawn.path == MASK).sum(axis=2)
  back = transitions(drawn.path, x == MASK)[1].sum(axis=2)
  pace, step = schedule.pace(config, 12), np.arange(8)[:, None]
  ended = drawn.step[:, 6] < step
  assert (back <= pace.put_back[:, 7, None])[ended].all()
  assert back[ended].sum() > 10
  # Nor is anything put back where fewer are revealed than is planned.
  ended |= drawn.step[:, 6] == step
  planned = 7 - pace.revealed[1:, 7, None]
  assert (hidden[1:] <= planned)[ended & (back > 0)].all()


# MARK: what it leaves alone


def draw_pace(mesh, kind, revealed, put_back, joint, rows=20_000):
  pace = Pace(*(np.zeros((len(v), 5), np.int32) for v in (revealed, put_back)))
  pace.revealed[:, 4], pace.put_back[:, 4] = revealed, put_back
  config = settings(num_steps=len(put_back), remasking=kind)
  params = {"joint": np.broadcast_to(joint, (rows, 81))}
  x = harness.blank(rows, 4)
  return harness.draw(config, FOUR, params, x, mesh, pace=pace)


ONE_BACK = (0, 1, 2, 3, 3, 3, 3, 3, 4), (0, 0, 0, 1, 1, 1, 1, 0)


def test_one_token_drawn_again_a_step_keeps_the_joint(mesh):
  joint = harness.random_joint(FOUR, 4, zeros=0.3)
  drawn = draw_pace(mesh, "cap", *ONE_BACK, joint)
  counts = harness.count_texts(FOUR, drawn.path[-1])
  assert abs(harness.chi_square(counts, joint)) < 4
  assert (drawn.put_back == 4).all()
  changed = (drawn.path[3] != drawn.path[7]) & (drawn.path[3] != MASK)
  assert changed.any(axis=1).mean() > 0.5


THREE_AT_ONCE = (0, 3, 3, 3, 3, 3, 4), (0, 3, 3, 3, 3, 0)


def test_found_A10_one_token_a_step_keeps_marginals_and_several_do_not(mesh):
  joint = harness.random_joint(FOUR, 4, zeros=0.3)
  error = {}
  for name, pace in {"one": ONE_BACK, "three": THREE_AT_ONCE}.items():
    x = draw_pace(mesh, "cap", *pace, joint).path[-1]
    error[name] = max(
      abs((x[:, i] == k).mean() - joint[FOUR.texts[:, i] == k].sum())
      for i, k in itertools.product(range(4), range(3))
    )
    print(f"a marginal is off by {error[name]:.3f} with {name} token(s) a step")
  noise = np.sqrt(0.25 / 20_000)
  assert error["one"] < 4 * noise
  assert error["three"] > 10 * noise


def product_joint(seed=0):
  numbers = np.random.default_rng(seed)
  each = numbers.dirichlet([0.7] * 3, size=4)
  joint = np.einsum("a,b,c,d->abcd", *each)
  return each, joint.ravel().astype(np.float32)


@pytest.mark.parametrize("kind", ["cap", "loop"])
def test_independent_tokens_keep_their_distributions(mesh, kind):
  each, joint = product_joint()
  pace = pace_of(kind, 0.6, steps=4 if kind != "loop" else 8, length=4)
  if kind == "loop":
    pace = Pace(*(np.repeat(np.int32(v)[:, None], 5, axis=1) for v in ONE_BACK))
  drawn = draw_pace(mesh, kind, pace.revealed[:, 4], pace.put_back[:, 4], joint)
  assert drawn.put_back.min() > 0
  counts = harness.count_texts(FOUR, drawn.path[-1])
  assert abs(harness.chi_square(counts, joint)) < 4


def test_conf_prefers_likely_tokens(mesh):
  """It redraws the unlikely ones rather, so it does not keep marginals."""
  each, joint = product_joint()
  drawn = draw_pace(mesh, "conf", *ONE_BACK, joint)
  likely = each.max(axis=1).mean()
  kept = (drawn.path[-1] == each.argmax(axis=1)).mean()
  assert likely + 0.01 < kept < likely + 0.15
