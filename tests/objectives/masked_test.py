"""The masked objective: weights, number of predictions, logged values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objectives_harness import (
  MODEL,
  PLAN,
  VOCAB,
  answer,
  ask,
  make_batch,
  make_rows,
  network,
)

from mdm_jax.core import rng
from mdm_jax.model.context import CAUSAL, FULL, OPENING, row_context
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


def test_attention_opens_in_a_share_of_the_stages_updates(mesh):
  plan = dataclasses.replace(PLAN, start=10, updates=8)
  objective = build(plan, opening=0.5)
  assert objective.cost().visibility == OPENING
  found = [ask(objective, mesh, step, plan) for step in (10, 11, 14, 17)]
  shares = [np.unique(f.context.opening.share).tolist() for f in found]
  assert shares == [[0], [0.25], [1], [1]]
  logged = objective.summaries(found[1], jnp.zeros((2, 8)))
  assert logged["attention_opened"] == (0.25, 1)
  keys = np.stack([jax.random.key_data(f.context.opening.keys) for f in found])
  assert len(np.unique(keys.reshape(-1, 2), axis=0)) == keys[..., 0].size
  plain = build(plan)
  assert plain.cost().visibility == FULL
  assert ask(plain, mesh, 11, plan).context.opening is None


def test_before_attention_opens_a_shifted_model_predicts_the_next_token(mesh):
  """The last token of a row, masked, costs what the causal model says."""
  rows = make_rows()
  last = np.arange(PLAN.length) == PLAN.length - 1
  rows.fields["answer"] = (last & (rows.segments > 0)).astype(np.int8)
  batch = make_batch(mesh, rows=rows)
  plan = dataclasses.replace(PLAN, updates=4, most_asked=1)
  objective = dataclasses.replace(build(plan, opening=1.0), label_smoothing=0.0)
  model = dataclasses.replace(MODEL, shift_outputs=True)
  _, costs, _ = answer(objective, batch, plan, model)
  denoiser, params = network()

  @jax.jit
  def causal(params, tokens, segments):
    context = row_context(segments, visibility=CAUSAL)
    hidden = denoiser.hidden(params, tokens, context)
    logs = jax.nn.log_softmax(denoiser.logits(params, hidden[:, -2]))
    target = jnp.arange(logs.shape[1])[None] == tokens[:, -1:]
    return jnp.where(target, -logs, 0).sum(axis=1)

  wanted = causal(params, batch.tokens[0], batch.segments[0])
  asked = np.asarray(batch.answer)[0, :, -1] > 0
  assert asked.sum() > 4
  np.testing.assert_allclose(costs[0], np.where(asked, wanted, 0), rtol=1e-5)
  _, later, _ = answer(objective, batch, plan, model, step=2)
  assert np.abs(later - costs).max() > 1e-3


def test_a_trace_can_read_the_cost_but_not_build_the_objective(mesh):
  """Why an objective is built outside `jit`: its capacity is a number."""
  objective = build()
  assert jax.eval_shape(lambda: jnp.zeros(objective.cost().asked)).size > 0
  with pytest.raises(jax.errors.JAXTypeError):
    jax.eval_shape(lambda: jnp.zeros(build().capacity))
