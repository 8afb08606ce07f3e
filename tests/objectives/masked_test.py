"""The masked objective: weights, number of predictions, logged values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objectives_harness import PLAN, VOCAB, ask, make_batch

from mdm_jax.core import rng
from mdm_jax.objectives import corruption, masked, noise
from mdm_jax.objectives.config import MaskedConfig, MaskedStage, NoiseConfig


def build(plan=PLAN, weighting="nelbo", **stage):
  config = MaskedConfig(weighting=weighting, label_smoothing=0.1)
  return masked.build(config, MaskedStage(**stage), NoiseConfig(), VOCAB, plan)


def test_masked_ce_weighs_every_masked_token_the_same():
  where = jnp.array([[1, 1, 1, 0], [1, 0, 0, 0]], bool)
  real = jnp.ones((2, 4), bool)
  weights = masked.row_weights("masked_ce", where, real, jnp.array([9.0, 9.0]))
  np.testing.assert_allclose(weights, 1 / 4)


@pytest.mark.parametrize(
  "rates",
  [
    noise.RateRange(0.05, 0.2, 0.25),
    noise.RateRange(0.0, 1.0),
    noise.ScheduledRates(noise.cosine),
    noise.ScheduledRates(noise.polynomial(2.0)),
  ],
)
def test_nelbo_weights_are_unbiased_for_any_density(rates):
  """If CE(r) = r**2 the bound per token is 1/3, however rates are drawn."""
  rows, length = 20_000, 500

  @jax.jit
  def bound():
    u = corruption.stratified_uniforms(rng.stream(0, "rate"), rows)
    count = corruption.num_masked(rates.rate(u), jnp.full(rows, length))
    where = jnp.arange(length)[None] < count[:, None]
    real, density = jnp.ones((rows, length), bool), rates.inverse_density(u)
    weights = masked.row_weights("nelbo", where, real, density)
    count = count.astype(jnp.float32)
    return (weights * count * (count / length) ** 2).sum()

  np.testing.assert_allclose(bound(), 1 / 3, rtol=5e-3)


def test_weights_are_those_of_the_whole_update(any_mesh):
  """A loss of 1 at every masked token is a loss of 1, over all microbatches."""
  objective = build(weighting="masked_ce")
  found = ask(objective, any_mesh)
  weights = np.where(np.asarray(found.asked), np.asarray(found.weights), 0)
  np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)
  by_microbatch = weights.sum(axis=(1, 2))
  assert (by_microbatch > 0.3).all()  # no microbatch is a whole by itself


def test_what_a_shard_is_asked_fits_the_capacity(any_mesh):
  shards = any_mesh.shape["fsdp"]
  plan = dataclasses.replace(PLAN, shards=shards)
  objective = build(plan, mask_rate=(0.4, 0.6), rehearsal=0.25)
  assert objective.cost().asked == objective.capacity
  for update in range(4):
    found = ask(objective, any_mesh, update, plan)
    by_shard = np.asarray(found.asked).reshape(plan.accumulation, shards, -1)
    assert by_shard.sum(axis=-1).max() <= objective.capacity
  whole = plan.batch // shards * plan.length
  assert objective.capacity < whole


def test_what_is_asked_is_what_the_model_cannot_read(mesh):
  found, batch = ask(build(), mesh), make_batch(mesh)
  np.testing.assert_array_equal(found.tokens == VOCAB.mask, found.asked)
  np.testing.assert_array_equal(
    np.where(found.asked, found.targets, found.tokens), batch.tokens
  )


def test_summaries_are_of_rows_and_rows_of_positions(mesh):
  objective = build()
  found = ask(objective, mesh)
  losses = jnp.arange(16.0).reshape(2, 8)
  told = jax.device_get(objective.summaries(found, losses))
  rows = jax.device_get(objective.by_row(found, losses))
  real = (np.asarray(found.context.segments) > 0).sum()
  assert told["mask_rate"].count == real
  assert told["mask_rate"].total == rows["masked"].sum()
  assert told["mask_bins"].count.sum() == rows["masked"].sum()
  assert told["mask_bins"].total.sum() == rows["cross_entropy"].sum() == 120
  assert len(objective.tags["mask_bins"]) == len(told["mask_bins"].total)
  np.testing.assert_array_equal(
    rows["masked"], np.asarray(found.asked).sum(axis=-1)
  )


def test_a_trace_can_read_the_cost_but_not_build_the_objective(mesh):
  """Why an objective is built outside `jit`: its capacity is a number."""
  objective = build()
  assert jax.eval_shape(lambda: jnp.zeros(objective.cost().asked)).size > 0
  with pytest.raises(jax.errors.JAXTypeError):
    jax.eval_shape(lambda: jnp.zeros(build().capacity))
