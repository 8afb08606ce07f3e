import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.core import rng
from mdm_jax.core.config import ModelConfig, ObjectiveConfig
from mdm_jax.core.sharding import batch_sharding
from mdm_jax.diffusion import corruption, noise, objective
from mdm_jax.model.denoiser import Denoiser

V, REAL, MASK = 16, 12, 13


@pytest.fixture
def case(any_mesh):
  """A corrupted batch of eight rows, the last ones padded, on any mesh."""
  place = lambda x: jax.device_put(x, batch_sharding(any_mesh, x.ndim))
  x0 = place(np.arange(80).reshape(8, 10) % REAL)
  real = place(np.arange(10)[None] < np.array([[10], [10], [7], [3]] * 2))
  keys = place(rng.per_row(rng.stream(0, "mask"), jnp.arange(8)))
  rate = place(np.linspace(0.1, 1, 8, dtype=np.float32))
  return x0, real, corruption.corrupt(keys, x0, real, rate, MASK)


def network(tie_embeddings=False):
  config = ModelConfig(
    num_layers=1, embed_dim=8, num_heads=2, tie_embeddings=tie_embeddings
  )
  denoiser = Denoiser(config, vocab_size=V, num_real=REAL)
  return denoiser, jax.jit(denoiser.init)(rng.stream(0, "init"))


@functools.partial(
  jax.jit, static_argnames=("denoiser", "capacity", "smoothing")
)
def losses(denoiser, params, case, hidden=None, capacity=80, smoothing=0.0):
  x0, real, corrupted = case
  if hidden is None:
    hidden = jax.jit(denoiser.hidden)(
      params, corrupted.xt, real.astype(jnp.int32), jnp.ones(8)
    )
  return objective.masked_cross_entropy(
    lambda h: denoiser.logits(params, h),
    hidden,
    x0,
    corrupted.masked,
    capacity,
    REAL,
    smoothing,
  )


def test_loss_is_the_cross_entropy_at_masked_positions(case):
  denoiser, params = network()
  x0, real, corrupted = case
  got = losses(denoiser, params, case)
  hidden = jax.jit(denoiser.hidden)(
    params, corrupted.xt, real.astype(jnp.int32), jnp.ones(8)
  )
  logits = denoiser.logits(params, hidden.reshape(80, -1)).reshape(8, 10, V)
  logp = np.asarray(jax.nn.log_softmax(logits))
  full = -np.take_along_axis(logp, np.asarray(x0)[..., None], axis=-1)[..., 0]
  expected = np.where(corrupted.masked, full, 0)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_gradient_is_that_of_the_full_array(mesh):
  denoiser, params = network(tie_embeddings=True)
  rows = batch_sharding(mesh, rank=2)
  x0 = jax.device_put(np.arange(80).reshape(8, 10) % REAL, rows)
  masked = jax.device_put(np.random.default_rng(0).random((8, 10)) < 0.4, rows)
  xt = jnp.where(masked, MASK, x0)
  capacity = int(masked.sum()) + 3

  def hidden(params):
    return jax.jit(denoiser.hidden)(params, xt, jnp.ones_like(xt), jnp.ones(8))

  def packed(params):
    loss = objective.masked_cross_entropy(
      lambda h: denoiser.logits(params, h),
      hidden(params),
      x0,
      masked,
      capacity,
      REAL,
    )
    return (loss**2).sum()

  def full(params):
    logits = denoiser.logits(params, hidden(params).reshape(80, -1))
    loss = objective.cross_entropy(logits, x0.reshape(-1), REAL)
    return (jnp.where(masked.reshape(-1), loss, 0.0) ** 2).sum()

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    jax.jit(jax.grad(packed))(params),
    jax.jit(jax.grad(full))(params),
  )


def test_gradient_is_zero_at_unmasked_positions(case):
  denoiser, params = network()
  hidden = jax.random.normal(rng.stream(0, "h"), (8, 10, 8))
  hidden = jax.device_put(hidden, batch_sharding(case[0].sharding.mesh, 3))
  grad = jax.grad(lambda h: losses(denoiser, params, case, h).sum())(hidden)
  at_masked = np.abs(np.asarray(grad))[np.asarray(case[2].masked)]
  at_unmasked = np.asarray(grad)[~np.asarray(case[2].masked)]
  assert (at_unmasked == 0).all()
  assert (at_masked.max(axis=-1) > 0).all()


def test_gradient_is_zero_for_the_output_rows_of_unreal_ids(case):
  denoiser, params = network()
  loss = lambda p: losses(denoiser, p, case, smoothing=0.1).sum()
  grad = np.asarray(jax.grad(loss)(params)["head"])
  assert (grad[REAL:] == 0).all()
  assert (np.abs(grad[:REAL]).max(axis=1) > 0).all()


def test_logits_do_not_depend_on_x0_where_it_is_masked(case):
  denoiser, params = network()
  x0, real, corrupted = case
  other = jnp.where(corrupted.masked, (x0 + 1) % REAL, x0)
  xt = jnp.where(corrupted.masked, MASK, other)
  np.testing.assert_array_equal(xt, corrupted.xt)
  run = lambda xt: jax.jit(denoiser.hidden)(
    params, xt, real.astype(jnp.int32), jnp.ones(8)
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
  got = objective.cross_entropy(logits, targets, REAL, 0.1)
  smoothed = 0.9 * np.eye(V)[np.asarray(targets)]
  smoothed[:, :REAL] += 0.1 / REAL
  logp = np.asarray(jax.nn.log_softmax(logits))[:, :REAL]
  expected = -(smoothed[:, :REAL] * logp).sum(axis=1)
  np.testing.assert_allclose(got, expected, rtol=1e-5)
  assert np.isfinite(got).all()


def test_half_precision_logits_are_refused():
  with pytest.raises(AssertionError):
    objective.cross_entropy(
      jnp.zeros((1, V), jnp.bfloat16), jnp.zeros(1, int), V
    )


def test_masked_ce_weighs_every_masked_token_the_same():
  masked = jnp.array([[1, 1, 1, 0], [1, 0, 0, 0]], bool)
  real = jnp.ones((2, 4), bool)
  weights = objective.row_weights(
    ObjectiveConfig(), masked, real, jnp.array([9.0, 9.0])
  )
  np.testing.assert_allclose(weights, 1 / 4)


@pytest.mark.parametrize(
  "rates",
  [
    noise.RateRange(0.05, 0.2, 0.25),
    noise.RateRange(0.0, 1.0),
    noise.ScheduledRates(noise.Cosine()),
    noise.ScheduledRates(noise.Polynomial(2.0)),
  ],
)
def test_nelbo_weights_are_unbiased_for_any_density(rates):
  """If CE(r) = r**2 the bound per token is 1/3, however rates are drawn."""
  rows, length = 20_000, 500
  u = corruption.stratified_uniforms(rng.stream(0, "rate"), rows)
  r = rates.rate(u)
  count = corruption.num_masked(r, jnp.full(rows, length))
  masked = jnp.arange(length)[None] < count[:, None]
  weights = objective.row_weights(
    ObjectiveConfig(weighting="nelbo"),
    masked,
    jnp.ones((rows, length), bool),
    rates.inverse_density(u),
  )
  realised = count.astype(jnp.float32) / length
  bound = (weights * count.astype(jnp.float32) * realised**2).sum()
  np.testing.assert_allclose(bound, 1 / 3, rtol=5e-3)
