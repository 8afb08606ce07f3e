"""The gathered loss and its gradient against the full [B, L, V] array."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.core import rng
from mdm_jax.core.sharding import batch_sharding
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.model.config import ModelConfig
from mdm_jax.model.context import row_context
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.objectives import corruption, cross_entropy

V, REAL, MASK = 16, 12, 13
VOCAB = Vocabulary(V, mask=MASK, forbidden=((REAL, V),))


_corrupt = jax.jit(corruption.corrupt, static_argnums=4)


@pytest.fixture
def case(any_mesh):
  """A corrupted batch of eight rows, the last ones padded, on any mesh."""
  return _case(any_mesh)


@functools.cache
def _case(mesh):
  place = lambda x: jax.device_put(x, batch_sharding(mesh, x.ndim))
  x0 = place(np.arange(80).reshape(8, 10) % REAL)
  real = place(np.arange(10)[None] < np.array([[10], [10], [7], [3]] * 2))
  keys = place(rng.per_row(rng.stream(0, "mask"), jnp.arange(8)))
  rate = place(np.linspace(0.1, 1, 8, dtype=np.float32))
  return x0, real, _corrupt(keys, x0, real, rate, MASK)


def network(tie_embeddings=False):
  return _network(tie_embeddings, jax.sharding.get_mesh())


@functools.cache
def _network(tie_embeddings, _mesh):
  config = ModelConfig(
    num_layers=1, embed_dim=8, num_heads=2, tie_embeddings=tie_embeddings
  )
  denoiser = Denoiser(config, VOCAB)
  return denoiser, jax.jit(denoiser.init)(rng.stream(0, "init"))


@functools.partial(
  jax.jit, static_argnames=("denoiser", "capacity", "smoothing")
)
def losses(denoiser, params, case, hidden=None, capacity=80, smoothing=0.0):
  x0, real, corrupted = case
  if hidden is None:
    hidden = jax.jit(denoiser.hidden)(
      params, corrupted.xt, row_context(real.astype(jnp.int32))
    )
  return cross_entropy.masked_cross_entropy(
    denoiser.logits,
    denoiser.head(params),
    hidden,
    x0,
    corrupted.masked,
    capacity,
    VOCAB,
    smoothing,
  )


def test_loss_is_the_cross_entropy_at_masked_positions(case):
  denoiser, params = network()
  x0, real, corrupted = case
  got = losses(denoiser, params, case)

  @jax.jit
  def log_probabilities(params, xt, real):
    hidden = denoiser.hidden(params, xt, row_context(real.astype(jnp.int32)))
    logits = denoiser.logits(params, hidden.reshape(80, -1))
    return jax.nn.log_softmax(logits).reshape(8, 10, V)

  logp = np.asarray(log_probabilities(params, corrupted.xt, real))
  full = -np.take_along_axis(logp, np.asarray(x0)[..., None], axis=-1)[..., 0]
  expected = np.where(corrupted.masked, full, 0)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def position_weights():
  """Another weight at every position, at some of them none."""
  draw = np.random.default_rng(1).uniform(-0.5, 2, (8, 10))
  return np.maximum(draw, 0).astype(np.float32)


@pytest.fixture
def small_chunks(monkeypatch):
  """A chunk has 16 rows for a width of 8."""
  monkeypatch.setattr(cross_entropy, "_SMALL", 1)


@pytest.mark.parametrize(
  "tied, smoothing",
  [
    (True, 0.1),
    (False, 0.0),
    pytest.param(True, 0.0, marks=pytest.mark.slow),
    pytest.param(False, 0.1, marks=pytest.mark.slow),
  ],
)
def test_training_loss_and_gradient_are_those_of_the_full_array(
  any_mesh, small_chunks, tied, smoothing
):
  """Also where the buffer's last chunk is not full."""
  denoiser, params = network(tied)
  rows = batch_sharding(any_mesh, rank=2)
  x0 = jax.device_put(np.arange(80).reshape(8, 10) % REAL, rows)
  masked = np.random.default_rng(0).random((8, 10)) < 0.6
  shards = any_mesh.shape["replica"] * any_mesh.shape["fsdp"]
  capacity = int(masked.reshape(shards, -1).sum(axis=1).max()) + 1
  masked = jax.device_put(masked, rows)
  weight = jax.device_put(position_weights(), rows)
  xt = jnp.where(masked, MASK, x0)

  def hidden(params):
    context = row_context(jnp.ones_like(xt))
    return denoiser.hidden(params, xt, context)

  def packed(params):
    head = denoiser.logits, denoiser.head(params)
    total, by_position = cross_entropy.masked_loss(
      *head, hidden(params), x0, masked, weight, capacity, VOCAB, smoothing
    )
    return 3 * total, by_position

  def full(params):
    states = hidden(params).reshape(80, -1)
    logits = denoiser.logits(params, states)
    loss = cross_entropy.cross_entropy(logits, x0.reshape(-1), VOCAB, smoothing)
    loss = jnp.where(masked, loss.reshape(8, 10), 0.0)
    return 3 * (loss * weight).sum(), loss

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    jax.jit(jax.value_and_grad(packed, has_aux=True))(params),
    jax.jit(jax.value_and_grad(full, has_aux=True))(params),
  )


def test_training_loss_is_the_weighted_sum_whatever_the_chunks(
  case, small_chunks
):
  denoiser, params = network()
  x0, real, corrupted = case
  hidden = jax.jit(denoiser.hidden)(
    params, corrupted.xt, row_context(real.astype(jnp.int32))
  )
  weight = jax.device_put(
    position_weights(), batch_sharding(x0.sharding.mesh, 2)
  )
  run = lambda capacity: jax.jit(
    cross_entropy.masked_loss, static_argnums=(0, 6, 7)
  )(
    denoiser.logits,
    denoiser.head(params),
    *(hidden, x0, corrupted.masked, weight, capacity, VOCAB),
  )
  by_position = losses(denoiser, params, case, hidden)
  total, along = run(80)
  np.testing.assert_allclose(total, (by_position * weight).sum(), rtol=1e-5)
  np.testing.assert_allclose(along, by_position, rtol=1e-6)
  shards = x0.sharding.mesh.shape["fsdp"] * x0.sharding.mesh.shape["replica"]
  most = np.asarray(corrupted.masked).reshape(shards, -1).sum(axis=1).max()
  total, along = run(int(most) - 1 if most < 17 else 16)
  assert np.isnan(total) and np.isnan(along).any()


def test_what_comes_along_has_no_gradient(case, small_chunks):
  denoiser, params = network()
  x0, _, corrupted = case
  mesh = x0.sharding.mesh
  draw = jax.random.normal(rng.stream(0, "h"), (8, 10, 8))
  hidden = jax.device_put(draw, batch_sharding(mesh, 3))
  weight = jax.device_put(jnp.ones((8, 10)), batch_sharding(mesh, 2))

  def gradient(of):
    def loss(hidden, params):
      found = cross_entropy.masked_loss(
        *(denoiser.logits, denoiser.head(params), hidden, x0),
        *(corrupted.masked, weight, 80, VOCAB),
      )
      return of(*found)

    return np.asarray(jax.jit(jax.grad(loss))(hidden, params))

  np.testing.assert_array_equal(gradient(lambda _, along: along.sum()), 0)
  assert gradient(lambda total, _: total).any()


def test_chunks_follow_the_width_but_are_never_tiny():
  chunks = cross_entropy.num_chunks
  rows = cross_entropy._ROWS_PER_WIDTH * 384
  assert chunks(rows, 384, Vocabulary(50_000)) == 1
  assert chunks(rows + 1, 384, Vocabulary(50_000)) == 2
  assert chunks(100 * rows, 384, Vocabulary(27)) == 1  # its logits are few


def test_no_chunks_logits_are_kept(mesh, small_chunks):
  """The gradient's program has room for one chunk's logits, not for all."""
  vocab = Vocabulary(4096, forbidden=((4000, 4096),))
  denoiser = Denoiser(
    ModelConfig(num_layers=1, embed_dim=8, num_heads=2), vocab
  )
  params = jax.jit(denoiser.init)(rng.stream(0, "init"))
  shapes = (8, 128, 8), (8, 128), (8, 128), (8, 128)
  dtypes = jnp.float32, jnp.int32, bool, jnp.float32
  args = (
    jax.ShapeDtypeStruct(
      shape, dtype, sharding=batch_sharding(mesh, len(shape))
    )
    for shape, dtype in zip(shapes, dtypes, strict=True)
  )
  gradient = jax.grad(
    lambda params, hidden, x0, masked, weight: cross_entropy.masked_loss(
      denoiser.logits,
      denoiser.head(params),
      *(hidden, x0, masked, weight, 1024, vocab),
    ),
    has_aux=True,
  )
  program = jax.jit(gradient).lower(params, *args).compile()
  every_logit = 4 * 1024 * 4096
  assert program.memory_analysis().temp_size_in_bytes < every_logit / 8


def test_gradient_is_zero_at_unmasked_positions(case):
  denoiser, params = network()
  hidden = jax.random.normal(rng.stream(0, "h"), (8, 10, 8))
  hidden = jax.device_put(hidden, batch_sharding(case[0].sharding.mesh, 3))
  loss = lambda h: losses(denoiser, params, case, h).sum()
  grad = jax.jit(jax.grad(loss))(hidden)
  at_masked = np.abs(np.asarray(grad))[np.asarray(case[2].masked)]
  at_unmasked = np.asarray(grad)[~np.asarray(case[2].masked)]
  assert (at_unmasked == 0).all()
  assert (at_masked.max(axis=-1) > 0).all()


def test_gradient_is_zero_for_the_output_rows_of_unreal_ids(case):
  denoiser, params = network()
  loss = lambda p: losses(denoiser, p, case, smoothing=0.1).sum()
  grad = np.asarray(jax.jit(jax.grad(loss))(params)["head"])
  assert (grad[REAL:] == 0).all()
  assert (np.abs(grad[:REAL]).max(axis=1) > 0).all()


def test_logits_do_not_depend_on_x0_where_it_is_masked(case):
  denoiser, params = network()
  x0, real, corrupted = case
  other = jnp.where(corrupted.masked, (x0 + 1) % REAL, x0)
  xt = jnp.where(corrupted.masked, MASK, other)
  np.testing.assert_array_equal(xt, corrupted.xt)
  run = lambda xt: jax.jit(denoiser.hidden)(
    params, xt, row_context(real.astype(jnp.int32))
  )
  np.testing.assert_array_equal(run(xt), run(corrupted.xt))


def test_capacity_changes_nothing_but_too_little_is_nan(case):
  denoiser, params = network()
  shards = case[0].sharding.mesh.shape["fsdp"]
  per_shard = np.asarray(case[2].masked).reshape(shards, -1).sum(axis=1).max()
  full = losses(denoiser, params, case)
  exact = losses(denoiser, params, case, capacity=int(per_shard))
  np.testing.assert_allclose(full, exact, rtol=1e-6)
  short = losses(denoiser, params, case, capacity=int(per_shard) - 1)
  assert np.isnan(np.asarray(short)).any()


def test_label_smoothing_is_uniform_over_real_tokens():
  logits = jax.random.normal(rng.stream(0, "l"), (5, V))
  logits = jnp.where(jnp.arange(V)[None] < REAL, logits, -jnp.inf)
  targets = jnp.array([0, 3, 5, 11, 2])
  got = cross_entropy.cross_entropy(logits, targets, VOCAB, 0.1)
  smoothed = 0.9 * np.eye(V)[np.asarray(targets)]
  smoothed[:, :REAL] += 0.1 / REAL
  logp = np.asarray(jax.nn.log_softmax(logits))[:, :REAL]
  expected = -(smoothed[:, :REAL] * logp).sum(axis=1)
  np.testing.assert_allclose(got, expected, rtol=1e-5)
  assert np.isfinite(got).all()


def test_half_precision_logits_are_refused():
  with pytest.raises(AssertionError):
    cross_entropy.cross_entropy(
      jnp.zeros((1, V), jnp.bfloat16), jnp.zeros(1, int), VOCAB
    )


def test_an_evaluation_with_150_000_ids_never_holds_their_logits(mesh):
  """Of all positions: in wide models a chunk has no more than 256 rows."""
  vocab, rows, length, width = Vocabulary(151_936), 8, 2048, 1024
  model = ModelConfig(num_layers=1, embed_dim=width, num_heads=8)
  denoiser = Denoiser(model, vocab)

  def evaluate(params, hidden, x0):
    masked = x0 >= 0
    return cross_entropy.masked_cross_entropy(
      denoiser.logits, params, hidden, x0, masked, length, vocab
    )

  def shape(*sizes, dtype):
    place = batch_sharding(mesh, len(sizes))
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

  program = jax.make_jaxpr(evaluate)(
    denoiser.head(jax.eval_shape(denoiser.init, jax.random.key(0))),
    shape(rows, length, width, dtype=jnp.float32),
    shape(rows, length, dtype=jnp.int32),
  )
  shapes = set(_shapes(program.jaxpr))
  logits = {s for s in shapes if len(s) > 1 and s[-1] == vocab.size}
  assert logits and max(s[0] for s in logits) == 256


def _shapes(jaxpr):
  for equation in jaxpr.eqns:
    yield from (v.aval.shape for v in equation.outvars)
    for value in equation.params.values():
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        yield from _shapes(inner)
