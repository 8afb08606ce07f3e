"""The sampler's loop: calls, batches, meshes."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from mesh_harness import make_mesh
from sampling_harness import settings

from mdm_jax.core import rng
from mdm_jax.core.sharding import RULES, batch_sharding
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.model.config import ModelConfig
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.sampling import schedule, tokens
from mdm_jax.sampling.call import Canvas
from mdm_jax.sampling.sampler import make_sampler

LETTERS = Vocabulary.after_text(5)
MASK = LETTERS.mask


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
  run = _sampler(config, denoiser)
  canvas = jax.tree.map(place, canvas)
  settings = tokens.effective_settings(config)
  return run(params, canvas, pace, settings, place(keys))


@functools.cache
def _sampler(config, denoiser):
  return make_sampler(config, denoiser, LETTERS)


@dataclasses.dataclass(frozen=True)
class Oracle:
  """Knows the text: the hidden state is its one-hot, the head the identity."""

  seen: list = dataclasses.field(default_factory=list, compare=False)

  def __hash__(self):
    return id(self)

  def hidden(self, params, xt, context):
    jax.debug.callback(lambda x: self.seen.append(np.asarray(x)), xt)
    return jax.reshard(jax.nn.one_hot(params, 7), RULES.spec("batch"))

  def logits(self, params, hidden):
    return jnp.where(hidden > 0, 0.0, -jnp.inf)


@pytest.mark.parametrize("num_steps", [1, 7])
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


@functools.cache
def _network(_mesh):
  denoiser = Denoiser(
    ModelConfig(num_layers=1, embed_dim=8, num_heads=2),
    Vocabulary(128, forbidden=((4, 128),)),
  )
  return denoiser, jax.jit(denoiser.init)(rng.stream(0, "init"))


@pytest.fixture
def network(mesh):
  denoiser, params = _network(mesh)
  return denoiser, jax.tree.map(lambda p: p * 3, params)


def test_no_mask_and_no_unreal_id_is_left(network, mesh):
  x = np.full((16, 10), MASK)
  x[:, 3:5] = 1
  out = sample(settings(num_steps=4), *network, x, mesh)
  assert out.max() < 4
  assert (out[:, 3:5] == 1).all()


@pytest.mark.parametrize(
  "fields",
  [
    pytest.param({}, marks=pytest.mark.slow),
    {"order": "margin", "remasking": "conf", "remasking_rate": 0.3},
  ],
)
def test_a_row_does_not_depend_on_its_batch(network, mesh, fields):
  x, config = np.full((8, 10), MASK), settings(num_steps=5, **fields)
  whole = sample(config, *network, x, mesh)
  part = sample(config, *network, x[:2], mesh, first=3)
  np.testing.assert_array_equal(whole[3:5], part)
  other = sample(config, *network, x, mesh, seed=1)
  assert (whole != other).any()


@pytest.mark.parametrize(
  "fields",
  [
    pytest.param({}, marks=pytest.mark.slow),
    {"order": "margin", "top_k": 3, "top_p": 0.9, "block_length": 4},
    {"order": "spread", "entropy_bound": 0.5, "min_p": 0.02, "guidance": 1.0},
  ],
)
def test_a_row_does_not_depend_on_the_mesh(fields):
  drawn = []
  for name in ("1x1", "4x2"):
    mesh = make_mesh(name)
    with jax.set_mesh(mesh):
      x = np.full((8, 10), MASK)
      config = settings(num_steps=5, **fields)
      drawn.append(sample(config, *_network(mesh), x, mesh))
  np.testing.assert_array_equal(*drawn)


@pytest.mark.parametrize("fields", [{"guidance": 1.0}, {"order": "margin"}])
def test_unrolled_layers_draw_what_a_loop_draws(mesh, fields):
  """They compute the last block only where tokens are drawn."""
  drawn = []
  for loop in ("scan", "unrolled"):
    model = ModelConfig(num_layers=2, embed_dim=8, num_heads=2, layer_loop=loop)
    denoiser = Denoiser(model, Vocabulary(128, forbidden=((4, 128),)))
    params = jax.jit(denoiser.init)(rng.stream(0, "init"))
    x = np.full((8, 10), MASK)
    x[:, 3] = 1
    config = settings(num_steps=4, block_length=5, **fields)
    drawn.append(draw(config, denoiser, params, x, mesh))
  np.testing.assert_array_equal(drawn[0].path, drawn[1].path)
  np.testing.assert_allclose(
    drawn[0].confidence, drawn[1].confidence, rtol=1e-4
  )


def largest_array(mesh, config, vocab, rows, length):
  """The number of entries of the greatest array of a sampler's program."""
  denoiser = Denoiser(
    ModelConfig(num_layers=1, embed_dim=8, num_heads=2), vocab
  )

  def shape(kind, *sizes):
    place = batch_sharding(mesh, len(sizes))
    return jax.ShapeDtypeStruct(sizes, kind, sharding=place)

  canvas = Canvas(
    shape(np.int32, rows, length),
    shape(np.bool_, rows, length),
    shape(np.int32, rows),
  )
  keys = shape(jax.random.key(0).dtype, rows)
  pace = schedule.pace(config, length)
  pace = jax.device_put(pace, NamedSharding(mesh, PartitionSpec()))
  params = jax.eval_shape(denoiser.init, jax.random.key(0))
  run = make_sampler(config, denoiser, vocab)
  chosen = tokens.effective_settings(config)
  program = str(jax.make_jaxpr(run)(params, canvas, pace, chosen, keys))
  program = re.sub(r"@(\([^)]*\)|\w+)", "", program)  # how axes are split
  shapes = re.findall(r"\w\[([\d,]+)\]", program)
  return max(math.prod(map(int, shape.split(","))) for shape in shapes)


@pytest.mark.parametrize("num_steps", [1, 5])
def test_no_array_has_a_vocabulary_for_every_position(mesh, num_steps):
  """The greatest array of the whole program, whatever it is."""
  rows, length, vocab = 4, 16, Vocabulary.after_text(1000)
  config = settings(num_steps=num_steps, order="entropy", top_p=0.9)
  largest = largest_array(mesh, config, vocab, rows, length)
  assert rows * vocab.size <= largest < rows * length * vocab.size / 2


@pytest.mark.parametrize("fields", [{"order": "random"}, {"guidance": 1.0}])
def test_150_000_ids_are_projected_at_few_positions_at_once(mesh, fields):
  """However many are drawn in a step: a chunk has 2^25 logits, or 128 MiB."""
  rows, length, vocab = 8, 512, Vocabulary.after_text(151_900)
  config = settings(num_steps=1, order="entropy", top_p=0.9)
  config = dataclasses.replace(config, **fields)
  largest = largest_array(mesh, config, vocab, rows, length)
  assert 2**24 < largest <= 2**25 < rows * length * vocab.size / 16
