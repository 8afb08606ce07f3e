"""The sampler against models whose distribution is known."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from conftest import make_mesh

from mdm_jax.core import rng
from mdm_jax.core.config import ModelConfig, SampleConfig
from mdm_jax.core.sharding import batch_sharding
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.sampling import schedule, tokens
from mdm_jax.sampling.sampler import make_sampler

MASK = 5
PLAIN = SampleConfig(
  temperature=1.0, temperature_range=None, top_k=None, top_p=None
)


def settings(**fields):
  return dataclasses.replace(PLAIN, **fields)


def sample(*args, **kwargs):
  return sample_path(*args, **kwargs)[-1]


def sample_path(config, denoiser, params, x, mesh, seed=0, first=0):
  place = lambda a: jax.device_put(a, batch_sharding(mesh, a.ndim))
  keys = rng.per_row(
    rng.stream(seed, "sample"), jnp.arange(first, first + len(x))
  )
  x = np.asarray(x, np.int32)
  run = make_sampler(config, denoiser, MASK)
  return np.asarray(run(params, place(x), place(x == MASK), place(keys)))


@dataclasses.dataclass(frozen=True)
class Oracle:
  """Knows the text: the hidden state is its one-hot, the head the identity."""

  seen: list = dataclasses.field(default_factory=list, compare=False)

  def __hash__(self):
    return id(self)

  def hidden(self, params, xt, segments, rate):
    jax.debug.callback(lambda x: self.seen.append(np.asarray(x)), xt)
    return jax.nn.one_hot(params, 5)

  def logits(self, params, hidden):
    return jnp.where(hidden > 0, 0.0, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class Table:
  """The exact conditionals of a joint over V**L texts."""

  vocab: int
  length: int

  def hidden(self, params, xt, segments, rate):
    texts = jnp.array(
      list(itertools.product(range(self.vocab), repeat=self.length))
    )
    fits = (xt[:, None] == texts[None]) | (xt[:, None] == MASK)
    weight = jnp.where(fits.all(axis=2), params[None], 0.0)
    onehot = jax.nn.one_hot(texts, self.vocab)
    marginal = jnp.einsum("bt,tlv->blv", weight, onehot)
    return jnp.log(marginal)

  def logits(self, params, hidden):
    return hidden


def table_joint(vocab=3, length=4, seed=0):
  draw = np.random.default_rng(seed).gamma(0.3, size=vocab**length)
  return (draw / draw.sum()).astype(np.float32)


def chi_square(drawn, joint, vocab):
  """Pearson's statistic in standard deviations over its degrees of freedom."""
  index = (drawn * vocab ** np.arange(drawn.shape[1])[::-1]).sum(axis=1)
  expected = joint * len(drawn)
  kept = expected > 5
  counts = np.bincount(index, minlength=len(joint))
  counts = np.append(counts[kept], counts[~kept].sum())
  expected = np.append(expected[kept], expected[~kept].sum())
  freedom = len(counts) - 1
  statistic = ((counts - expected) ** 2 / np.maximum(expected, 1e-9)).sum()
  return (statistic - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize("num_steps", [1, 3, 7, 16])
def test_a_perfect_denoiser_is_reproduced(any_mesh, num_steps):
  truth = jnp.arange(8 * 12).reshape(8, 12) % 5
  x = np.full((8, 12), MASK)
  out = sample(settings(num_steps=num_steps), Oracle(), truth, x, any_mesh)
  np.testing.assert_array_equal(out, truth)


@pytest.mark.parametrize("num_steps", [1, 5, 12, 20])
def test_calls_and_reveals_follow_the_schedule(mesh, num_steps):
  """Also the guide's origin: it filled every mask in the first step."""
  truth = jnp.arange(2 * 12).reshape(2, 12) % 5
  x = np.full((2, 12), MASK)
  x[1, :5] = [0, 1, 2, 3, 4]
  oracle = Oracle()
  path = sample_path(settings(num_steps=num_steps), oracle, truth, x, mesh)
  jax.effects_barrier()
  np.testing.assert_array_equal(path[:-1], oracle.seen)
  np.testing.assert_array_equal(path[-1, 0], truth[0])
  assert len(oracle.seen) == num_steps
  for step, seen in enumerate(oracle.seen):
    left = [12 - step * 12 // num_steps, 7 - step * 7 // num_steps]
    np.testing.assert_array_equal((seen == MASK).sum(axis=1), left)


def test_one_token_a_step_samples_the_joint(mesh):
  joint = table_joint()
  x = np.full((60_000, 4), MASK)
  table = Table(3, 4)
  exact = sample(settings(num_steps=4), table, jnp.array(joint), x, mesh)
  assert abs(chi_square(exact, joint, 3)) < 4
  at_once = sample(settings(num_steps=1), table, jnp.array(joint), x, mesh)
  assert chi_square(at_once, joint, 3) > 100  # the test can see a difference


def test_a_prompt_conditions_and_stays(mesh):
  joint = table_joint()
  x = np.full((30_000, 4), MASK)
  x[:, 1] = 2
  out = sample(settings(num_steps=3), Table(3, 4), jnp.array(joint), x, mesh)
  assert (out[:, 1] == 2).all()
  given = joint.reshape(3, 3, 3, 3)[:, 2].reshape(-1)
  given = given / given.sum()
  assert abs(chi_square(out[:, [0, 2, 3]], given, 3)) < 4


@pytest.fixture
def network(mesh):
  denoiser = Denoiser(ModelConfig(num_layers=1, embed_dim=8, num_heads=2), 8, 4)
  params = jax.jit(denoiser.init)(rng.stream(0, "init"))
  return denoiser, jax.tree.map(lambda p: p * 3, params)


def test_no_mask_and_no_unreal_id_is_left(network, mesh):
  x = np.full((16, 10), MASK)
  x[:, 3:5] = 1
  out = sample(settings(num_steps=4), *network, x, mesh)
  assert out.max() < 4
  assert (out[:, 3:5] == 1).all()


def test_a_row_does_not_depend_on_its_batch(network, mesh):
  x = np.full((8, 10), MASK)
  whole = sample(settings(num_steps=5), *network, x, mesh)
  part = sample(settings(num_steps=5), *network, x[:2], mesh, first=3)
  np.testing.assert_array_equal(whole[3:5], part)
  other = sample(settings(num_steps=5), *network, x, mesh, seed=1)
  assert (whole != other).any()


def test_a_row_does_not_depend_on_the_mesh():
  drawn = []
  for name in ("1x1", "4x2"):
    mesh = make_mesh(name)
    with jax.set_mesh(mesh):
      denoiser = Denoiser(
        ModelConfig(num_layers=1, embed_dim=8, num_heads=2), 8, 4
      )
      params = jax.jit(denoiser.init)(rng.stream(0, "init"))
      x = np.full((8, 10), MASK)
      config = settings(num_steps=5, top_k=3, top_p=0.9)
      drawn.append(sample(config, denoiser, params, x, mesh))
  np.testing.assert_array_equal(*drawn)


def test_steps_are_even_and_complete():
  total = jnp.array([0, 1, 7, 12])
  before = np.stack([schedule.revealed_before(i, 5, total) for i in range(6)])
  np.testing.assert_array_equal(before[0], 0)
  np.testing.assert_array_equal(before[-1], total)
  steps = np.diff(before, axis=0)
  assert steps.min() >= 0
  assert steps.max() <= schedule.most_revealed(5, 12) == 3


def kept(logits, **how):
  cut, ids = tokens.truncate(
    jnp.log(jnp.array(logits)),
    **({"temperature": 1.0, "top_k": None, "top_p": None} | how),
  )
  return sorted(np.asarray(ids)[np.isfinite(np.asarray(cut))].tolist())


def test_top_k_keeps_the_k_likeliest():
  assert kept([0.1, 0.4, 0.2, 0.3], top_k=2) == [1, 3]
  assert kept([0.1, 0.4, 0.2, 0.3], top_k=9) == [0, 1, 2, 3]


def test_top_p_keeps_the_token_that_crosses_it():
  probs = [0.5, 0.3, 0.15, 0.05]
  assert kept(probs, top_p=0.4) == [0]
  assert kept(probs, top_p=0.6) == [0, 1]
  assert kept(probs, top_p=0.96) == [0, 1, 2, 3]


def test_the_order_is_temperature_then_top_k_then_top_p():
  probs = [0.4, 0.3, 0.2, 0.1]
  # Of the two kept by top-k, the first has 0.57 of the mass.
  assert kept(probs, top_k=2, top_p=0.55) == [0]
  assert kept(probs, top_p=0.55) == [0, 1]
  # A high temperature flattens before the mass is counted.
  assert kept(probs, temperature=100.0, top_p=0.55) == [0, 1, 2]


def test_draws_have_the_distribution_of_the_logits():
  probs = np.array([0.5, 0.25, 0.2, 0.05])
  logits = jnp.broadcast_to(
    jnp.log(jnp.array(probs, jnp.float32)), (40, 1000, 4)
  )
  keys = rng.per_row(rng.stream(0, "draw"), jnp.arange(40))
  for temperature, top_k in ((1.0, None), (0.5, None), (1.0, 2)):
    out = np.asarray(tokens.draw(keys, logits, temperature, top_k))
    want = probs ** (1 / temperature) * (probs >= 0.25 if top_k else 1)
    want = want / want.sum()
    share = np.bincount(out.reshape(-1), minlength=4) / out.size
    sigma = np.sqrt(want * (1 - want) / out.size)
    assert (abs(share - want) <= 4 * sigma).all()


def test_half_precision_logits_are_refused():
  keys = rng.per_row(rng.stream(0, "draw"), jnp.arange(1))
  with pytest.raises(AssertionError):
    tokens.draw(keys, jnp.zeros((1, 1, 4), jnp.bfloat16))


@pytest.mark.parametrize(
  "asked, limits, used",
  [
    (0.6, (0.3, 0.8), 0.6),
    (1.0, (0.3, 0.8), 0.8),
    (0.1, (0.3, 0.8), 0.3),
    (1.0, None, 1.0),
  ],
)
def test_temperature_is_clamped_and_says_so(monkeypatch, asked, limits, used):
  said = []
  monkeypatch.setattr(logging, "warning", lambda *a: said.append(a))
  config = settings(temperature=asked, temperature_range=limits)
  assert tokens.effective_temperature(config) == used
  assert bool(said) == (asked != used)
