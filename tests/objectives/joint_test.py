"""The joint objective: a weighted sum of two others, measured by both."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mesh_harness import make_mesh
from objectives_harness import (
  MODEL,
  PLAN,
  VOCAB,
  answer,
  make_batch,
  make_rows,
  network,
  pose,
  trace_update,
)

from mdm_jax import config as config_lib
from mdm_jax.core.errors import UserError
from mdm_jax.data.held_out import HeldOut
from mdm_jax.evaluation.config import EvalConfig
from mdm_jax.evaluation.evaluator import Evaluator
from mdm_jax.objectives import joint
from mdm_jax.objectives.config import JointConfig, JointStage, NoiseConfig
from mdm_jax.objectives.measured import (
  NATS,
  PERPLEXITY,
  from_json,
  to_json,
)

# Untied, so that an embedding's gradient is only that of reading it. Dropout,
# since both losses draw it.
UNTIED = dataclasses.replace(MODEL, tie_embeddings=False, dropout=0.2)
NAMES = "masked", "autoregressive"


def make(alpha=0.3, primary="masked", plan=PLAN, **fields):
  config = JointConfig(name="joint", alpha=alpha, primary=primary, **fields)
  stage, noise = JointStage(mask_rate=(0.2, 0.7)), NoiseConfig()
  return joint.build(config, stage, noise, VOCAB, plan)


class Scoped:
  """An objective whose draws are those it has inside the joint one."""

  def __init__(self, objective):
    self.loss = objective.loss
    self.examples = lambda batch, draws: objective.examples(
      batch, draws.scope("autoregressive")
    )


@functools.cache
def updates(mesh):
  """Returns loss, auxiliary results and gradient of each objective."""
  both = make()
  alone = {"masked": both.masked, "autoregressive": Scoped(both.autoregressive)}
  batch, (denoiser, params) = make_batch(mesh), network(UNTIED)

  @jax.jit  # one program for all weights: compiling one takes seconds
  def weighted(alpha, params, batch):
    objective = copy.copy(both)
    object.__setattr__(objective, "alpha", alpha)  # typed a Python float
    return trace_update(objective, denoiser, PLAN, 0, params, batch)

  return {
    **{n: answer(o, batch, model=UNTIED) for n, o in alone.items()},
    **{
      alpha: jax.device_get(weighted(jnp.float32(alpha), params, batch))
      for alpha in (0.0, 0.3, 1.0)
    },
  }


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_loss_and_its_gradient_are_the_weighted_sum(mesh, alpha):
  found = updates(mesh)
  loss, _, grads = found[alpha]
  parts = [found[name][::2] for name in NAMES]
  expected = jax.tree.map(
    lambda masked, next_: (1 - alpha) * masked + alpha * next_, *parts
  )
  assert loss == pytest.approx(expected[0], rel=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
    *(grads, expected[1]),
  )
  assert abs(parts[0][0] - parts[1][0]) > 0.01  # it could be told


def test_a_weight_of_zero_leaves_nothing_of_a_loss(mesh):
  """Only the masked rows read the mask, only the causal ones the begin id."""
  read = lambda alpha: np.abs(updates(mesh)[alpha][2]["embedding"]).max(axis=1)
  masked, both, causal = (read(alpha) for alpha in (0.0, 0.3, 1.0))
  assert masked[VOCAB.mask] and not masked[VOCAB.begin]
  assert causal[VOCAB.begin] and not causal[VOCAB.mask]
  assert both[VOCAB.mask] and both[VOCAB.begin]


def test_both_losses_are_logged(mesh):
  objective = make()
  examples = pose(objective, PLAN, 0, make_batch(mesh))
  loss, aux, _ = updates(mesh)[0.3]
  aux = jax.tree.map(jnp.asarray, aux)
  told = jax.device_get(objective.summaries(examples, aux))
  losses = [told[f"{name}_loss"] for name in NAMES]
  masked, next_ = (float(x.total / x.count) for x in losses)
  assert loss == pytest.approx(0.7 * masked + 0.3 * next_, rel=1e-6)
  assert {"mask_rate", "mask_bins"} < told.keys()
  assert objective.tags.keys() <= told.keys()
  rows = objective.by_row(examples, aux)
  total = rows["autoregressive_cross_entropy"].sum()
  predicted = rows["autoregressive_predicted"].sum()
  assert float(total) / float(predicted) == pytest.approx(next_, rel=1e-5)


def test_the_same_update_draws_the_same(mesh):
  objective, batch = make(input_mask_rate=(0.0, 0.9)), make_batch(mesh)
  tokens = lambda update: {
    name: np.asarray(part.tokens)
    for name, part in pose(objective, PLAN, update, batch).items()
  }
  first, again, other = tokens(3), tokens(3), tokens(4)
  for name in NAMES:
    np.testing.assert_array_equal(first[name], again[name])
    assert (first[name] != other[name]).any()


@pytest.mark.parametrize("primary", NAMES)
def test_held_out_text_is_measured_by_both(mesh, primary):
  """The primary one has the roles, so that each is found once."""
  rows = make_rows(6)
  texts = [
    (row, segment, row, int(size), 0)
    for row in range(len(rows.segments))
    for segment in np.unique(rows.segments[row])
    if segment
    for size in [(rows.segments[row] == segment).sum()]
  ]
  held = HeldOut(rows, np.array(texts, np.int64))
  objective = make(primary=primary)
  model, params = network(dataclasses.replace(UNTIED, dropout=0.0))
  config = EvalConfig(batch_size=6, masks_per_row=2)
  measure = lambda one: Evaluator(config, one, model, mesh).measure(
    params, held
  )
  found, other = measure(objective), next(n for n in NAMES if n != primary)
  own = measure(getattr(objective, primary))
  for name, value in own.values.items():
    # As text: an error that is unknown is NaN, which no NaN equals.
    assert repr(found.values[name]) == repr(value)
  for name, value in measure(getattr(objective, other)).values.items():
    beside = found.values[f"{other}/{name}"]
    assert beside.value == value.value and not beside.role
    assert beside.title == f"{other}: {value.title}"
  assert found.headline == own.headline == objective.headline
  assert len(found.with_role(NATS)) == len(found.with_role(PERPLEXITY)) == 1
  short = {"masked": "nelbo", "autoregressive": "nll"}[other]
  assert found.scalars()[f"{other}/{short}_stderr"] > 0
  assert from_json(to_json(found)).values.keys() == found.values.keys()
  order = {"masked": "any_order", "autoregressive": "left_to_right"}
  assert objective.decoding().order == order[primary]


@pytest.mark.slow
def test_a_mesh_and_microbatches_make_no_difference():
  results = []
  whole = dataclasses.replace(PLAN, accumulation=1, batch=16)
  for name, plan in (("1x1", PLAN), ("4x2", PLAN), ("1x1", whole)):
    with jax.set_mesh(mesh := make_mesh(name)):
      plan = dataclasses.replace(plan, shards=mesh.shape["fsdp"])
      batch = make_batch(mesh, plan)
      results.append(answer(make(plan=plan), batch, plan, UNTIED)[::2])
  for other in results[1:]:
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
      *(other, results[0]),
    )


def test_a_plan_counts_the_calls_and_predictions_of_both():
  objective = make()
  masked, next_ = objective.masked.cost(), objective.autoregressive.cost()
  assert objective.cost().reads == masked.reads + next_.reads
  assert objective.cost().asked == masked.asked + next_.asked


@pytest.mark.parametrize(
  "fields, words",
  [
    ({"objective": {"alpha": 1.5}}, r"objective.alpha=1.5 must be in \[0, 1\]"),
    ({"model": {"time_conditioning": True}}, "time_conditioning=True has no"),
    ({"objective": {"primary": "both"}}, "objective.primary='both'"),
    ({"objective": {"input_mask_rate": [0.4, 0.1]}}, "lower rate first"),
    (
      {
        "objective": {"weighting": "nelbo"},
        "stages": [{"mask_rate": [0.1, 0.2]}],
      },
      "never draws the other rates",
    ),
  ],
)
def test_the_settings_of_both_are_checked(fields, words):
  fields = fields | {
    "objective": {"name": "joint"} | fields.get("objective", {})
  }
  with pytest.raises(UserError, match=words) as found:
    config_lib.from_dict(fields)
  assert "\n" not in str(found.value)
