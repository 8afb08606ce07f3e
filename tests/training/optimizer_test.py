"""Optimizers by name: what they compute, and what is left alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging
from mesh_harness import make_mesh

from mdm_jax.checkpoints.checkpoint import Checkpoints
from mdm_jax.core.errors import UserError
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.model.config import ModelConfig
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.training.config import OptimizerConfig
from mdm_jax.training.gated import accumulate, chain, gate
from mdm_jax.training.optimizer import (
  OPTIMIZERS,
  decay_mask,
  make_optimizer,
  scale_by_adam,
  scale_by_step,
)

PARAMS = {
  "embedding": jnp.ones((4, 2)),
  "blocks": {"norm": {"scale": jnp.ones(2)}, "down": jnp.ones((2, 2))},
}


def random_like(tree, seed, scale=1.0):
  """Normal numbers, laid out as the tree is."""
  draw = np.random.default_rng(seed)

  def normal(p):
    values = draw.normal(0, scale, p.shape).astype(p.dtype)
    return jax.device_put(values, p.sharding)

  return jax.tree.map(normal, tree)


@pytest.fixture
def stock_promotion():
  """Optax's own transformations mix dtypes that strict promotion refuses."""
  with jax.numpy_dtype_promotion("standard"):
    yield


def test_decay_spares_norms_biases_and_embeddings():
  assert decay_mask(PARAMS) == {
    "embedding": False,
    "blocks": {"norm": {"scale": False}, "down": True},
  }
  assert decay_mask({"query": 1, "query_bias": 1}) == {
    "query": True,
    "query_bias": False,
  }


def test_weight_decay_is_decoupled_and_masked():
  config = OptimizerConfig(weight_decay=0.5)
  optimizer = make_optimizer(config, lambda _: 0.1)
  grads = jax.tree.map(jnp.zeros_like, PARAMS)
  updates, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS, step=0)
  np.testing.assert_allclose(updates["blocks"]["down"], -0.05, rtol=1e-6)
  np.testing.assert_array_equal(updates["embedding"], 0)


def test_first_update_is_adams_with_the_configured_betas_and_eps():
  config = OptimizerConfig(
    weight_decay=0.0, b1=0.8, b2=0.9, eps=0.1, clip_norm=1e9
  )
  optimizer = make_optimizer(config, lambda _: 1.0)
  state = optimizer.init(PARAMS)
  steps = [0.5, -0.2]
  mean = square = 0.0
  for t, g in enumerate(steps, start=1):
    grads = jax.tree.map(lambda p, g=g: jnp.full_like(p, g), PARAMS)
    updates, state = optimizer.update(grads, state, PARAMS, step=t)
    mean, square = 0.8 * mean + 0.2 * g, 0.9 * square + 0.1 * g * g
    want = -(mean / (1 - 0.8**t)) / (np.sqrt(square / (1 - 0.9**t)) + 0.1)
    np.testing.assert_allclose(updates["embedding"], want, rtol=1e-5)


def test_gradients_are_clipped_by_global_norm_before_adam():
  config = OptimizerConfig(
    weight_decay=0.0, clip_norm=1.0, eps=1.0, b1=0.0, b2=0.0
  )
  optimizer = make_optimizer(config, lambda _: 1.0)
  grads = jax.tree.map(lambda p: jnp.full_like(p, 7.0), PARAMS)
  updates, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS, step=0)
  clipped = 1 / np.sqrt(14)  # 14 equal entries of norm 1
  want = -clipped / (clipped + 1)
  np.testing.assert_allclose(updates["embedding"], want, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_applied_updates_are_optax_adamws(scale):
  """Gradients below and above the clip, some steps on."""
  config = OptimizerConfig(weight_decay=0.3, clip_norm=0.5)
  schedule = lambda step: 0.1 / (1.0 + jnp.asarray(step, jnp.float32))
  ours = make_optimizer(config, schedule)
  theirs = optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.adamw(
      *(schedule, config.b1, 0.95, config.eps),
      weight_decay=config.weight_decay,
      mask=decay_mask,
    ),
  )
  params = [random_like(PARAMS, 0)] * 2
  states = [ours.init(PARAMS), theirs.init(PARAMS)]
  for step in range(6):
    grads = random_like(PARAMS, step, scale)
    for i, optimizer in enumerate((ours, theirs)):
      with jax.numpy_dtype_promotion("standard" if i else "strict"):
        updates, states[i] = jax.jit(optimizer.update)(
          *(grads, states[i], params[i]), **({} if i else {"step": step})
        )
      params[i] = optax.apply_updates(params[i], updates)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-6, atol=1e-7)
    jax.tree.map(close, *params)
  for name in ("mu", "nu"):
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-6)
    jax.tree.map(close, *(optax.tree.get(s, name) for s in states))
  assert int(optax.tree.get(states[0], "count")) == 6


def test_the_learning_rate_is_of_the_step_it_is_given():
  """Which goes on where an update is not applied; Adam's count does not."""
  schedule = lambda step: 1.0 + jnp.asarray(step, jnp.float32)
  optimizer = make_optimizer(OptimizerConfig(weight_decay=0.0), schedule)
  grads, state = random_like(PARAMS, 1), optimizer.init(PARAMS)
  first, _ = optimizer.update(grads, state, PARAMS, step=0)
  later, new = optimizer.update(grads, state, PARAMS, step=jnp.int32(6))
  seven = lambda a, b: np.testing.assert_allclose(7 * a, b, rtol=1e-6)
  jax.tree.map(seven, first, later)
  assert int(optax.tree.get(new, "count")) == 1


def run(optimizer, params, steps=3, scale=1.0):
  """Returns parameters and state after some updates of random gradients."""

  @jax.jit
  def update(grads, state, params, step):
    updates, state = optimizer.update(grads, state, params, step=step)
    return optax.apply_updates(params, updates), state

  state = jax.jit(optimizer.init)(params)
  for step in range(steps):
    grads = random_like(params, step, scale)
    params, state = update(grads, state, params, jnp.int32(step))
  return params, state


def assert_trees_close(a, b, **tolerance):
  close = lambda x, y: np.testing.assert_allclose(x, y, **tolerance)
  jax.tree.map(close, jax.device_get(a), jax.device_get(b))


def fields(**given):
  return OptimizerConfig(
    **{"weight_decay": 0.3, "clip_norm": 0.5, "b1": 0.8, **given}
  )


def stock(name):
  """What optax has under the name, with its own defaults."""
  last = [
    optax.add_decayed_weights(0.3, mask=decay_mask),
    optax.scale_by_learning_rate(0.1),
  ]
  inner = {
    "lion": [optax.scale_by_lion(0.8, 0.99), *last],
    "adafactor": [
      optax.adafactor(
        *(None, 128, 0.8, 0),
        multiply_by_parameter_scale=False,
      ),
      # It turns the sign of its update around.
      optax.scale(-1.0),
      *last,
    ],
  }
  return optax.chain(optax.clip_by_global_norm(0.5), *inner[name])


@pytest.mark.parametrize("name", ["lion", "adafactor"])
def test_a_name_is_the_optimizer_that_optax_calls_so(name, stock_promotion):
  ours = make_optimizer(fields(name=name), lambda _: 0.1)
  theirs = optax.with_extra_args_support(stock(name))
  params = random_like(PARAMS | {"up": jnp.zeros((128, 130))}, 0)
  assert_trees_close(run(ours, params)[0], run(theirs, params)[0], rtol=1e-6)


def test_an_optimizer_that_nobody_registered_is_a_users_mistake():
  with pytest.raises(UserError, match="optimizer.name='adamv'.*adamw"):
    make_optimizer(OptimizerConfig(name="adamv"), lambda _: 0.1)


@pytest.mark.parametrize(
  "name, given, unused",
  [
    ("lion", {"eps": 1e-4, "b1": 0.5, "momentum": 0.9}, ["eps", "momentum"]),
    ("adafactor", {"eps": 1e-4, "b2": 0.5, "momentum": 0.9}, ["b2", "eps"]),
    ("adamw", {"momentum": 0.9, "b2": 0.5, "eps": 1e-4}, ["momentum"]),
    ("muon", {"momentum": 0.9, "b2": 0.5, "eps": 1e-4}, []),
  ],
)
def test_a_field_without_effect_is_said(name, given, unused, monkeypatch):
  said = []
  monkeypatch.setattr(logging, "warning", lambda *a: said.append(a[0] % a[1:]))
  make_optimizer(OptimizerConfig(name=name, **given), lambda _: 0.1)
  assert sorted(line.split("=")[0] for line in said) == [
    f"optimizer.{field}" for field in sorted(unused)
  ]
  assert all(f"optimizer.name={name}" in line for line in said)


# MARK: muon

MODEL = ModelConfig(num_layers=3, embed_dim=16, num_heads=4, num_kv_heads=2)


def network():
  """Parameters of a small denoiser, on the current mesh."""
  return _network(jax.sharding.get_mesh())


@functools.cache
def _network(_mesh):
  return jax.jit(Denoiser(MODEL, Vocabulary(32)).init)(jax.random.key(0))


def test_muons_stacked_weights_are_stepped_as_each_layers_matrix(
  mesh, stock_promotion
):
  """Query and out are one matrix over all heads, [D, GRK] and [GRK, D]."""
  # Five iterations of a polynomial magnify float32's rounding.
  with jax.enable_x64(True):
    _check_matrices()


def _check_matrices():
  optimizer = make_optimizer(
    OptimizerConfig(name="muon", weight_decay=0.0, clip_norm=1e9), lambda _: 1.0
  )
  params = jax.tree.map(lambda p: p.astype(jnp.float64), network())
  grads = random_like(params, 1)
  state = jax.jit(optimizer.init)(params)
  updates, _ = jax.jit(optimizer.update)(
    grads, state, params, step=jnp.int32(0)
  )
  grads, updates = jax.device_get((grads, updates))
  width = MODEL.embed_dim
  shapes = {
    **dict.fromkeys(("query", "key", "value", "gate", "up"), (width, -1)),
    **dict.fromkeys(("out", "down"), (-1, width)),
  }
  one = optax.contrib.muon(1.0, consistent_rms=0.2)
  step = jax.jit(one.update)
  blocks = [
    (tree[room][name], updates["blocks"][room][name], shapes[name])
    for tree in [grads["blocks"]]
    for room in ("attention", "mlp")
    for name in tree[room]
    if name in shapes
  ]
  assert len(blocks) == len(shapes)
  for grad, update, shape in blocks:
    for layer in range(MODEL.num_layers):
      matrix = {"w": grad[layer].reshape(shape)}
      want, _ = step(matrix, one.init(matrix), matrix)
      got = update[layer].reshape(shape)
      np.testing.assert_allclose(got, want["w"], rtol=1e-6, atol=1e-9)


def test_muon_leaves_all_else_to_adam(mesh):
  params = network()
  muon, adamw = (
    run(make_optimizer(OptimizerConfig(name=name), lambda _: 0.1), params)[0]
    for name in ("muon", "adamw")
  )
  same = jax.tree.map(lambda a, b: bool((a == b).all()), muon, adamw)
  paths = jax.tree_util.tree_leaves_with_path(same)
  others = {path[-1].key for path, equal in paths if not equal}
  assert others == {"query", "key", "value", "out", "gate", "up", "down"}


# MARK: any chain


def users_chain(config, schedule):
  """Accumulates over two updates, with optax's parts only."""
  return optax.MultiSteps(
    optax.adam(config.learning_rate), 2
  ).gradient_transformation()


@pytest.fixture(params=["adamw", "lion", "muon", "adafactor", "every", "users"])
def any_config(request, monkeypatch):
  """Every optimizer by name, one that accumulates, and a user's own."""
  monkeypatch.setattr(OPTIMIZERS, "_pieces", dict(OPTIMIZERS._pieces))
  OPTIMIZERS.register("users", users_chain)
  if request.param == "every":
    return fields(every=2)
  return fields(name=request.param)


def bits(tree):
  view = lambda x: np.array(x).reshape(-1).view(np.uint32)
  return jax.tree.map(view, jax.device_get(tree))


def assert_same_bits(a, b):
  jax.tree.map(np.testing.assert_array_equal, bits(a), bits(b))


def test_an_update_that_is_not_applied_changes_no_bit(any_mesh, any_config):
  """And the next one is as if it had never been tried."""
  optimizer = make_optimizer(any_config, lambda _: 0.1)
  params, state = run(optimizer, network())
  update = jax.jit(optimizer.update)
  try_out = lambda grads, applied: update(
    grads, state, params, step=jnp.int32(3), applied=jnp.bool_(applied)
  )
  nothing = jax.tree.map(lambda p: np.full_like(p, -0.0), params)
  full = lambda p, value: jax.device_put(np.full_like(p, value), p.sharding)
  for value in (50.0, 1e30, np.nan, np.inf):  # spikes, then not finite
    bad = jax.tree.map(lambda p, value=value: full(p, value), params)
    updates, after = try_out(bad, False)
    assert_same_bits(after, state)
    assert_same_bits(updates, nothing)
  updates, after = try_out(random_like(params, 9), True)
  for leaf in jax.tree.leaves((updates, after)):
    assert np.isfinite(leaf).all()
  with pytest.raises(AssertionError):
    assert_same_bits(after, state)


def test_awkward_numbers_keep_their_bits():
  """Zeros of both signs, subnormals and large values, in Adam's moments."""
  awkward = jnp.array([-0.0, 1e-40, -1e-45, 3e38], jnp.float32)
  tree = {"down": awkward, "embedding": -awkward}
  adam = scale_by_adam(0.9, 0.95, 1e-8)
  state = optax.ScaleByAdamState(jnp.int32(0), tree, tree)
  _, after = jax.jit(adam.update)(tree, state, applied=jnp.bool_(False))
  assert_same_bits(after, state)


def test_meshes_agree_and_a_state_lies_as_it_began(any_config):
  """If it did not, the second update would be compiled again."""
  specs = lambda tree: jax.tree.map(lambda x: x.sharding.spec, tree)
  found = []
  for name in ("1x1", "4x2"):
    with jax.set_mesh(make_mesh(name)):
      optimizer = make_optimizer(any_config, lambda _: 0.1)
      start = network()
      params, state = run(optimizer, start, steps=4)
      assert specs(state) == specs(jax.jit(optimizer.init)(start))
      found.append(jax.device_get((params, state)))
  # Averages of gradients lie as the parameters do.
  shapes = {p.shape: p.sharding.spec for p in jax.tree.leaves(params)}
  large = [x for x in jax.tree.leaves(state) if x.size > MODEL.embed_dim]
  assert large and all(x.sharding.spec == shapes[x.shape] for x in large)
  assert_trees_close(*found, rtol=1e-4, atol=2e-5)


def test_a_state_comes_back_from_a_checkpoint(mesh, any_config, tmp_path):
  optimizer = make_optimizer(any_config, lambda _: 0.1)
  _, state = run(optimizer, network(), steps=1)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, {})
  with Checkpoints(tmp_path) as checkpoints:
    restored = checkpoints.restore(1, jax.eval_shape(lambda: state))
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  assert_same_bits(restored, state)


def test_our_chain_gates_its_parts_and_optaxs_does_not():
  parts = optax.trace(0.9), scale_by_step(lambda _: 0.1)
  grads = random_like(PARAMS, 0)
  for optimizer, kept in ((chain(*parts), True), (optax.chain(*parts), False)):
    state = optimizer.init(PARAMS)
    _, after = optimizer.update(grads, state, PARAMS, step=0, applied=False)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), state, after)
    assert all(jax.tree.leaves(same)) == kept


# MARK: accumulation


def test_a_step_every_two_updates_is_one_of_their_mean():
  one = make_optimizer(fields(), lambda _: 0.1)
  two = make_optimizer(fields(every=2), lambda _: 0.1)
  params = random_like(PARAMS, 0)
  a, b = random_like(PARAMS, 1), random_like(PARAMS, 2)
  mean = jax.tree.map(lambda x, y: (x + y) / 2, a, b)
  want, _ = one.update(mean, one.init(params), params, step=1)
  first, state = two.update(a, two.init(params), params, step=0)
  assert all((u == 0).all() for u in jax.tree.leaves(first))
  got, _ = two.update(b, state, params, step=1)
  assert_trees_close(got, want, rtol=1e-5, atol=1e-7)


def test_an_update_that_is_not_applied_does_not_count():
  """Two good updates make a step, whatever lies between them."""
  two = make_optimizer(fields(every=2), lambda _: 0.1)
  params = random_like(PARAMS, 0)
  nan = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
  state = two.init(params)
  _, state = two.update(random_like(params, 1), state, params, step=0)
  _, state = two.update(nan, state, params, step=1, applied=False)
  updates, state = two.update(random_like(params, 2), state, params, step=2)
  assert all((u != 0).any() for u in jax.tree.leaves(updates))
  assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))


def test_stock_multi_steps_never_forgets_a_nan(stock_promotion):
  """Why it needs to be gated: its mean is multiplied by zero, not cleared."""
  nan = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), PARAMS)
  stock = accumulate(optax.sgd(0.1), 2)
  gated = gate(stock)
  for optimizer, finite in ((stock, False), (gated, True)):
    state = optimizer.init(PARAMS)
    for grads, applied in ((nan, False), (PARAMS, True), (PARAMS, True)):
      _, state = optimizer.update(grads, state, PARAMS, applied=applied)
    found = jax.tree.map(lambda x: bool(jnp.isfinite(x).all()), state)
    assert all(jax.tree.leaves(found)) == finite
