"""The sampler's distribution, for models whose distribution is known.

Most of this is exact: all texts are forced, one after the other, and the
probabilities that the sampler notes must make the joint.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampling_harness as harness
from sampling_harness import EOS, MASK, PAD, Chain, Joint, Pairs, settings

from mdm_jax.core.sharding import batch_sharding
from mdm_jax.sampling import order, schedule
from mdm_jax.sampling.schedule import Pace


@order.ORDERS.register("outward")
def outward(key, step, length):
  return -jnp.abs(jnp.linspace(-1, 1, length))


@order.ORDERS.register("dullest")
@order.from_logits
def dullest(logits):
  return -logits.max(axis=-1)


ORDERS = tuple(order.ORDERS)  # a user's own ones are no different
FIVE, FOUR, ENDING = Joint(length=5), Joint(length=4), Joint((0, 1, EOS), 4)


def check_exact(joints, log_q):
  """Every text of every joint has its probability."""
  joints = joints.astype(float)
  np.testing.assert_allclose(np.exp(log_q).sum(axis=1), 1, atol=1e-6)
  assert abs(harness.divergence(joints, log_q)).max() < 1e-6
  np.testing.assert_allclose(np.exp(log_q), joints, rtol=1e-5)


# MARK: one token a step


@pytest.mark.parametrize(
  "order, block_length",
  [*((name, None) for name in ORDERS), ("random", 2), ("confidence", 2)],
)
def test_one_token_a_step_is_exact_in_any_order(mesh, order, block_length):
  joints = harness.many_joints(FIVE)
  config = settings(num_steps=5, order=order, block_length=block_length)
  log_q, drawn = harness.every_text(FIVE, joints, mesh, config)
  check_exact(joints, log_q)
  assert (drawn.calls == 5).all()
  assert (np.sort(drawn.step, axis=1) == np.arange(5)).all()


def test_an_entropy_bound_of_nothing_is_exact(mesh):
  """It takes more than one token only where they are certain."""
  joints = harness.many_joints(FIVE)
  config = settings(num_steps=5, entropy_bound=0.0)
  log_q, drawn = harness.every_text(FIVE, joints, mesh, config)
  check_exact(joints, log_q)
  calls = drawn.calls.reshape(joints.shape)
  assert (calls[0] == 5).all()
  assert calls[3:6][joints[3:6] > 0].min() < 5  # most texts are impossible


@functools.cache
def sequential(joint, choose):
  """The joint that a rule for one token a step draws from, in numpy.

  Args:
    joint: probabilities of FOUR's texts, as a tuple.
    choose: (masked, conditionals, drawn tokens) -> where to keep one.
  """
  texts, joint = FOUR.texts, np.array(joint)
  weights = {(None,) * 4: 1.0}
  for _ in range(4):
    after = {}
    for state, weight in weights.items():
      for kept, share in outcomes(texts, joint, state, choose):
        after[kept] = after.get(kept, 0.0) + weight * share
    weights = after
  return np.array([weights.get(tuple(t), 0.0) for t in texts.tolist()])


def outcomes(texts, joint, state, choose):
  """Yields the states after one token, with their probabilities."""
  fits = [
    all(s in (None, v) for s, v in zip(state, t, strict=True))
    for t in texts.tolist()
  ]
  weight = joint * fits
  probs = np.stack([weight @ (texts == v) for v in range(3)], axis=1)
  probs /= weight.sum()
  masked = [i for i in range(4) if state[i] is None]
  for drawn in itertools.product(range(3), repeat=len(masked)):
    share = math.prod(probs[i, v] for i, v in zip(masked, drawn, strict=True))
    if share > 0:
      n = choose([probs[i] for i in masked], drawn)
      at = masked[n]
      yield (*state[:at], drawn[n], *state[at + 1 :]), share


def likeliest_place(probs, drawn):
  return int(np.argmax([p.max() for p in probs]))


def likeliest_draw(probs, drawn):
  return int(np.argmax([p[v] for p, v in zip(probs, drawn, strict=True)]))


@pytest.mark.parametrize("seed", range(3))
def test_drawing_everywhere_and_keeping_the_likeliest_is_not_exact(seed):
  joint = harness.random_joint(FOUR, seed).astype(np.float64)
  joint /= joint.sum()
  exact, biased = (
    harness.divergence(joint, np.log(sequential(tuple(joint), rule)))
    for rule in (likeliest_place, likeliest_draw)
  )
  assert abs(exact) < 1e-12
  assert biased > 0.1


# MARK: several tokens a step

PERMUTATIONS = np.array(list(itertools.permutations(range(4))))


def bounds_to_pace(bounds, length):
  """The pace of rows with `length` free tokens; others have none."""
  revealed = np.zeros((len(bounds), length + 1), np.int32)
  revealed[:, length] = bounds
  return Pace(revealed, np.zeros_like(revealed[1:]))


def conditional_entropy(joint, texts, known, at):
  """H(x_at | x_known) by brute force."""
  place = lambda where: np.unique(texts[:, where], axis=0, return_inverse=True)[
    1
  ].ravel()
  entropy = lambda where: (
    -sum(
      p * np.log(p) for p in np.bincount(place(where), weights=joint) if p > 0
    )
  )
  return entropy([*known, at]) - entropy(list(known))


def losses_of(joint, model):
  """h_j: the mean over j revealed positions and one that is masked."""
  every = range(model.length)
  return np.array(
    [
      np.mean(
        [
          conditional_entropy(joint, model.texts, known, at)
          for known in itertools.combinations(every, j)
          for at in set(every) - set(known)
        ]
      )
      for j in every
    ]
  )


@pytest.mark.parametrize("steps", [2, 3])
def test_the_divergence_of_a_schedule_follows_from_the_losses(
  mesh, monkeypatch, steps
):
  """By all permutations, for the priorities that a random order draws."""
  joints = harness.many_joints(FOUR)
  ranks = np.argsort(PERMUTATIONS, axis=1)
  each = np.repeat(-ranks, joints.size, axis=0).astype(np.float32)
  by_row = jax.device_put(each, batch_sharding(mesh, 2))
  monkeypatch.setattr(order, "priority", lambda *_: by_row)
  monkeypatch.setattr(harness, "_sampler", uncached(harness._sampler))
  losses = [losses_of(joint, FOUR) for joint in joints.astype(np.float64)]
  for inner in itertools.combinations(range(1, 4), steps - 1):
    bounds = np.array([0, *inner, 4])
    log_q, drawn = harness.every_text(
      FOUR,
      np.tile(joints, (24, 1)),
      mesh,
      settings(num_steps=steps),
      pace=bounds_to_pace(bounds, 4),
    )
    step = np.searchsorted(bounds, ranks, side="right") - 1
    np.testing.assert_array_equal(drawn.step[:: joints.size], step)
    np.testing.assert_allclose(np.exp(log_q).sum(axis=1), 1, atol=1e-6)
    log_q = log_q.reshape(24, *joints.shape)
    got = harness.divergence(joints.astype(np.float64), log_q).mean(axis=0)
    want = [harness.expected_divergence(h, bounds) for h in losses]
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert max(want) > 0.1


def uncached(function):
  """The same with a memory of its own."""
  return functools.cache(function.__wrapped__)


def test_an_entropy_bound_bounds_the_divergence_of_a_step(mesh, bound=0.6):
  joints = harness.many_joints(FIVE)
  config = settings(num_steps=5, entropy_bound=bound)
  log_q, drawn = harness.every_text(FIVE, joints, mesh, config)
  np.testing.assert_allclose(np.exp(log_q).sum(axis=1), 1, atol=1e-6)
  joints = joints.astype(np.float64)
  calls = (joints * drawn.calls.reshape(joints.shape)).sum(axis=1)
  assert (harness.divergence(joints, log_q) <= bound * calls + 1e-6).all()
  assert calls.min() < 4.9


# MARK: a Markov chain

CHAIN = Chain(length=64)
START, MOVE = harness.stationary_chain(seed=3, sharpness=2.0)


@functools.cache
def chain_entropies():
  """H(x_j | neighbours at distances a, b); distance 64: there is none."""
  powers = [np.linalg.matrix_power(MOVE, n) for n in range(64)]
  powers.append(np.broadcast_to(START, MOVE.shape))
  moves = np.array(powers)
  joint = np.einsum("l,alj,bjr->abljr", START, moves, moves)
  log = lambda p: np.log(np.maximum(p, 1e-300))
  pair = joint.sum(axis=3)
  whole = -(joint * log(joint)).sum(axis=(2, 3, 4))
  return whole + (pair * log(pair)).sum(axis=(2, 3))


def chain_divergence(step):
  """KL of drawing each step's positions apart, in closed form."""
  total, entropies = 0.0, chain_entropies()
  for at, now in enumerate(step):
    known = np.flatnonzero(step < now)
    left, right = known[known < at], known[known > at]
    a = at - left[-1] if len(left) else 64
    b = right[0] - at if len(right) else 64
    total += entropies[a, b]
  return total - chain_entropy()


def chain_entropy():
  entropies = chain_entropies()
  return entropies[64, 64] + 63 * entropies[1, 64]


@functools.cache
def chain_losses():
  """h_j of the chain: over all positions, and all gaps around them."""
  entropies, total = chain_entropies(), np.zeros(64)
  shares = np.zeros((3, 64, 64))  # ends of the gap, others in it, revealed
  for ends, inside, j in itertools.product(range(3), range(64), range(64)):
    others = 63 - ends - inside
    if others >= 0 and j >= ends:
      shares[ends, inside, j] = math.comb(others, j - ends) / math.comb(63, j)
  for at in range(64):
    for a, b in itertools.product(
      [*range(1, at + 1), 64], [*range(1, 64 - at), 64]
    ):
      inside = (at if a == 64 else a - 1) + (63 - at if b == 64 else b - 1)
      ends = (a < 64) + (b < 64)
      total += shares[ends, inside] * entropies[a, b]
  return total / 64


def draw_chain(mesh, order, bounds, rows=192):
  """Forces texts of the chain; returns log p - log q, and what was drawn."""
  numbers = np.random.default_rng(0)
  x = np.empty((rows, 64), np.int32)
  x[:, 0] = numbers.choice(3, size=rows, p=START)
  below = np.cumsum(MOVE, axis=1)[:, :2]
  for i in range(1, 64):
    x[:, i] = (numbers.random(rows)[:, None] > below[x[:, i - 1]]).sum(axis=1)
  log_p = np.log(START[x[:, 0]])
  log_p += np.log(MOVE[x[:, :-1], x[:, 1:]]).sum(axis=1)
  drawn = harness.draw(
    settings(num_steps=len(bounds) - 1, order=order),
    CHAIN,
    {"start": np.float32(START), "move": np.float32(MOVE), "forced": x},
    harness.blank(rows, 64),
    mesh,
    pace=bounds_to_pace(bounds, 64),
    force=True,
  )
  np.testing.assert_array_equal(drawn.path[-1], x)
  return log_p - harness.log_probability(drawn), drawn


def mean_is(values, want, errors=4):
  spread = values.std() / np.sqrt(len(values))
  return abs(values.mean() - want) < errors * spread


def bounds_of(shares):
  return schedule.table(shares, 64)[:, 64].astype(np.int64)


@pytest.mark.parametrize("name", ["linear", "cosine", "optimal"])
def test_a_chains_divergence_is_the_schedules(mesh, name):
  """Closed form of the drawn sets, and the probabilities that were noted."""
  shares = (
    schedule.optimal(chain_losses(), 8)
    if name == "optimal"
    else getattr(schedule, name)(8)
  )
  bounds = bounds_of(shares)
  ratios, drawn = draw_chain(mesh, "random", bounds)
  closed = np.array([chain_divergence(row) for row in drawn.step])
  want = harness.expected_divergence(chain_losses(), bounds)
  assert mean_is(closed, want)
  assert mean_is(ratios - closed, 0)
  assert want > 1 and closed.std() < want


@pytest.mark.parametrize("steps", [4, 8, 24])
def test_the_optimal_schedule_is_the_best_for_a_chain(steps):
  losses = chain_losses()
  assert (np.diff(losses) < 0).all()
  cost = lambda shares: harness.expected_divergence(losses, bounds_of(shares))
  best = cost(schedule.optimal(losses, steps))
  others = cost(schedule.linear(steps)), cost(schedule.cosine(steps))
  assert best < 0.99 * min(others)


def test_spread_out_tokens_are_nearly_independent(mesh):
  """Finding: order matters more than schedules at few steps."""
  means = {}
  for name in ("spread", "random", "left_to_right"):
    ratios, drawn = draw_chain(mesh, name, bounds_of(schedule.linear(8)))
    closed = np.array([chain_divergence(row) for row in drawn.step])
    assert mean_is(ratios - closed, 0) or closed.mean() < 1e-3
    means[name] = closed.mean()
  assert means["spread"] < means["random"] / 2
  assert means["random"] < means["left_to_right"] / 2


# MARK: with real draws


def check_draws(mesh, config, want, x=None, rows=20_000, **kwargs):
  """Compares counts of texts with probabilities, by a joint."""
  model = kwargs.pop("model", FOUR)
  joint = kwargs.pop("joint", want)
  x = harness.blank(rows, model.length) if x is None else x
  params = {"joint": np.broadcast_to(joint, (len(x), len(joint)))}
  drawn = harness.draw(config, model, params, x, mesh, **kwargs)
  counts = harness.count_texts(model, drawn.path[-1])
  assert abs(harness.chi_square(counts, want)) < 4
  return drawn


@pytest.mark.parametrize(
  "fields",
  [
    {"order": "random", "num_steps": 7},
    {"order": "margin", "block_length": 2, "num_steps": 4},
  ],
  ids=str,
)
def test_draws_have_the_joint(mesh, fields):
  joint = harness.random_joint(FOUR, 4, zeros=0.3)
  check_draws(mesh, settings(**fields), joint)


def test_two_tokens_at_once_are_drawn_apart(mesh):
  joint = harness.random_joint(FOUR, 4)
  config = settings(num_steps=2, order="left_to_right")
  grid = joint.reshape(9, 9).astype(np.float64)
  first, second = (
    p.sum(axis=2, keepdims=True) * p.sum(axis=1, keepdims=True)
    for p in (grid.sum(axis=1).reshape(1, 3, 3), grid.reshape(9, 3, 3))
  )
  second /= grid.sum(axis=1).reshape(9, 1, 1) ** 2
  want = first.reshape(9, 1) * second.reshape(9, 9)
  np.testing.assert_allclose(want.sum(), 1, rtol=1e-5)
  assert harness.divergence(joint, np.log(want.ravel())) > 0.1
  check_draws(mesh, config, want.ravel(), joint=joint)


def test_texts_that_end_early_have_their_probability(mesh):
  joint = harness.random_joint(ENDING, 5)
  params = {"joint": np.broadcast_to(joint, (20_000, 81))}
  config = settings(num_steps=4)
  x = harness.blank(20_000, 4)
  drawn = harness.draw(config, ENDING, params, x, mesh)
  shown = lambda x: np.where(behind_end(x), PAD, x)
  every, which = np.unique(shown(ENDING.texts), axis=0, return_inverse=True)
  assert len(every) < 40
  got = (drawn.path[-1][:, None] == every[None]).all(axis=2)
  assert got.any(axis=1).all()
  want = np.bincount(which.ravel(), weights=joint)
  assert abs(harness.chi_square(got.sum(axis=0), want)) < 4


def behind_end(x):
  return np.cumsum(x == EOS, axis=1) - (x == EOS) > 0


# MARK: against plain Python

PAIRS = Pairs(length=12)


def some_canvas(rows=24, seed=0):
  """Given tokens here and there, of any id, and rows of unequal length."""
  numbers = np.random.default_rng(seed)
  x = numbers.integers(0, MASK + 1, (rows, 12)).astype(np.int32)
  free = numbers.random((rows, 12)) < numbers.uniform(0.3, 1, (rows, 1))
  lengths = numbers.integers(6, 13, rows)
  free[:4], lengths[:4] = True, 12
  free &= np.arange(12)[None] < lengths[:, None]
  free[np.arange(rows), numbers.integers(0, 6, rows)] = True
  return harness.canvas(x, free, lengths)


class Plainly:
  """Follows one row of a path, and says what each step has to reveal."""

  def __init__(self, config, params, given, row, path):
    self.config, self.params, self.path = config, params, path
    free, self.end = given.free[row], int(given.lengths[row])
    self.masked = {i for i in range(self.end) if free[i]}
    self.given = {i for i in range(self.end) if not free[i]}
    self.free = frozenset(self.masked)
    self.x = [PAD] * 12
    for i in range(self.end):
      self.x[i] = MASK if free[i] else int(given.tokens[row, i])
    self.step, self.calls = [-1] * 12, 0
    self.confidence, self.entropy = [0.0] * 12, [0.0] * 12

  def follow(self, priorities):
    assert self.path[0] == self.x
    for i in range(self.config.num_steps):
      if self.masked:
        self.reveal(i, priorities[i])
        self.cut(i)
        self.calls += 1
      assert self.path[i + 1] == self.x
    assert not self.masked

  def reveal(self, i, priority):
    probs = self.probabilities()
    for at in self.first(i, probs, priority):
      token = self.path[i + 1][at]
      assert token != MASK, (i, at)
      p = probs[at]
      self.x[at], self.step[at] = token, i
      self.confidence[at] = p[token] if token != PAD else 0.0
      self.entropy[at] = entropy(p)
      self.masked.discard(at)

  def cut(self, i):
    ends = [j + 1 for j in range(12) if self.x[j] == EOS and self.step[j] == i]
    self.end = min([self.end, *ends])
    self.masked = {j for j in self.masked if j < self.end}
    for j in range(self.end, 12):
      self.x[j], self.step[j] = PAD, -1
      self.confidence[j], self.entropy[j] = 0.0, 0.0

  def probabilities(self):
    given = {j for j in self.given if j < self.end}
    logits = self.ask(self.x, self.masked)
    if self.config.guidance:
      hidden = [MASK if j in given else self.x[j] for j in range(12)]
      without = self.ask(hidden, self.masked | given)
      logits = without + (1 + self.config.guidance) * (logits - without)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    weights[: max(given, default=0), EOS] = 0.0
    return weights / weights.sum(axis=1, keepdims=True)

  def ask(self, x, masked):
    return PAIRS.plainly(self.params, x, len(masked), self.end)

  def first(self, i, probs, priority):
    """Returns the positions that this step reveals."""
    config, masked = self.config, sorted(self.masked)
    size = config.block_length or 12
    now = [j for j in masked if j // size == masked[0] // size]
    asked = now + masked[len(now) :][: -(-12 // config.num_steps)]
    top = np.sort(probs, axis=1)[:, ::-1]
    scores = {
      "confidence": top[:, 0],
      "margin": top[:, 0] - top[:, 1],
      "entropy": [-entropy(p) for p in probs],
    }.get(config.order)
    tie = priority if scores is not None else [0.0] * 12
    if scores is None:
      rank = priority
    else:
      scores = np.round(np.array(scores) * 4096)
      rank = [scores[j] if j in asked else -math.inf for j in range(12)]
    if config.threshold is not None:
      sure = [j for j in asked if top[j, 0] > config.threshold]
      rank = [math.inf if j in sure else rank[j] for j in range(12)]
    where = sorted(masked, key=lambda j: (j // size, -rank[j], -tie[j]))
    if config.threshold is not None:
      safe = len(set(sure) & set(now))
    elif config.entropy_bound is not None:
      safe = self.safe([entropy(probs[j]) for j in where[: len(now)]])
    else:
      return where[: self.due(i)]
    return where[: max(safe, -(-len(masked) // (config.num_steps - i)))]

  def safe(self, entropies):
    bound = self.config.entropy_bound
    for n in range(1, len(entropies)):
      if sum(entropies[: n + 1]) - max(entropies[: n + 1]) > bound:
        return n
    return len(entropies)

  def due(self, i):
    """What an even schedule of the tokens before the end of the row asks."""
    steps, total = self.config.num_steps, sum(j < self.end for j in self.free)
    revealed = total * (i + 1) // steps
    if total < steps:
      revealed = max(0, total - steps + i + 1)
    return max(1, len(self.masked) - (total - revealed))


def entropy(p):
  return -sum(q * math.log(q) for q in p if q > 0)


def priorities_of(config, rows):
  """Priorities by the rows' keys; where the order asks, of equal positions."""
  keys = harness.order_keys(rows)
  name = "spread" if order.reads_logits(config.order) else config.order
  each = [
    order.priority(name, keys, jnp.int32(i), 12)
    for i in range(config.num_steps)
  ]
  return np.stack(each, axis=1)


def check_plainly(mesh, config, params, given):
  """Compares places, calls and records with plain Python, step by step."""
  drawn = harness.draw(config, PAIRS, params, given, mesh)
  priorities = priorities_of(config, len(given.tokens))
  each = 2 if config.guidance else 1
  for row, path in enumerate(np.swapaxes(drawn.path, 0, 1).tolist()):
    plainly = Plainly(config, params, given, row, path)
    plainly.follow(priorities[row])
    assert plainly.step == drawn.step[row].tolist()
    assert plainly.calls * each == drawn.calls[row]
    for name in ("confidence", "entropy"):
      want, got = getattr(plainly, name), getattr(drawn, name)[row]
      np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)
  return drawn


@pytest.mark.parametrize(
  "fields",
  [
    {"threshold": 0.6, "num_steps": 6},
    {"threshold": 0.5, "order": "margin", "block_length": 4},
    {"entropy_bound": 1.0, "order": "left_to_right", "block_length": 5},
    {"entropy_bound": 0.3, "guidance": 1.5, "order": "confidence"},
  ],
  ids=str,
)
def test_budgets_reveal_what_plain_python_reveals(mesh, fields):
  config = settings(**({"num_steps": 8} | fields))
  given = some_canvas()
  drawn = check_plainly(mesh, config, PAIRS.params(), given)
  free = (given.free & (drawn.path[-1] != PAD)).sum(axis=1)
  steps = drawn.step.max(axis=1) + 1
  assert (steps < np.minimum(free, config.num_steps)).any()
  assert (drawn.path[-1] == EOS).sum() > 4


FILTERS = {"temperature": 0.3, "top_k": 2, "min_p": 0.4, "top_p": 0.6}


@pytest.mark.parametrize(
  "fields",
  [
    {"order": "random", "num_steps": 9},
    {"order": "spread", "block_length": 3},
    {"order": "entropy", "block_length": 3} | FILTERS,
    {"order": "margin", "guidance": 2.0},
  ],
  ids=str,
)
def test_counts_reveal_what_plain_python_reveals(mesh, fields):
  """Scores are of the whole distribution, whatever is cut from it."""
  config = settings(**({"num_steps": 5} | fields))
  params = PAIRS.params(eos=-1e4)
  check_plainly(mesh, config, params, some_canvas())


def test_a_text_that_ends_early_has_the_schedule_of_its_length(mesh):
  params = PAIRS.params(eos=-1e4)
  params["bias"][8, EOS] = 1e4
  given = harness.canvas(harness.blank(24, 12))
  drawn = check_plainly(mesh, settings(num_steps=5), params, given)
  assert (drawn.path[-1, :, 8] == EOS).all()
  assert (drawn.step[:, 8] == 0).sum() > 2


def test_a_row_alone_is_the_row_of_a_batch(mesh):
  config = settings(num_steps=12, order="margin", guidance=2.0)
  params, given = PAIRS.params(), some_canvas()
  whole = harness.draw(config, PAIRS, params, given, mesh)
  for row in range(8):
    part = jax.tree.map(lambda a, row=row: a[[row]], given)
    keys = harness.row_keys([row])
    alone = harness.draw(config, PAIRS, params, part, mesh, keys)
    np.testing.assert_array_equal(alone.path[:, 0], whole.path[:, row])
    np.testing.assert_array_equal(alone.step[0], whole.step[row])


# MARK: what is given


def test_given_tokens_condition_exactly(mesh):
  """The other tokens have the joint's distribution given these."""
  joints = harness.many_joints(FIVE)[:3]
  x = np.tile(FIVE.texts, (3, 1))
  x[:, [0, 2, 4]] = MASK
  config = settings(num_steps=3, order="margin")
  keys = harness.row_keys(np.zeros(len(x), int))
  params = {
    "joint": np.repeat(joints, 243, axis=0),
    "forced": np.tile(FIVE.texts, (3, 1)),
  }
  drawn = harness.draw(config, FIVE, params, x, mesh, keys, force=True)
  grid = joints.reshape(3, 3, 3, 3, 3, 3).astype(np.float64)
  want = grid / grid.sum(axis=(1, 3, 5), keepdims=True)
  got = np.exp(harness.log_probability(drawn)).reshape(want.shape)
  np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"guidance": 1.0}], ids=str)
def test_given_tokens_never_change_whatever_their_ids(mesh, fields):
  given = some_canvas(rows=64)
  kept = ~given.free & (np.arange(12)[None] < given.lengths[:, None])
  assert {EOS, PAD, MASK} <= set(given.tokens[kept].tolist())
  config = settings(num_steps=5, **fields)
  drawn = harness.draw(config, PAIRS, PAIRS.params(eos=0.0), given, mesh)
  for x in drawn.path:
    np.testing.assert_array_equal(x[kept], given.tokens[kept])
  assert (drawn.step[kept] == -1).all()
  assert not np.isin(drawn.path[-1][drawn.step >= 0], [PAD, MASK]).any()


@pytest.mark.parametrize("fields", [{}, {"guidance": 1.0}], ids=str)
def test_a_text_ends_behind_what_is_given_only(mesh, fields):
  given = some_canvas(rows=64)
  places = np.arange(12)[None]
  kept = ~given.free & (places < given.lengths[:, None])
  last = np.where(kept, places, -1).max(axis=1)
  config = settings(num_steps=5, **fields)
  drawn = harness.draw(config, PAIRS, PAIRS.params(eos=2.0), given, mesh)
  ends = (drawn.path[-1] == EOS) & given.free & (drawn.step >= 0)
  assert ends.any()
  assert (ends.sum(axis=1) <= 1).all()
  assert (np.argmax(ends, axis=1) > last)[ends.any(axis=1)].all()
  end = np.where(ends, places + 1, given.lengths[:, None]).min(axis=1)
  behind = places >= end[:, None]
  assert (drawn.path[-1][behind] == PAD).all()
  assert (drawn.step[behind] == -1).all()
  assert (drawn.confidence[behind] == 0).all()
  np.testing.assert_array_equal(drawn.step >= 0, given.free & ~behind)


# MARK: guidance


def test_guidance_leaves_rows_without_a_prompt_alone(mesh):
  x = harness.blank(64, 12)
  x[32:, :3] = 1
  plain, guided = (
    harness.draw(
      settings(num_steps=5, **fields), PAIRS, PAIRS.params(), x, mesh
    )
    for fields in ({}, {"guidance": 1.0})
  )
  np.testing.assert_array_equal(plain.path[:, :32], guided.path[:, :32])
  assert (plain.path[:, 32:] != guided.path[:, 32:]).any()
  np.testing.assert_array_equal(2 * plain.calls[:32], guided.calls[:32])


def test_guidance_weighs_the_prompt(mesh, weight=0.5):
  """One token after two given ones: p(x) (p(x | given) / p(x))^(1 + w)."""
  model = Joint(length=3)
  joint = harness.random_joint(model, 3)
  x = model.texts.copy()
  x[:, 2] = MASK
  params = {"joint": np.broadcast_to(joint, (27, 27)), "forced": model.texts}
  config = settings(num_steps=1, guidance=weight)
  drawn = harness.draw(config, model, params, x, mesh, force=True)
  grid = joint.reshape(3, 3, 3).astype(np.float64)
  given = grid / grid.sum(axis=2, keepdims=True)
  alone = grid.sum(axis=(0, 1))
  want = alone * (given / alone) ** (1 + weight)
  want /= want.sum(axis=2, keepdims=True)
  got = drawn.confidence[:, 2].reshape(want.shape)
  np.testing.assert_allclose(got, want, rtol=1e-4)
