"""The sampler against models whose distribution is known."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_mesh
from jax.sharding import NamedSharding, PartitionSpec

from mdm_jax.core import rng
from mdm_jax.core.config import ModelConfig, SampleConfig
from mdm_jax.core.sharding import batch_sharding
from mdm_jax.data.tokenizer import Vocabulary
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.sampling import schedule, tokens
from mdm_jax.sampling.call import Canvas
from mdm_jax.sampling.sampler import make_sampler

LETTERS = Vocabulary(5)
MASK = LETTERS.mask
PLAIN = SampleConfig(
  temperature=1.0, temperature_range=None, top_k=None, top_p=None
)


def settings(**fields):
  return dataclasses.replace(PLAIN, **fields)


def sample(*args, **kwargs):
  return np.asarray(draw(*args, **kwargs).path[-1])


def draw(
  config, denoiser, params, x, mesh, seed=0, first=0, lengths=None, free=None
):
  """Draws where x is MASK, or `free`; with keys of the rows from `first`."""
  x = np.asarray(x, np.int32)
  free = x == MASK if free is None else free
  lengths = np.full(len(x), x.shape[1]) if lengths is None else lengths
  canvas = Canvas(x, free, np.asarray(lengths, np.int32))
  place = lambda a: jax.device_put(a, batch_sharding(mesh, a.ndim))
  keys = rng.stream(seed, "sample")
  keys = rng.per_row(keys, jnp.arange(first, first + len(x)))
  pace = schedule.pace(config, x.shape[1])
  pace = jax.device_put(pace, NamedSharding(mesh, PartitionSpec()))
  run = make_sampler(config, denoiser, LETTERS)
  canvas = jax.tree.map(place, canvas)
  settings = tokens.effective_settings(config)
  return run(params, canvas, pace, settings, place(keys))


@dataclasses.dataclass(frozen=True)
class Oracle:
  """Knows the text: the hidden state is its one-hot, the head the identity."""

  seen: list = dataclasses.field(default_factory=list, compare=False)

  def __hash__(self):
    return id(self)

  def hidden(self, params, xt, segments, rate):
    jax.debug.callback(lambda x: self.seen.append(np.asarray(x)), xt)
    return jax.nn.one_hot(params, 7)

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


@pytest.mark.parametrize("order", ["random", "margin"])
def test_one_row_is_a_batch(mesh, order):
  truth = jnp.arange(12).reshape(1, 12) % 5
  config = settings(num_steps=5, order=order)
  out = sample(config, Oracle(), truth, np.full((1, 12), MASK), mesh)
  np.testing.assert_array_equal(out, truth)


@pytest.mark.parametrize("num_steps", [1, 5, 12, 20])
def test_calls_and_reveals_follow_the_schedule(mesh, num_steps):
  """Also the guide's origin: it filled every mask in the first step."""
  truth = jnp.arange(2 * 12).reshape(2, 12) % 5
  x = np.full((2, 12), MASK)
  x[1, :5] = [0, 1, 2, 3, 4]
  oracle = Oracle()
  drawn = draw(settings(num_steps=num_steps), oracle, truth, x, mesh)
  jax.effects_barrier()
  calls = min(num_steps, 12)
  np.testing.assert_array_equal(drawn.path[:calls], oracle.seen)
  np.testing.assert_array_equal(drawn.path[-1, 0], truth[0])
  np.testing.assert_array_equal(drawn.calls, [calls, min(num_steps, 7)])


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
  denoiser = Denoiser(
    ModelConfig(num_layers=1, embed_dim=8, num_heads=2), 128, 4
  )
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


@pytest.mark.parametrize(
  "filters",
  [{}, {"top_k": 3, "top_p": 0.9}, {"min_p": 0.02, "top_p": 0.7}],
)
def test_a_row_does_not_depend_on_the_mesh(filters):
  drawn = []
  for name in ("1x1", "4x2"):
    mesh = make_mesh(name)
    with jax.set_mesh(mesh):
      denoiser = Denoiser(
        ModelConfig(num_layers=1, embed_dim=8, num_heads=2), 128, 4
      )
      params = jax.jit(denoiser.init)(rng.stream(0, "init"))
      x = np.full((8, 10), MASK)
      config = settings(num_steps=5, **filters)
      drawn.append(sample(config, denoiser, params, x, mesh))
  np.testing.assert_array_equal(*drawn)
