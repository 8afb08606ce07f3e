"""What any objective can rely on and must do, shown by toy objectives."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mesh_harness import make_mesh
from objectives_harness import (
  MODEL,
  PLAN,
  Complementary,
  Joint,
  NextToken,
  TwoPasses,
  answer,
  ask,
  make_batch,
  pose,
)

from mdm_jax import fit
from mdm_jax.config import Config
from mdm_jax.core import sharding
from mdm_jax.core.errors import UserError
from mdm_jax.core.sharding import AXES
from mdm_jax.data.config import StageConfig, TokenizerConfig
from mdm_jax.data.rows import Rows
from mdm_jax.objectives import base
from mdm_jax.objectives.base import Ratio
from mdm_jax.objectives.draws import Draws
from mdm_jax.planning.footprint import footprint
from mdm_jax.training import step as step_lib

DROPPING = dataclasses.replace(MODEL, dropout=0.3)


def toys(plan=PLAN):
  next_token, twice = NextToken(plan), TwoPasses(plan)
  shares = {"next": (0.25, next_token), "twice": (0.75, twice)}
  return {
    "next token": next_token,
    "complementary": Complementary(plan),
    "two passes": twice,
    "joint": Joint(shares),
  }


def assert_close(a, b, **tolerance):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


# MARK: draws


def draw(plan, mesh, name="x", step=3, padded=None):
  """The first number of every row's stream, and what `spread` gives a row."""
  with jax.set_mesh(mesh):

    @jax.jit
    def read():
      draws = Draws(7, step, plan, padded or plan.batch)
      keys = draws.keys(name)
      first = jax.vmap(jax.vmap(jax.random.uniform))(keys)
      return first, draws.spread(jnp.arange(plan.rows, dtype=jnp.float32), -1.0)

    return jax.device_get(read())


def test_a_row_draws_the_same_however_the_update_is_split():
  whole = dataclasses.replace(PLAN, accumulation=1, batch=16)
  first, numbers = draw(whole, make_mesh("1x1"))
  for name in ("1x1", "4x2"):
    split, by_row = draw(PLAN, make_mesh(name))
    np.testing.assert_array_equal(split.reshape(1, 16), first)
    np.testing.assert_array_equal(by_row.reshape(1, 16), numbers)
  assert len(np.unique(first)) == 16


def test_rows_of_padding_take_no_other_rows_key():
  three = jax.make_mesh((3, 1, 1), AXES, devices=jax.devices()[:3])
  first, numbers = draw(PLAN, make_mesh("1x1"))
  padded, by_row = draw(PLAN, three, padded=9)
  np.testing.assert_array_equal(padded[:, :8], first)
  np.testing.assert_array_equal(by_row[:, :8], numbers)
  assert (by_row[:, 8] == -1).all()
  assert not set(padded[:, 8]) & set(first.reshape(-1))


def test_another_name_update_or_scope_draws_something_else(mesh):
  draws = Draws(7, 3, PLAN, 8)
  keys = [
    draws.key("x"),
    draws.key("y"),
    Draws(7, 4, PLAN, 8).key("x"),
    draws.scope("a").key("x"),
    draws.scope("b").key("x"),
    draws.scope("a").scope("b").key("x"),
  ]
  drawn = [float(jax.random.uniform(key)) for key in keys]
  assert len(set(drawn)) == len(drawn)


# MARK: every objective


@pytest.mark.parametrize(
  "name",
  [
    *("next token", "complementary"),
    pytest.param("two passes", marks=pytest.mark.slow),
    pytest.param("joint", marks=pytest.mark.slow),
  ],
)
def test_meshes_agree_and_microbatches_make_no_difference(name):
  results = []
  whole = dataclasses.replace(PLAN, accumulation=1, batch=16)
  for mesh, plan in (("1x1", PLAN), ("4x2", PLAN), ("1x1", whole)):
    mesh = make_mesh(mesh)
    plan = dataclasses.replace(plan, shards=mesh.shape["fsdp"])
    with jax.set_mesh(mesh):
      objective = toys(plan)[name]
      loss, _, grads = answer(objective, make_batch(mesh, plan), plan, DROPPING)
      results.append((loss, grads))
  for other in results[1:]:
    assert_close(other, results[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["next token", "complementary"])
def test_weights_of_the_update_sum_to_one(any_mesh, name):
  plan = dataclasses.replace(PLAN, shards=any_mesh.shape["fsdp"])
  found = ask(toys(plan)[name], any_mesh, plan=plan)
  weights = np.asarray(found.weights)[np.asarray(found.asked)]
  np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)


def test_a_weight_of_zero_is_still_asked(mesh):
  """Its cross-entropy is known, and has no gradient."""

  class Unweighted(NextToken):
    def examples(self, batch, draws):
      found = super().examples(batch, draws)
      nothing = jnp.zeros_like(found.weights)
      return dataclasses.replace(found, weights=nothing)

  batch = make_batch(mesh)
  loss, by_row, grads = answer(Unweighted(PLAN), batch)
  assert loss == 0 and (by_row > 0).all()
  assert not any(leaf.any() for leaf in jax.tree.leaves(grads))
  _, usual, _ = answer(NextToken(PLAN), batch)
  np.testing.assert_allclose(by_row, usual, rtol=1e-6)


def test_more_than_the_capacity_is_nan(mesh):
  class Short(NextToken):
    def cost(self):
      return dataclasses.replace(super().cost(), asked=99)

  loss, _, _ = answer(Short(PLAN), make_batch(mesh))
  assert np.isnan(loss)


# MARK: next token


@pytest.mark.parametrize("segments", [(1, 1, 1, 1), (1, 1, 2, 2)])
def test_next_token_probabilities_sum_to_one(mesh, segments):
  """Over all texts of 4 tokens, or all pairs of texts of 2."""
  texts = np.array(list(itertools.product(range(5), repeat=4)))
  rows = Rows(texts, np.broadcast_to(segments, texts.shape).copy())
  plan = dataclasses.replace(PLAN, accumulation=5, batch=125, length=4)
  batch = make_batch(mesh, plan, rows)
  _, nats, _ = answer(NextToken(plan), batch, plan)
  np.testing.assert_allclose(np.exp(-nats).sum(), 1, rtol=1e-5)
  # The control: seeing the future, it isn't a distribution.
  full = dataclasses.replace(row_of_full(plan), plan=plan)
  _, nats, _ = answer(full, batch, plan)
  assert abs(np.exp(-nats).sum() - 1) > 1e-3


def row_of_full(plan):
  class SeesAll(NextToken):
    def examples(self, batch, draws):
      found = super().examples(batch, draws)
      context = dataclasses.replace(
        found.context, visibility=base.FULL, segments=batch.segments
      )
      return dataclasses.replace(found, context=context)

  return SeesAll(plan)


# MARK: two passes, twice the rows


def test_every_token_is_asked_once_by_one_of_the_copies(any_mesh):
  plan = dataclasses.replace(PLAN, shards=any_mesh.shape["fsdp"])
  found = ask(Complementary(plan), any_mesh, plan=plan)
  assert found.asked.shape == (2, 16, 16)
  by_row = np.asarray(found.asked).reshape(2, 8, 2, 16)
  segments = np.asarray(found.context.segments).reshape(2, 8, 2, 16)
  real = segments[:, :, 0] > 0
  np.testing.assert_array_equal(by_row.sum(axis=2), real)
  assert by_row.any(axis=(0, 1, 3)).all()


@pytest.mark.parametrize(
  "any_mesh, model",
  [("1x1", MODEL), ("4x2", DROPPING)],
  indirect=["any_mesh"],
  ids=["one device", "a mesh and dropout"],
)
def test_two_calls_are_one_with_twice_the_rows(any_mesh, model):
  plan = dataclasses.replace(PLAN, shards=any_mesh.shape["fsdp"])
  batch = make_batch(any_mesh, plan)
  one, two = Complementary(plan), TwoPasses(plan)
  (loss, by_row, grads), (other, rows, more) = (
    answer(objective, batch, plan, model) for objective in (one, two)
  )
  np.testing.assert_allclose(loss, other, rtol=1e-5)
  np.testing.assert_allclose(
    one.by_row(None, by_row)["cross_entropy"], rows, rtol=1e-4
  )
  assert_close(grads, more, rtol=1e-4, atol=1e-6)


def test_a_plan_holds_what_all_calls_keep_for_the_backward_pass(monkeypatch):
  mesh = sharding.planned_mesh(sharding.parse_mesh("4x2"))
  config = Config(
    tokenizer=TokenizerConfig(kind="byte"),
    model=MODEL,
    stages=(StageConfig(length=16),),
  )
  held = []
  for objective in (NextToken(PLAN), TwoPasses(PLAN)):
    with jax.numpy_dtype_promotion("standard"):
      run = fit.blueprint(config, mesh)
      monkeypatch.setattr(run, "objective", lambda _, o=objective: o)
      held.append(footprint(run, mesh))
  once, twice = held
  assert once.kept and twice.kept == 2 * once.kept
  name = "activations for the backward pass"
  assert twice.passing[name] == 2 * once.passing[name]


# MARK: an objective in another one


def test_a_joint_loss_is_the_sum_of_its_childrens(mesh):
  batch, joint = make_batch(mesh), toys()["joint"]
  loss, _, grads = answer(joint, batch, model=DROPPING)

  @dataclasses.dataclass(frozen=True)
  class Alone(Joint):
    """A single child, with the draws that it has among others."""

  expected = [
    answer(Alone({name: child}), batch, model=DROPPING)
    for name, child in joint.shares.items()
  ]
  np.testing.assert_allclose(loss, sum(e[0] for e in expected), rtol=1e-5)
  total = jax.tree.map(lambda *g: sum(g), *(e[2] for e in expected))
  assert_close(grads, total, rtol=1e-4, atol=1e-6)


def test_children_without_a_scope_would_share_their_draws(mesh):
  shares = {"a": (0.5, NextToken(PLAN)), "b": (0.5, NextToken(PLAN))}
  posed = lambda scoped: pose(
    *(Joint(shares, scoped), PLAN, jnp.asarray(0), make_batch(mesh))
  )
  data = jax.random.key_data
  keys = lambda found: [data(found[name].context.keys) for name in "ab"]
  apart, alike = keys(posed(True)), keys(posed(False))
  assert (apart[0] != apart[1]).any()
  np.testing.assert_array_equal(*alike)


# MARK: what the step says to a mistake


def test_summaries_need_a_tag_for_every_entry():
  found = step_lib.Pass(jnp.zeros(()), {}, None, None)

  class Wrong(NextToken):
    tags = {"x": ("one", "two")}

    def summaries(self, examples, aux):
      return {"x": Ratio(jnp.zeros(3), jnp.zeros(3))}

  with pytest.raises(UserError, match=r"'x' of Wrong.*\(3,\).*\(2,\)"):
    step_lib._summaries(Wrong(PLAN), found)


def test_summaries_have_names_of_their_own():
  with pytest.raises(UserError, match="loss: every update already logs"):
    one = jnp.ones(())
    step_lib._joined({"loss": one}, {"loss": Ratio(one, one)})
