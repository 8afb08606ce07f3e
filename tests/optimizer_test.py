import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mdm_jax.config import Config
from mdm_jax.data.config import DataConfig, StageConfig
from mdm_jax.training.config import OptimizerConfig
from mdm_jax.training.curriculum import make_curriculum
from mdm_jax.training.optimizer import (
  decay_mask,
  learning_rate_schedule,
  make_optimizer,
  warmup_updates,
)

LR = OptimizerConfig(learning_rate=1e-3, warmup_steps=10, min_lr_ratio=0.05)
STAGES = tuple(
  StageConfig(updates=n, lr_factor=f)
  for n, f in ((40, 1.0), (50, 0.8), (60, 0.5))
)


def curriculum(stages=STAGES):
  config = Config(stages=stages, data=DataConfig(batch_size=8))
  return make_curriculum(config, [100] * len(stages))


@pytest.fixture
def rates():
  schedule = learning_rate_schedule(LR, curriculum())
  return np.asarray(jax.vmap(schedule)(jnp.arange(150)))


def test_warmup_is_linear_and_happens_once(rates):
  np.testing.assert_allclose(
    rates[:10], 1e-3 * np.arange(1, 11) / 10, rtol=1e-5
  )
  np.testing.assert_allclose(rates[10], 1e-3, rtol=1e-5)


@pytest.mark.parametrize("start, factor", [(40, 0.8), (90, 0.5)])
def test_every_stage_starts_at_its_own_peak(rates, start, factor):
  """The guide's origin applied its factors to the first stage only."""
  np.testing.assert_allclose(rates[start], factor * 1e-3, rtol=1e-5)


def test_every_cycle_ends_at_the_floor_and_never_jumps_back(rates):
  """The origin's rate went back to its peak before each stage's end."""
  for start, end in ((10, 40), (40, 90), (90, 150)):
    assert (np.diff(rates[start:end]) <= 1e-12).all()
    np.testing.assert_allclose(rates[end - 1], 5e-5, rtol=1e-4)


def test_a_warmup_past_the_first_stage_ramps_to_the_stage_it_ends_in():
  stages = tuple(StageConfig(updates=n) for n in (5, 200))
  rates = np.asarray(
    jax.vmap(learning_rate_schedule(LR, curriculum(stages)))(jnp.arange(205))
  )
  assert (np.diff(rates[:10]) > 0).all()
  np.testing.assert_allclose(rates[10], 1e-3, rtol=1e-5)
  np.testing.assert_allclose(rates[-1], 5e-5, rtol=1e-4)


def test_a_warmup_longer_than_the_run_is_cut():
  config = OptimizerConfig(warmup_steps=1500)
  assert warmup_updates(config, curriculum()) == 150 // 4
  assert warmup_updates(LR, curriculum()) == 10


def test_updates_follow_from_epochs():
  stages = (StageConfig(epochs=2.5), StageConfig(epochs=0.01))
  config = Config(stages=stages, data=DataConfig(batch_size=8))
  plan = make_curriculum(config, [100, 100])
  assert [(s.start, s.end) for s in plan.stages] == [(0, 32), (32, 33)]
  assert plan.stage_at(31).index == 0
  assert plan.stage_at(32).index == plan.stage_at(99).index == 1


PARAMS = {
  "embedding": jnp.ones((4, 2)),
  "blocks": {"norm": {"scale": jnp.ones(2)}, "down": jnp.ones((2, 2))},
}


def test_decay_spares_norms_and_embeddings():
  assert decay_mask(PARAMS) == {
    "embedding": False,
    "blocks": {"norm": {"scale": False}, "down": True},
  }


def test_weight_decay_is_decoupled_and_masked():
  config = OptimizerConfig(weight_decay=0.5)
  optimizer = make_optimizer(config, lambda _: 0.1)
  grads = jax.tree.map(jnp.zeros_like, PARAMS)
  updates, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
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
    updates, state = optimizer.update(grads, state, PARAMS)
    mean, square = 0.8 * mean + 0.2 * g, 0.9 * square + 0.1 * g * g
    want = -(mean / (1 - 0.8**t)) / (np.sqrt(square / (1 - 0.9**t)) + 0.1)
    np.testing.assert_allclose(updates["embedding"], want, rtol=1e-5)


def test_gradients_are_clipped_by_global_norm_before_adam():
  config = OptimizerConfig(
    weight_decay=0.0, clip_norm=1.0, eps=1.0, b1=0.0, b2=0.0
  )
  optimizer = make_optimizer(config, lambda _: 1.0)
  grads = jax.tree.map(lambda p: jnp.full_like(p, 7.0), PARAMS)
  updates, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
  clipped = 1 / np.sqrt(14)  # 14 equal entries of norm 1
  want = -clipped / (clipped + 1)
  np.testing.assert_allclose(updates["embedding"], want, rtol=1e-5)


def random_like(tree, seed, scale=1.0):
  draw = np.random.default_rng(seed)
  normal = lambda p: jnp.asarray(draw.normal(0, scale, p.shape), jnp.float32)
  return jax.tree.map(normal, tree)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_applied_updates_are_optax_adamws(scale):
  """Gradients below and above the clip, some steps on."""
  config = OptimizerConfig(weight_decay=0.3, clip_norm=0.5)
  schedule = lambda step: 0.1 / (1.0 + jnp.asarray(step, jnp.float32))
  ours = make_optimizer(config, schedule)
  theirs = optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.adamw(
      *(schedule, config.b1, config.b2, config.eps),
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
          grads, states[i], params[i]
        )
      params[i] = optax.apply_updates(params[i], updates)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-6, atol=1e-7)
    jax.tree.map(close, *params)
  for name in ("mu", "nu"):
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-6)
    jax.tree.map(close, *(optax.tree.get(s, name) for s in states))
  assert int(states[0].count) == 6


def test_the_learning_rate_is_of_the_step_it_is_given():
  """Which goes on where an update is not applied; Adam's count does not."""
  schedule = lambda step: 1.0 + jnp.asarray(step, jnp.float32)
  optimizer = make_optimizer(OptimizerConfig(weight_decay=0.0), schedule)
  grads, state = random_like(PARAMS, 1), optimizer.init(PARAMS)
  first, _ = optimizer.update(grads, state, PARAMS)
  later, new = optimizer.update(grads, state, PARAMS, step=jnp.int32(6))
  seven = lambda a, b: np.testing.assert_allclose(7 * a, b, rtol=1e-6)
  jax.tree.map(seven, first, later)
  assert int(new.count) == 1


@pytest.mark.parametrize("gradient", [1.0, np.nan, np.inf])
def test_an_update_that_is_not_applied_changes_no_bit(gradient):
  optimizer = make_optimizer(OptimizerConfig(), lambda _: 0.1)
  awkward = jnp.array([-0.0, 1e-40, -1e-45, 3e38], jnp.float32)
  tree = {"down": awkward, "embedding": -awkward}
  state = optax.ScaleByAdamState(jnp.int32(0), tree, tree)
  grads = jax.tree.map(lambda p: jnp.full_like(p, gradient), tree)
  update = jax.jit(optimizer.update)
  updates, after = update(grads, state, tree, applied=jnp.bool_(False))
  same = lambda a, b: np.testing.assert_array_equal(
    np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32)
  )
  jax.tree.map(same, after, state)
  nothing = jax.tree.map(lambda p: jnp.full_like(p, -0.0), tree)
  jax.tree.map(same, updates, nothing)
