"""The autoregressive objective against its definition and by enumeration."""

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
from mdm_jax.model.context import CAUSAL, row_context
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.objectives.autoregressive import build, shifted
from mdm_jax.objectives.config import (
  AutoregressiveConfig,
  AutoregressiveStage,
  NoiseConfig,
)

V, L = 3, 3
TEXTS = np.array(list(itertools.product(range(V), repeat=L)))


def make(vocab=VOCAB, plan=PLAN, **fields):
  config = AutoregressiveConfig(name="autoregressive", **fields)
  return build(config, AutoregressiveStage(), NoiseConfig(), vocab, plan)


def make_model(vocab, **fields):
  """A random denoiser, sharp enough that a mistake shows."""
  config = ModelConfig(num_layers=1, embed_dim=8, num_heads=2, **fields)
  denoiser = Denoiser(config, vocab)
  params = jax.jit(denoiser.init)(rng.stream(0, "init"))
  return denoiser, jax.tree.map(lambda p: 3 * p, params)


def test_texts_are_shifted_behind_the_begin_id():
  segments = np.array([[1, 1, 1, 2, 2, 0]])
  tokens = np.array([[10, 11, 12, 20, 21, 6]])
  got = np.asarray(shifted(jnp.asarray(tokens), jnp.asarray(segments), 5))
  np.testing.assert_array_equal(got[:, :5], [[5, 10, 11, 5, 20]])
  # Without a begin id, the end of the text before stands there.
  assert make().begin == VOCAB.begin
  assert make(Vocabulary(8, end=2)).begin == 2
  with pytest.raises(UserError, match="no end id"):
    make(Vocabulary(8))


def test_a_token_is_predicted_from_those_before_it_in_its_text(mesh):
  """By gradients: of each position's cost, to each token's embedding."""
  # Every token is another, so that an embedding's gradient tells the position.
  vocab = Vocabulary(12, begin=10, pad=11, forbidden=((10, 12),))
  model, params = make_model(vocab, tie_embeddings=False)
  objective = make(vocab)
  segments = np.array([[1, 1, 1, 1, 2, 2, 2, 0]], np.int32)
  tokens = np.array([[0, 1, 2, 3, 4, 5, 6, 11]], np.int32)
  place = lambda x: jax.device_put(x, batch_sharding(mesh, 2))
  batch = Batch(tokens=place(tokens), segments=place(segments))

  keys = jax.random.split(jax.random.key(0), 1)  # nothing is drawn

  def cost(table, i):
    part = objective.pose(batch, keys, {}, 8)
    nats = objective.nats(model, params | {"embedding": table}, part)
    return jnp.where(jnp.arange(8)[None] == i, nats, 0).sum()

  gradient = jax.jit(jax.grad(cost))
  reads = [gradient(params["embedding"], i) for i in range(8)]
  reads = np.abs(np.asarray(reads)).max(axis=2)
  want = np.zeros((8, 12), bool)
  for i, j in itertools.product(range(7), repeat=2):
    same = segments[0, i] == segments[0, j]
    want[i, j] = same and j < i
  want[:7, vocab.begin] = True
  np.testing.assert_array_equal(reads != 0, want)


@pytest.fixture(scope="module")
def enumerated():
  """The costs of all texts of 3 tokens, by the evaluator and by hand."""
  vocab = Vocabulary(8, begin=5, forbidden=((V, 8),))
  with jax.set_mesh(mesh := make_mesh("1x1")):
    model, params = make_model(vocab)
    count = len(TEXTS)
    rows = Rows(TEXTS.astype(np.uint16), np.ones(TEXTS.shape, np.uint16))
    numbers = np.arange(count)
    columns = numbers, numbers**0, numbers, L * numbers**0, 0 * numbers
    held = HeldOut(rows, np.stack(columns, axis=1))
    config = EvalConfig(batch_size=16, masks_per_row=3)
    evaluator = Evaluator(config, make(vocab), model, mesh)
    jobs = make(vocab).jobs(held, "likelihood", 3)
    nats = evaluator.run(params, rows, jobs).by_row

    @jax.jit
    def log_softmax(params, read):
      context = row_context(jnp.ones_like(read), visibility=CAUSAL)
      hidden = model.hidden(params, read, context)
      logits = model.logits(params, hidden[:, -1])
      return jax.nn.log_softmax(logits)

    by_hand = np.zeros(count)
    for i in range(L):  # what is read grows, so nothing ahead can be seen
      read = np.insert(TEXTS, 0, vocab.begin, axis=1)[:, : i + 1]
      log_p = np.asarray(log_softmax(params, jnp.asarray(read)))
      by_hand -= log_p[numbers, TEXTS[:, i]]
    measured = evaluator.measure(params, held)
    assert not evaluator.measure(params, held, "values").values
  return nats, by_hand, measured


def test_the_likelihood_is_the_product_of_conditionals(enumerated):
  nats, by_hand, _ = enumerated
  np.testing.assert_allclose(nats, by_hand, rtol=1e-5, atol=1e-6)
  assert np.exp(-nats.astype(np.float64)).sum() == pytest.approx(1, rel=1e-5)
  assert nats.std() > 0.5


def test_it_is_exact_and_says_so(enumerated):
  nats, _, measured = enumerated
  head = measured.head()
  assert head.value == pytest.approx(nats.mean() / L, rel=1e-6)
  # All texts have equal lengths, so the ratio's error is that of a mean.
  error = nats.std(ddof=1) / np.sqrt(len(nats)) / L
  assert head.error == pytest.approx(error, rel=1e-4)
  assert set(measured.values) == {"nll_per_token", "ppl", "bits_per_byte"}
  assert not any(value.bound for value in measured.values.values())


def test_the_loss_is_the_mean_over_all_tokens(mesh):
  """On any mesh, whatever the microbatches, the rows' texts and padding."""
  rows = make_rows(PLAN.rows)
  loss, aux, grads = answer(make(), make_batch(mesh, rows=rows))
  real = (rows.segments > 0).sum()
  assert loss == pytest.approx(aux.sum() / real, rel=1e-5)
  one = dataclasses.replace(PLAN, accumulation=1, batch=PLAN.rows)
  found = [answer(make(plan=one), make_batch(mesh, one, rows), one)]
  with jax.set_mesh(eight := make_mesh("4x2")):
    plan = dataclasses.replace(PLAN, shards=4)
    found += [answer(make(plan=plan), make_batch(eight, plan, rows), plan)]
  for again, _, other in found:
    assert loss == pytest.approx(again, rel=1e-5)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
      *(grads, other),
    )


def test_only_answers_are_asked_for(mesh):
  """What a row is given is read, and not predicted."""
  rows = make_rows(PLAN.rows)
  inside = np.asarray(rows.segments) > 0
  asked = inside & (np.arange(PLAN.length)[None] >= 4)
  half = Rows(rows.tokens, rows.segments, answer=asked.astype(np.uint8))
  posed = jax.jit(pose, static_argnums=(0, 1))
  examples = posed(make(), PLAN, 0, make_batch(mesh, rows=half))
  got = np.asarray(examples.asked).reshape(asked.shape)
  np.testing.assert_array_equal(got, asked)
  assert float(examples.weights[0, 0, 0]) == pytest.approx(1 / asked.sum())


# MARK: masked inputs

LONG = dataclasses.replace(PLAN, length=64, most_asked=64)


def read(objective, mesh, update=0, plan=LONG, **fields):
  """Returns the examples of an update of long rows, [rows, tokens]."""
  rows = make_rows(plan.rows, plan.length)
  batch = make_batch(mesh, plan, Rows(rows.tokens, rows.segments, **fields))
  posed = jax.jit(pose, static_argnums=(0, 1))(objective, plan, update, batch)
  flat = lambda x: np.asarray(x).reshape(plan.rows, plan.length)
  return {n: flat(getattr(posed, n)) for n in ("tokens", *SAME)}


SAME = "targets", "asked", "weights"


def test_only_the_inputs_are_masked(any_mesh):
  """What is predicted, and its weights, are those of plain autoregression."""
  plan = dataclasses.replace(LONG, shards=any_mesh.shape["fsdp"])
  plain, some = make(), make(input_mask_rate=(0.2, 0.6))
  assert make(input_mask_rate=(0.0, 0.0)) == plain
  before, after = (read(x, any_mesh, plan=plan) for x in (plain, some))
  for name in SAME:
    np.testing.assert_array_equal(before[name], after[name])
  masked = after["tokens"] == VOCAB.mask
  assert not (before["tokens"] == VOCAB.mask).any() and masked.any()
  restored = np.where(masked, before["tokens"], after["tokens"])
  np.testing.assert_array_equal(restored, before["tokens"])
  begins = before["tokens"] == VOCAB.begin
  assert not (masked & begins).any()
  # Held-out text is read as it is.
  batch = make_batch(any_mesh, plan, make_rows(plan.rows, plan.length))
  one = jax.tree.map(lambda x: x[0], batch)
  keys = jax.random.split(jax.random.key(0), plan.batch)
  posed = [x.pose(one, keys, {}, 64) for x in (plain, some)]
  np.testing.assert_array_equal(posed[0].tokens, posed[1].tokens)


def test_each_row_draws_its_share_from_the_range(mesh):
  low, high = 0.2, 0.4
  objective, shares = make(input_mask_rate=(low, high)), []
  segments = make_rows(LONG.rows, LONG.length).segments > 0
  for update in range(20):
    found = read(objective, mesh, update)["tokens"] == VOCAB.mask
    shares.append(found.sum(axis=1) / segments.sum(axis=1))
  # Rounded up to whole tokens; the last one of a text is no input.
  assert low - 3 / 57 < np.min(shares) < low + 0.05
  assert high - 0.05 < np.max(shares) < high + 1 / 57
  np.testing.assert_allclose(np.mean(shares), (low + high) / 2, atol=0.01)


def test_masks_follow_from_the_update_alone(mesh):
  objective = make(input_mask_rate=(0.0, 0.9))
  whole = dataclasses.replace(LONG, accumulation=1, batch=LONG.rows)
  first = read(objective, mesh, 3)["tokens"]
  np.testing.assert_array_equal(first, read(objective, mesh, 3)["tokens"])
  again = read(objective, mesh, 3, whole)["tokens"]
  np.testing.assert_array_equal(first, again)
  assert (first != read(objective, mesh, 4)["tokens"]).any()


def test_what_a_row_is_given_is_not_masked(mesh):
  rows = make_rows(LONG.rows, LONG.length)
  given = np.arange(LONG.length)[None] < 9
  answer = (rows.segments > 0) & ~given
  found = read(make(input_mask_rate=(1.0, 1.0)), mesh, answer=answer)
  # The input at a position is the token before it.
  masked = np.roll(found["tokens"] == VOCAB.mask, -1, axis=1)
  inputs = (rows.segments > 0)[:, 1:] & (np.diff(rows.segments) == 0)
  np.testing.assert_array_equal(masked[:, :-1], answer[:, :-1] & inputs)


def test_the_share_of_masked_inputs_is_logged(mesh):
  objective = make(input_mask_rate=(0.5, 0.5))
  rows = make_rows(LONG.rows, LONG.length)
  batch = make_batch(mesh, LONG, rows)
  posed, losses = pose(objective, LONG, 0, batch), jnp.zeros((2, 8))
  assert make().summaries(posed, losses) == {}
  told = objective.summaries(posed, losses)["input_mask_rate"]
  total, count = map(float, told)
  assert total == (np.asarray(posed.tokens) == VOCAB.mask).sum()
  # The last token of a text is no input, and the begin id is none of it.
  inner = (rows.segments > 0)[:, 1:] & (np.diff(rows.segments) == 0)
  assert count == inner.sum()
  assert total / count == pytest.approx(0.5, abs=0.02)


def test_the_range_of_masked_inputs_is_checked():
  reversed_ = {"name": "autoregressive", "input_mask_rate": [0.5, 0.1]}
  with pytest.raises(UserError, match=r"the lower rate first: \(0.1, 0.5\)"):
    config_lib.from_dict({"objective": reversed_})
  with pytest.raises(UserError, match="no mask id"):
    make(Vocabulary(8, end=2), input_mask_rate=(0.0, 0.1))


@pytest.mark.parametrize(
  "fields, words",
  [
    ({"noise": {"schedule": "cosine"}}, "noise.schedule='cosine' has no mea"),
    ({"noise": {"exponent": 3.0}}, "noise.exponent=3.0 has no meaning"),
    ({"model": {"time_conditioning": True}}, "model.time_conditioning=True"),
    ({"stages": [{"rehearsal": 0.5}]}, "belongs to objective.name=masked"),
    ({"objective": {"weighting": "nelbo"}}, "belongs to objective.name=masked"),
  ],
)
def test_settings_of_masks_are_refused(fields, words):
  fields = fields | {
    "objective": {"name": "autoregressive"} | fields.get("objective", {})
  }
  with pytest.raises(UserError, match=words) as found:
    config_lib.from_dict(fields)
  assert "\n" not in str(found.value)
