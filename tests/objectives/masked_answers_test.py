"""The masked objective masks and predicts a row's answer, and nothing else."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.core import rng
from mdm_jax.core.errors import UserError
from mdm_jax.core.sharding import data_shards
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data.batches import make_batch
from mdm_jax.data.packing import pack
from mdm_jax.data.rows import Rows
from mdm_jax.model.config import ModelConfig
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.objectives import autoregressive
from mdm_jax.objectives.config import (
  AutoregressiveConfig,
  AutoregressiveStage,
  MaskedConfig,
  MaskedStage,
  NoiseConfig,
)
from mdm_jax.objectives.draws import Draws, Plan
from mdm_jax.objectives.masked import build

VOCAB = Vocabulary.after_text(26)
LENGTH, ROWS = 16, 16
MODEL = ModelConfig(num_layers=1, embed_dim=8, num_heads=2)


def make_rows():
  """Packed prompts with answers; the last row has a prompt alone."""
  draw = np.random.default_rng(0)
  sizes = draw.integers(3, 13, 60)
  texts = [draw.integers(0, 26, n) for n in sizes]
  starts = [0 if i % 5 == 0 else n // 2 for i, n in enumerate(sizes)]
  answers = [np.arange(len(t)) >= s for t, s in zip(texts, starts, strict=True)]
  rows = pack(texts, LENGTH, VOCAB, answer=answers)
  rows = rows.take(np.arange(ROWS))
  rows.fields["answer"][-1] = 0
  return rows


ROWS_WITH_ANSWERS = make_rows()


def pose(mesh, rows, weighting="nelbo", most_asked=LENGTH):
  """The questions of an update of two microbatches, and the objective."""
  plan = Plan(2, ROWS // 2, LENGTH, data_shards(mesh), most_asked, LENGTH)
  config = MaskedConfig(weighting=weighting)
  objective = build(config, MaskedStage(), NoiseConfig(), VOCAB, plan)

  @jax.jit
  def examples(batch):
    return objective.examples(batch, Draws(0, 3, plan, batch.tokens.shape[1]))

  batch = make_batch(rows, np.arange(ROWS), 2, mesh)
  return objective, batch, examples(batch)


@pytest.mark.parametrize("weighting", ["masked_ce", "nelbo"])
def test_nothing_of_a_prompt_is_masked_or_asked(any_mesh, weighting):
  _, batch, found = pose(any_mesh, ROWS_WITH_ANSWERS, weighting)
  answer, asked = np.asarray(batch.answer), np.asarray(found.asked)
  tokens, read = np.asarray(batch.tokens), np.asarray(found.tokens)
  assert 0 < answer.sum() < (np.asarray(batch.segments) > 0).sum()
  assert not (asked & ~answer).any()
  assert (read[~asked] == tokens[~asked]).all()
  assert (read[asked] == VOCAB.mask).all()
  rate = np.asarray(found.context.condition)
  count = np.ceil(rate * answer.sum(axis=-1) * (1 - 1e-6))
  assert (asked.sum(axis=-1) == count).all()
  assert not asked.reshape(ROWS, LENGTH)[-1].any()  # it has no answer


def test_weights_are_those_of_the_answers(any_mesh):
  """`nelbo`: a row's masked tokens weigh n / p(r) / k over all answers."""
  _, batch, found = pose(any_mesh, ROWS_WITH_ANSWERS, "nelbo")
  asked = np.asarray(found.asked)
  size = np.asarray(batch.answer).sum(axis=-1)  # rates are uniform: p is 1
  want = size / np.maximum(asked.sum(axis=-1), 1) / size.sum()
  want = np.broadcast_to(want[..., None], asked.shape)
  weights = np.asarray(found.weights)
  np.testing.assert_allclose(weights[asked], want[asked], rtol=1e-6)
  _, _, found = pose(any_mesh, ROWS_WITH_ANSWERS, "masked_ce")
  total = np.asarray(found.weights)[np.asarray(found.asked)].sum()
  np.testing.assert_allclose(total, 1, rtol=1e-6)


def test_the_share_masked_is_of_the_answers(any_mesh):
  objective, batch, found = pose(any_mesh, ROWS_WITH_ANSWERS)
  nothing = jnp.zeros(found.asked.shape[:2])
  share = objective.summaries(found, nothing)["mask_rate"]
  assert float(share.total) == np.asarray(found.asked).sum()
  assert float(share.count) == np.asarray(batch.answer).sum()


def test_rows_without_answers_are_asked_everywhere_to_the_bit(any_mesh):
  rows = ROWS_WITH_ANSWERS
  plain = Rows(rows.tokens, rows.segments)
  every = Rows(
    rows.tokens, rows.segments, answer=(rows.segments > 0).astype(np.uint8)
  )
  _, _, one = pose(any_mesh, plain)
  _, _, other = pose(any_mesh, every)
  hide = lambda e: (e.tokens, e.asked, e.weights, e.answers)
  jax.tree.map(np.testing.assert_array_equal, hide(one), hide(other))


def test_the_buffer_is_as_long_as_answers_need(any_mesh):
  most = int(ROWS_WITH_ANSWERS.answer.sum(axis=1).max())
  assert most < LENGTH
  whole, *_ = pose(any_mesh, ROWS_WITH_ANSWERS)
  short, _, found = pose(any_mesh, ROWS_WITH_ANSWERS, most_asked=most)
  assert short.capacity < whole.capacity
  shards = data_shards(any_mesh)
  by_shard = np.asarray(found.asked).reshape(2, shards, -1).sum(axis=-1)
  assert by_shard.max() <= short.capacity


@functools.cache
def _gradients(mesh_size, name="masked"):
  """Of an update's loss, by the parameters; with the prompts' targets moved."""
  del mesh_size
  mesh = jax.sharding.get_mesh()
  denoiser = Denoiser(MODEL, VOCAB)
  params = jax.jit(denoiser.init)(rng.stream(0, "init"))
  objective, batch, found = pose(mesh, ROWS_WITH_ANSWERS)
  if name == "autoregressive":
    objective, found = next_token(mesh, batch)

  @jax.jit
  def gradient(targets):
    def loss(params):
      add = lambda total, part: (
        total + objective.loss(denoiser, params, part)[0],
        None,
      )
      parts = dataclasses.replace(found, targets=targets)
      return jax.lax.scan(add, jnp.zeros(()), parts)[0]

    return jax.value_and_grad(loss)(params)

  other = jnp.where(batch.answer, found.targets, (found.targets + 1) % 26)
  return jax.device_get((gradient(found.targets), gradient(other)))


def next_token(mesh, batch):
  """The autoregressive objective, and its questions of the same batch."""
  plan = Plan(2, ROWS // 2, LENGTH, data_shards(mesh), LENGTH, LENGTH)
  objective = autoregressive.build(
    *(AutoregressiveConfig(), AutoregressiveStage(), NoiseConfig()),
    *(VOCAB, plan),
  )
  draws = Draws(0, 3, plan, batch.tokens.shape[1])
  return objective, jax.jit(lambda b: objective.examples(b, draws))(batch)


def test_the_next_token_is_asked_of_answers_alone(mesh):
  """The joint objective is the sum of these two, so it needs no test."""
  with jax.set_mesh(mesh):
    one, other = _gradients(mesh.size, "autoregressive")
    jax.tree.map(np.testing.assert_array_equal, one, other)
    batch = make_batch(ROWS_WITH_ANSWERS, np.arange(ROWS), 2, mesh)
    _, found = next_token(mesh, batch)
  np.testing.assert_array_equal(found.asked, batch.answer)
  assert np.isfinite(one[0]) and one[0] > 0


def test_what_a_prompt_says_is_no_target(any_mesh):
  one, other = _gradients(any_mesh.size)
  jax.tree.map(np.testing.assert_array_equal, one, other)
  assert np.isfinite(one[0]) and one[0] > 0


def test_meshes_agree_on_the_loss_of_answers(any_mesh):
  one, _ = _gradients(any_mesh.size)
  single = jax.make_mesh(
    (1, 1, 1), any_mesh.axis_names, devices=jax.devices()[:1]
  )
  with jax.set_mesh(single):
    other, _ = _gradients(1)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
  jax.tree.map(close, one, other)


def test_a_vocabulary_without_a_mask_is_reported():
  plan = Plan(1, 8, LENGTH, 1, LENGTH, LENGTH)
  args = MaskedConfig(), MaskedStage(), NoiseConfig()
  with pytest.raises(UserError, match="no mask id"):
    build(*args, Vocabulary(26), plan)
