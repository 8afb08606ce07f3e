"""Block diffusion against its definition, its limits and by enumeration."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mesh_harness import make_mesh
from objectives_harness import PLAN, VOCAB, answer, make_batch, make_rows, pose

from mdm_jax import config as config_lib
from mdm_jax.core import rng
from mdm_jax.core.errors import UserError
from mdm_jax.core.sharding import batch_sharding
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data.batches import Batch
from mdm_jax.data.held_out import HeldOut
from mdm_jax.data.rows import Rows
from mdm_jax.evaluation.config import EvalConfig
from mdm_jax.evaluation.evaluator import Evaluator
from mdm_jax.model.config import ModelConfig
from mdm_jax.model.context import CAUSAL, Visibility, row_context
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.objectives import block_masks, masked
from mdm_jax.objectives.block import build
from mdm_jax.objectives.config import (
  BlockConfig,
  BlockStage,
  MaskedConfig,
  MaskedStage,
  NoiseConfig,
)

V, L = 2, 4
TEXTS = np.array(list(itertools.product(range(V), repeat=L)))
ONE = dataclasses.replace(PLAN, most_segments=1)
WHOLE = Rows(make_rows().tokens, np.ones((16, 16), np.int64))


def make(block=4, plan=PLAN, vocab=VOCAB, stage=None, **fields):
  config = BlockConfig(name="block", block_length=block, **fields)
  return build(config, stage or BlockStage(), NoiseConfig(), vocab, plan)


def assert_same(got, want, rtol=1e-3, atol=1e-6):
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)
  jax.tree.map(close, got, want)


# MARK: rates


@pytest.mark.parametrize(
  "rows, blocks", [(8, 8), (8, 3), (6, 4), (1, 16), (16, 128)]
)
def test_each_rate_of_an_update_is_in_a_stratum_of_its_own(rows, blocks):
  shifts = block_masks.lattice(rows, blocks)
  for seed in range(5):
    first = block_masks.row_uniforms(jax.random.key(seed), rows, blocks)
    u = np.asarray(block_masks.by_block(first, shifts), np.float64)
    assert u.shape == (rows, blocks) and (u > 0).all() and (u <= 1).all()
    # In (0, 1]; half a stratum of slack for rounding at its ends.
    offset = u.min()
    place = np.rint((u.ravel() - offset) * rows * blocks).astype(int)
    np.testing.assert_array_equal(np.sort(place), np.arange(rows * blocks))
    # A row by itself is spread, too.
    gaps = np.diff(np.sort(u, axis=1), axis=1)
    assert blocks == 1 or gaps.max() < 2.01 / blocks


def test_every_block_of_a_row_draws_all_rates():
  """Over many updates: the place of a block in its row tells nothing."""
  shifts = block_masks.lattice(4, 3)
  draw = lambda key: block_masks.row_uniforms(key, 4, 3)
  first = jax.vmap(draw)(jax.random.split(jax.random.key(0), 3000))
  u = np.asarray(block_masks.by_block(first, shifts))
  for j in range(3):
    counts = np.histogram(u[:, :, j], 12, (0, 1))[0]
    np.testing.assert_allclose(counts, 1000, atol=120)


@pytest.mark.parametrize("block", [1, 3, 4, 16])
@pytest.mark.parametrize("rows", ["whole", "packed"])
def test_blocks_mask_their_share_and_fit_the_buffer(mesh, block, rows):
  plan = ONE if rows == "whole" else PLAN
  rows = WHOLE if rows == "whole" else make_rows()
  objective, batch = make(block, plan), make_batch(mesh, plan, rows)
  posed = jax.jit(pose, static_argnums=(0, 1))
  segments = np.asarray(rows.segments).reshape(2, 8, 16)
  start = (np.diff(segments, axis=-1, prepend=0) != 0) & (segments > 0)
  number = np.arange(16)
  first = np.maximum.accumulate(np.where(start, number, 0), axis=-1)
  where = segments * 100 + (number - first) // block
  shares = []
  for step in range(20):
    found = posed(objective, plan, step, batch)
    asked = np.asarray(found.asked)
    assert asked.sum(axis=(1, 2)).max() <= objective.capacity
    assert not asked[segments == 0].any()
    np.testing.assert_array_equal(
      found.tokens, np.where(asked, VOCAB.mask, batch.tokens)
    )
    for a, r in np.ndindex(2, 8):
      for b in np.unique(where[a, r][segments[a, r] > 0]):
        inside = where[a, r] == b
        assert 1 <= asked[a, r][inside].sum() <= inside.sum()
    shares.append(asked.sum() / (segments > 0).sum())
  if block > 1 and plan is ONE:
    # In expectation (n + 1) / 2n, by the rounding up, and nearly constant.
    assert np.mean(shares) == pytest.approx(0.5 + 0.5 / block, abs=0.06)
    assert np.std(shares) < 0.04
  assert objective.capacity <= 8 * 16
  if block == 4 and plan is ONE:
    assert objective.capacity < 0.7 * 8 * 16


def test_clipped_rates_are_for_training_only(mesh):
  stage = BlockStage(mask_rate=(0.4, 0.6))
  objective = make(8, ONE, stage=stage)
  found = pose(objective, ONE, 0, make_batch(mesh, ONE, WHOLE))
  counts = np.asarray(found.asked).reshape(16, 2, 8).sum(axis=-1)
  assert counts.min() == 4 and counts.max() == 5
  held = held_out(np.asarray(WHOLE.tokens))
  rates = objective.jobs(held, "likelihood", 10).given["rate"]
  assert rates.shape == (160, 2)
  for block in rates.reshape(16, 10, 2).transpose(0, 2, 1).reshape(-1, 10):
    strata = np.ceil(np.sort(block) * 10 - 1e-4)
    np.testing.assert_array_equal(strata, np.arange(1, 11))
  inside = objective.jobs(held, "values", 4).given["rate"]
  assert 0.4 <= inside.min() and inside.max() <= 0.6
  curve = objective.jobs(held, "curves", 4).given["rate"]
  assert (curve == curve[:, :1]).all() and curve.min() == np.float32(0.05)


# MARK: limits


@pytest.mark.parametrize("weighting", ["masked_ce", "nelbo"])
def test_one_block_is_the_masked_objective(mesh, weighting):
  """Masks, loss and gradient of an update; and how it is measured."""
  ours = make(16, ONE, weighting=weighting)
  theirs = masked.build(
    MaskedConfig(weighting=weighting),
    *(MaskedStage(), NoiseConfig(), VOCAB, ONE),
  )
  assert ours.capacity == theirs.capacity
  batch = make_batch(mesh, ONE, WHOLE)
  a, b = (pose(x, ONE, 0, batch) for x in (ours, theirs))
  np.testing.assert_array_equal(a.tokens, b.tokens)
  loss, _, grads = answer(ours, batch, ONE)
  again, _, other = answer(theirs, batch, ONE)
  assert loss == pytest.approx(again, rel=1e-6)
  assert_same(grads, other, rtol=1e-5)
  held = held_out(np.asarray(WHOLE.tokens))
  model, params = make_model(VOCAB)
  config = EvalConfig(batch_size=16, masks_per_row=3)
  for part in ("likelihood", "values", "curves"):
    x, y = (
      Evaluator(config, o, model, mesh).measure(params, held, part)
      for o in (ours, theirs)
    )
    assert x.values.keys() == y.values.keys() and (x.values or x.curves)
    for name in x.values:
      assert x.values[name].value == pytest.approx(
        y.values[name].value, rel=1e-6
      )
    for name in x.curves:
      np.testing.assert_allclose(x.curves[name].y, y.curves[name].y, rtol=1e-6)


def held_out(texts):
  """One text a row, each a document."""
  count, length = texts.shape
  numbers = np.arange(count)
  columns = numbers, numbers**0, numbers, length * numbers**0, 0 * numbers
  rows = Rows(texts.astype(np.uint16), np.ones(texts.shape, np.uint16))
  return HeldOut(rows, np.stack(columns, axis=1))


def make_model(vocab, **fields):
  """A random denoiser, sharp enough that a mistake shows."""
  config = ModelConfig(num_layers=2, embed_dim=8, num_heads=2, **fields)
  denoiser = Denoiser(config, vocab)
  params = jax.jit(denoiser.init)(rng.stream(0, "init"))
  return denoiser, jax.tree.map(lambda p: 3 * p, params)


SMALL = Vocabulary(8, pad=6, mask=7, forbidden=((V, 8),))


@pytest.fixture(scope="module")
def tables():
  """-log p(x_i | others shown, blocks before) by (block length, mask, i)."""
  with jax.set_mesh(make_mesh("1x1")):
    model, params = make_model(SMALL)

    @jax.jit
    def log_softmax(params, x, visibility):
      context = row_context(jnp.ones_like(x), visibility=visibility)
      hidden = model.hidden(params, x, context)
      flat = model.logits(params, hidden.reshape(-1, hidden.shape[-1]))
      return jax.nn.log_softmax(flat).reshape(*x.shape, -1)

    log_softmax = jax.jit(log_softmax.__wrapped__, static_argnums=2)

    def cost(block, hidden, i):
      """Of token i, with later blocks cut off, and `hidden` masked."""
      past = (i // block + 1) * block
      x = np.where(np.isin(np.arange(L), hidden), SMALL.mask, TEXTS)[:, :past]
      log_p = log_softmax(params, jnp.asarray(x), Visibility("blocks", block))
      return -np.take_along_axis(
        np.asarray(log_p)[:, i], TEXTS[:, i : i + 1], axis=1
      )[:, 0].astype(np.float64)

    def measured(block, draws):
      plan = dataclasses.replace(ONE, length=L, most_asked=L)
      objective = make(block, plan, SMALL)
      held = held_out(TEXTS)
      evaluator = Evaluator(
        EvalConfig(batch_size=64, masks_per_row=draws),
        objective,
        model,
        jax.sharding.get_mesh(),
      )
      jobs = objective.jobs(held, "likelihood", draws)
      nats = evaluator.run(params, held.rows, jobs).by_row
      assert evaluator.measure(params, held).head().value == pytest.approx(
        nats.mean() / L, rel=1e-5
      )
      return nats.reshape(len(TEXTS), draws).mean(axis=1)

    yield cost, measured


def test_blocks_of_one_token_are_the_exact_likelihood(tables):
  cost, measured = tables
  exact = sum(cost(1, [i], i) for i in range(L))
  assert np.exp(-exact).sum() == pytest.approx(1, rel=1e-5)
  np.testing.assert_allclose(measured(1, 2), exact, rtol=1e-5)
  assert exact.std() > 0.3


def test_the_bound_is_that_of_all_orders_and_above_the_likelihood(tables):
  cost, measured = tables
  bound, exact = 0, 0
  for a in range(0, L, 2):  # a block of two has two orders
    orders = [
      cost(2, [i, j], i) + cost(2, [j], j) for i, j in ((a, a + 1), (a + 1, a))
    ]
    bound = bound + np.mean(orders, axis=0)
    exact = exact - np.log(np.mean(np.exp(-np.array(orders)), axis=0))
  assert np.exp(-exact).sum() == pytest.approx(1, rel=1e-5)
  assert (bound > exact - 1e-6).all() and bound.mean() > exact.mean() + 1e-3
  found = measured(2, 256)
  np.testing.assert_allclose(found, bound, rtol=0.15)
  assert found.mean() == pytest.approx(bound.mean(), rel=0.01)


# MARK: what is seen


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("passes", ["two", "one"])
def test_a_block_sees_clean_blocks_before_it_and_itself(mesh, passes, shift):
  """By gradients: of each position's cost, to each token's embedding."""
  # Every token is another, so that an embedding's gradient tells the position.
  vocab = Vocabulary(12, mask=10, pad=11, forbidden=((10, 12),))
  model, params = make_model(vocab, tie_embeddings=False, shift_outputs=shift)
  plan = dataclasses.replace(PLAN, length=8, most_asked=8)
  objective = make(2, plan, vocab, passes=passes)
  segments = np.array([[1, 1, 1, 1, 1, 2, 2, 0]], np.int32)
  tokens = np.array([[0, 1, 2, 3, 4, 5, 6, 11]], np.int32)
  block = np.array([0, 0, 1, 1, 2, 3, 3, 9])
  place = lambda x: jax.device_put(x, batch_sharding(mesh, 2))
  batch = Batch(tokens=place(tokens), segments=place(segments))
  keys = jax.random.split(jax.random.key(0), 1)
  rate = place(np.full((1, 4), 0.5, np.float32))
  posed = objective.pose(batch, keys, {"rate": rate}, 8)

  def cost(table, i):
    nats = objective.nats(model, params | {"embedding": table}, posed)
    return jnp.where(jnp.arange(8)[None] == i, nats, 0).sum()

  gradient = jax.jit(jax.grad(cost))
  asked = np.asarray(posed.asked)[0]
  assert asked.sum() == 4  # one of each block
  reads = np.array([gradient(params["embedding"], i) for i in range(8)])
  reads = np.abs(reads).max(axis=2)[:, :8] != 0
  want = np.zeros((8, 8), bool)
  for i, j in itertools.product(range(7), repeat=2):
    same = segments[0, i] == segments[0, j] and asked[i]
    before, own = block[j] < block[i], block[j] == block[i] and not asked[j]
    # Shifted, a block's first token is read off the clean block before it.
    if shift and i in (2, 4):
      own = False
    want[i, j] = same and (before or own)
  np.testing.assert_array_equal(reads[:, :7], want[:, :7])


@pytest.mark.parametrize("passes", ["two", "one"])
def test_blocks_of_one_token_begin_as_the_causal_model(mesh, passes):
  """With shifted outputs: its likelihood, but for a text's first token."""
  model, params = make_model(VOCAB)
  batch = make_batch(mesh)
  batch = jax.tree.map(lambda x: x[0], batch)
  causal = row_context(batch.segments, visibility=CAUSAL)
  hidden = model.hidden(params, batch.tokens, causal)
  logits = model.logits(params, hidden.reshape(-1, hidden.shape[-1]))
  log_p = jax.nn.log_softmax(logits).reshape(*batch.tokens.shape, -1)
  want = np.take_along_axis(
    np.asarray(log_p)[:, :-1], np.asarray(batch.tokens)[:, 1:, None], axis=2
  )[..., 0]
  sizes = dataclasses.replace(model.config, shift_outputs=True)
  objective = make(1, passes=passes)
  rows, length = batch.tokens.shape
  keys = jax.random.split(jax.random.key(0), rows)
  posed = objective.pose(
    batch, keys, {"rate": jnp.ones((rows, length))}, rows * length
  )
  shifted = dataclasses.replace(model, config=sizes)
  nats = np.asarray(objective.nats(shifted, params, posed))
  segments = np.asarray(batch.segments)
  later = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
  assert later.sum() > rows
  np.testing.assert_allclose(nats[:, 1:][later], -want[later], 1e-5, 1e-5)


@pytest.mark.parametrize("any_mesh", ["1x1", "4x2"], indirect=True)
def test_one_pass_and_two_give_the_same_update(any_mesh):
  """On any mesh, whatever the microbatches, the rows' texts and padding."""
  shards = any_mesh.shape["fsdp"]
  plan = dataclasses.replace(PLAN, shards=shards)
  whole = dataclasses.replace(plan, accumulation=1, batch=PLAN.rows)
  found = [
    answer(
      make(3, p, passes=passes, weighting="nelbo"), make_batch(any_mesh, p), p
    )
    for passes, p in (("two", plan), ("one", plan), ("two", whole))
  ]
  with jax.set_mesh(one := make_mesh("1x1")):
    found.append(answer(make(3, weighting="nelbo"), make_batch(one)))
  (loss, _, grads), *others = found
  for again, _, other in others:
    assert loss == pytest.approx(again, rel=1e-5)
    assert_same(grads, other)


# MARK: settings


@pytest.mark.parametrize(
  "fields, words",
  [
    ({"model": {"time_conditioning": True}}, "model.time_conditioning=True"),
    ({"stages": [{"opening": 0.1}]}, "blocks grow by stages.0..block_length"),
    ({"objective": {"block_length": 0}}, "objective.block_length=0"),
    ({"objective": {"weighting": "nelbo"}}, "never draws the other rates"),
    ({"objective": {"alpha": 0.5}}, "belongs to objective.name=joint"),
  ],
)
def test_settings_that_it_cannot_follow_are_refused(fields, words):
  objective = {"name": "block"} | fields.get("objective", {})
  fields = {"stages": [{"mask_rate": (0.2, 0.8)}], **fields}
  with pytest.raises(UserError, match=words) as found:
    config_lib.from_dict(fields | {"objective": objective})
  assert "\n" not in str(found.value)


def test_blocks_grow_from_stage_to_stage():
  stages = BlockStage(block_length=2), BlockStage()
  sizes = [make(8, stage=stage).decoding().block for stage in stages]
  assert sizes == [2, 8]
  assert stages[0].describe() == "mask 0-1 by block of 2"
  config = BlockConfig(name="block", block_length=8)
  assert not config.warnings(stages)
  (said,) = config.warnings(stages[::-1])
  assert "stages[1].block_length=2 is not objective.block_length=8" in said
