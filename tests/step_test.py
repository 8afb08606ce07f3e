"""The update step: masks, accumulation, meshes, resumes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_mesh

from mdm_jax.core import rng
from mdm_jax.core.config import (
  Config,
  DataConfig,
  ModelConfig,
  ObjectiveConfig,
  OptimizerConfig,
  StageConfig,
)
from mdm_jax.core.errors import UserError
from mdm_jax.data import batches
from mdm_jax.data.packing import Rows
from mdm_jax.diffusion.noise import stage_rates
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.training import step as step_lib
from mdm_jax.training.checkpoint import Checkpoints
from mdm_jax.training.curriculum import make_curriculum
from mdm_jax.training.optimizer import learning_rate_schedule, make_optimizer
from mdm_jax.training.state import TrainState, abstract_state, init_state
from mdm_jax.training.step import make_train_step


@pytest.fixture(autouse=True)
def optax_promotes():
  """Adam raises a Python float to an integer power: not strict promotion."""
  with jax.numpy_dtype_promotion("standard"):
    yield


V, REAL, MASK, PAD = 32, 28, 30, 29
CONFIG = Config(
  data=DataConfig(batch_size=8),
  model=ModelConfig(num_layers=2, embed_dim=16, num_heads=2, dropout=0.1),
  objective=ObjectiveConfig(label_smoothing=0.1),
  stages=(
    StageConfig(length=16, updates=6, mask_rate=(0.4, 0.6), rehearsal=0.25),
  ),
  optimizer=OptimizerConfig(
    learning_rate=1e-2, warmup_steps=1, accumulation=2, ema_decay=0.9
  ),
)


def make_rows(count=64, length=16):
  tokens = np.random.default_rng(0).integers(0, REAL, (count, length))
  segments = np.ones((count, length), np.int64)
  segments[::3, 10:] = 2
  segments[::4, 13:] = 0
  return Rows(np.where(segments, tokens, PAD), segments)


class Run:
  """A training run in miniature, on the current mesh."""

  def __init__(self, config, mesh):
    self.config, self.mesh, self.rows = config, mesh, make_rows()
    self.denoiser = Denoiser(config.model, V, REAL)
    self.plan = make_curriculum(config, [len(self.rows)] * len(config.stages))
    schedule = learning_rate_schedule(config.optimizer, self.plan)
    self.optimizer = make_optimizer(config.optimizer, schedule)
    self.step = make_train_step(
      config, self.plan.stages[0], self.denoiser, self.optimizer, schedule, MASK
    )

  def init(self):
    key = rng.stream(self.config.seed, "init")
    return init_state(self.denoiser, self.optimizer, key)

  def batch(self, update):
    numbers = batches.row_numbers(
      len(self.rows), 7, update, self.config.rows_per_update
    )
    return batches.make_batch(
      self.rows, numbers, self.config.optimizer.accumulation, self.mesh
    )

  def train(self, state, start, end):
    metrics = []
    for update in range(start, end):
      state, values = self.step(state, self.batch(update))
      metrics.append({k: float(v) for k, v in values.items()})
    return state, metrics

  def tasks(self, update):
    stage = self.config.stages[0]
    rates = stage_rates(stage, self.config.noise)
    make = functools.partial(step_lib._make_tasks, self.config, rates, MASK)
    return jax.jit(make)(jnp.asarray(update), self.batch(update))


def on(name, config=CONFIG):
  mesh = make_mesh(name)
  return jax.set_mesh(mesh), lambda: Run(config, mesh)


def assert_trees_close(a, b, **tolerance):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, **tolerance),
    jax.device_get(a),
    jax.device_get(b),
  )


def assert_trees_equal(a, b):
  jax.tree.map(
    np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b)
  )


def test_the_loss_falls_and_is_compiled_once(mesh):
  run = Run(CONFIG, mesh)
  state, metrics = run.train(run.init(), 0, 6)
  assert run.step._cache_size() == 1
  assert metrics[-1]["loss"] < metrics[0]["loss"]
  assert int(state.step) == 6


def test_microbatches_and_updates_never_share_masks(mesh):
  """At one rate, rows that drew from one key would have the same mask."""
  stage = StageConfig(length=16, mask_rate=(0.499, 0.5))
  run = Run(dataclasses.replace(CONFIG, stages=(stage,)), mesh)
  masks = []
  for update in range(2):
    tasks = run.tasks(update)
    full = np.asarray((tasks.segments > 0).all(axis=-1))
    masks += [tuple(row) for row in np.asarray(tasks.corrupted.masked)[full]]
  assert {sum(mask) for mask in masks} == {8} and len(masks) > 16
  assert len(set(masks)) == len(masks)


def test_padding_is_never_masked_and_every_row_has_a_mask(mesh):
  tasks = Run(CONFIG, mesh).tasks(3)
  masked = tasks.corrupted.masked
  assert not (masked & (tasks.segments == 0)).any()
  assert (masked.sum(axis=-1) >= 1).all()


def test_rates_are_stratified_over_the_update_and_each_microbatch(mesh):
  config = dataclasses.replace(CONFIG, stages=(StageConfig(length=16),))
  tasks = Run(config, mesh).tasks(0)
  rates = np.asarray(tasks.rate)
  assert sorted(np.ceil(rates.reshape(-1) * 16) - 1) == list(range(16))
  for microbatch in rates:
    assert sorted(np.ceil(microbatch * 8) - 1) == list(range(8))


def test_two_microbatches_of_8_equal_one_of_16(mesh):
  model = dataclasses.replace(CONFIG.model, dropout=0.0)
  # A large eps: near zero gradients Adam would turn rounding into steps.
  smooth = dataclasses.replace(CONFIG.optimizer, eps=1e-3)
  two = dataclasses.replace(CONFIG, model=model, optimizer=smooth)
  one = dataclasses.replace(
    two,
    data=DataConfig(batch_size=16),
    optimizer=dataclasses.replace(smooth, accumulation=1),
  )
  a, b = Run(two, mesh), Run(one, mesh)
  np.testing.assert_array_equal(
    np.asarray(a.tasks(0).corrupted.masked).reshape(16, 16),
    np.asarray(b.tasks(0).corrupted.masked).reshape(16, 16),
  )
  (state_a, metrics_a), (state_b, metrics_b) = (
    r.train(r.init(), 0, 1) for r in (a, b)
  )
  assert_trees_close(state_a.params, state_b.params, rtol=1e-4, atol=1e-6)
  for name in ("loss", "grad_norm", "mask_rate", "tokens"):
    np.testing.assert_allclose(
      metrics_a[0][name], metrics_b[0][name], rtol=1e-4
    )


def test_six_updates_equal_three_a_resume_and_three(mesh, tmp_path):
  run = Run(CONFIG, mesh)
  whole, losses = run.train(run.init(), 0, 6)
  half, first = run.train(run.init(), 0, 3)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(half, {"tokens_seen": 3.0})
  del half
  again = Run(CONFIG, mesh)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest() == 3
    assert checkpoints.metrics(3)["tokens_seen"] == 3.0
    like = abstract_state(again.denoiser, again.optimizer)
    state = checkpoints.restore(3, like)
  state, second = again.train(state, 3, 6)
  assert_trees_equal(state, whole)
  assert first + second == losses


@pytest.mark.parametrize("lost", ["ema_params", "opt_state", "step"])
def test_the_resume_test_would_see_what_is_lost(mesh, lost):
  run = Run(CONFIG, mesh)
  whole, _ = run.train(run.init(), 0, 6)
  half, _ = run.train(run.init(), 0, 3)
  broken = dataclasses.replace(half, **{lost: getattr(run.init(), lost)})
  state, _ = run.train(broken, 3, 6)
  with pytest.raises(AssertionError):
    assert_trees_equal(state, whole)


def test_meshes_draw_the_same_masks_and_agree(tmp_path):
  results = {}
  for name in ("1x1", "4x2"):
    context, make = on(name)
    with context:
      run = make()
      tasks = run.tasks(0)
      tasks = np.asarray(tasks.corrupted.xt), np.asarray(tasks.rate)
      state, metrics = run.train(run.init(), 0, 3)
      results[name] = tasks, jax.device_get(state), metrics
  (tasks_a, state_a, metrics_a), (tasks_b, state_b, metrics_b) = (
    results.values()
  )
  for a, b in zip(tasks_a, tasks_b, strict=True):
    np.testing.assert_array_equal(a, b)
  for a, b in zip(metrics_a, metrics_b, strict=True):
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
  # Adam divides by the gradient's size: a tiny one's rounding shows.
  assert_trees_close(state_a.params, state_b.params, atol=2e-4)


def test_moments_carry_the_parameters_sharding():
  context, make = on("4x2")
  with context:
    run = make()
    state, _ = run.train(run.init(), 0, 1)
    specs = jax.tree.map(lambda p: p.sharding.spec, state.params)
    moments = (optax.tree.get(state.opt_state, name) for name in ("mu", "nu"))
    for tree in (*moments, state.ema_params):
      assert jax.tree.map(lambda p: p.sharding.spec, tree) == specs
    assert specs["embedding"] == jax.P("tensor", "fsdp")


def test_a_checkpoint_restores_onto_another_mesh(tmp_path):
  context, make = on("4x2")
  with context:
    run = make()
    state, _ = run.train(run.init(), 0, 2)
    with Checkpoints(tmp_path) as checkpoints:
      checkpoints.save(state, {})
    saved = jax.device_get(state)
  context, make = on("1x1")
  with context:
    run = make()
    with Checkpoints(tmp_path) as checkpoints:
      like = abstract_state(run.denoiser, run.optimizer)
      restored = checkpoints.restore(2, like)
      ema = checkpoints.restore_ema_params(2, like.ema_params)
    assert_trees_equal(restored, saved)
    assert_trees_equal(ema, saved.ema_params)
    assert len(restored.params["embedding"].sharding.device_set) == 1
    run.train(restored, 2, 3)


def test_best_and_latest_checkpoints_are_kept(mesh, tmp_path):
  run = Run(CONFIG, mesh)
  state = run.init()
  with Checkpoints(tmp_path, keep_latest=1) as checkpoints:
    assert checkpoints.latest() is None and checkpoints.best() is None
    for step, bound in ((1, 3.0), (2, 2.0), (3, 2.5), (4, None)):
      metrics = {} if bound is None else {"nelbo_per_token": bound}
      numbered = dataclasses.replace(state, step=jnp.asarray(step))
      checkpoints.save(numbered, metrics)
  with Checkpoints(tmp_path, keep_latest=1) as checkpoints:
    assert checkpoints.latest() == 4 and checkpoints.best() == 2
  kept = {p.name for p in (tmp_path / "checkpoints").iterdir()}
  assert {"2", "4"} <= kept and not {"1", "3"} & kept


def test_a_checkpoint_of_another_model_is_refused(mesh, tmp_path):
  run = Run(CONFIG, mesh)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(run.init(), {})
  wider = dataclasses.replace(CONFIG.model, embed_dim=32)
  other = Run(dataclasses.replace(CONFIG, model=wider), mesh)
  like = abstract_state(other.denoiser, other.optimizer)
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(
      UserError, match=r"key is float32\[2, 16, 2, 8\].*\[2, 32, 2, 16\]"
    ):
      checkpoints.restore(0, like)


def test_an_update_that_is_not_finite_is_not_applied(mesh):
  """To Adam's moments it is one without a gradient."""
  run = Run(CONFIG, mesh)
  state, _ = run.train(run.init(), 0, 1)
  sane = jax.device_get(state.params["final_norm"]["scale"])
  huge = jnp.full_like(state.params["final_norm"]["scale"], 3e38)
  poisoned = state.params | {"final_norm": {"scale": huge}}
  state = dataclasses.replace(state, params=poisoned)
  before = jax.device_get(state)
  after, metrics = run.step(state, run.batch(1))
  assert not np.isfinite(metrics["loss"])
  assert metrics["skipped"] == 1 and int(after.step) == 2
  assert metrics["update_norm"] == 0
  assert_trees_equal(after.params, before.params)
  assert_trees_equal(after.ema_params, before.ema_params)
  moments = lambda s: optax.tree.get(s.opt_state, "mu")
  decayed = jax.tree.map(lambda m: CONFIG.optimizer.b1 * m, moments(before))
  assert_trees_close(moments(after), decayed, rtol=1e-6)
  # And the next one is as good as ever.
  healed = after.params | {"final_norm": {"scale": jnp.asarray(sane)}}
  after, metrics = run.step(
    dataclasses.replace(after, params=healed), run.batch(2)
  )
  assert metrics["skipped"] == 0
  leaves = jax.tree.leaves((after.params, after.opt_state))
  assert all(np.isfinite(x).all() for x in leaves)


def test_averaged_parameters_follow_the_parameters(mesh):
  run = Run(CONFIG, mesh)
  start = run.init()
  before = jax.device_get(start.params)
  after, _ = run.train(start, 0, 1)
  decay = 1 / 10  # (1 + step) / (10 + step) at step 0, below ema_decay
  want = jax.tree.map(
    lambda a, b: decay * a + (1 - decay) * b,
    before,
    jax.device_get(after.params),
  )
  assert_trees_close(after.ema_params, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("weighting", ["masked_ce", "nelbo"])
def test_loss_is_the_weighted_mean_it_says(mesh, weighting):
  """Recomputed with the full [B, L, V] array, without any gather."""
  config = dataclasses.replace(
    CONFIG,
    model=dataclasses.replace(CONFIG.model, dropout=0.0),
    objective=ObjectiveConfig(weighting=weighting),
  )
  run = Run(config, mesh)
  state, tasks = run.init(), run.tasks(0)
  total = 0.0
  for i in range(2):
    part = jax.tree.map(lambda x, i=i: x[i], tasks)
    hidden = jax.jit(run.denoiser.hidden)(
      state.params, part.corrupted.xt, part.segments, part.rate
    )
    logits = run.denoiser.logits(state.params, hidden.reshape(-1, 16))
    logp = np.asarray(jax.nn.log_softmax(logits)).reshape(8, 16, V)
    x0 = np.minimum(np.asarray(part.x0), REAL - 1)[..., None]
    ce = -np.take_along_axis(logp, x0, axis=-1)[..., 0]
    ce = np.where(part.corrupted.masked, ce, 0)
    count = np.asarray(part.corrupted.masked).sum(axis=1)
    length = np.asarray(part.segments > 0).sum(axis=1)
    if weighting == "masked_ce":
      total += ce.sum() / np.asarray(tasks.corrupted.masked).sum()
    else:
      rate = np.asarray(part.rate)
      density = 0.25 + 0.75 / 0.2 * ((rate >= 0.4) & (rate <= 0.6))
      total += (length / density * ce.sum(axis=1) / count).sum() / np.asarray(
        tasks.segments > 0
      ).sum()
  _, metrics = run.train(state, 0, 1)
  np.testing.assert_allclose(metrics[0]["loss"], total, rtol=1e-4)


def test_state_holds_no_key_and_has_readable_paths(mesh):
  state = Run(CONFIG, mesh).init()
  assert [f.name for f in dataclasses.fields(TrainState)] == [
    "step",
    "params",
    "ema_params",
    "opt_state",
  ]
  flat = jax.tree_util.tree_flatten_with_path(state.params)[0]
  names = {jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in flat}
  assert "blocks/attention/query" in names
