"""The update step: masks, accumulation, meshes, resumes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from mesh_harness import make_mesh
from objectives_harness import Toy

from mdm_jax.checkpoints.checkpoint import Checkpoints
from mdm_jax.config import Config
from mdm_jax.core import rng
from mdm_jax.core.errors import UserError
from mdm_jax.core.sharding import AXES, data_shards
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data import batches
from mdm_jax.data.config import DataConfig, StageConfig
from mdm_jax.data.rows import Rows
from mdm_jax.model.config import ModelConfig
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.objectives import cross_entropy
from mdm_jax.objectives import masked as masked_lib
from mdm_jax.objectives.config import (
  BlockConfig,
  BlockStage,
  MaskedConfig,
  MaskedStage,
  build,
)
from mdm_jax.objectives.draws import Draws, Plan
from mdm_jax.training import optimizer as optimizer_lib
from mdm_jax.training import step as step_lib
from mdm_jax.training.config import OptimizerConfig, TrainConfig
from mdm_jax.training.curriculum import make_curriculum
from mdm_jax.training.gated import accumulate
from mdm_jax.training.guard import SpikeGuard
from mdm_jax.training.learning_rate import learning_rate_schedule
from mdm_jax.training.optimizer import OPTIMIZERS, make_optimizer
from mdm_jax.training.state import TrainState, initial_state
from mdm_jax.training.step import make_train_step

V, REAL, MASK, PAD = 32, 28, 30, 29
VOCAB = Vocabulary(V, mask=MASK, pad=PAD, forbidden=((REAL, V),))
CONFIG = Config(
  data=DataConfig(batch_size=8),
  model=ModelConfig(num_layers=2, embed_dim=16, num_heads=2, dropout=0.1),
  objective=MaskedConfig(label_smoothing=0.1),
  stages=(
    StageConfig(
      length=16,
      updates=6,
      objective=MaskedStage(mask_rate=(0.4, 0.6), rehearsal=0.25),
    ),
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

  def __init__(self, config, mesh, schedule=None):
    self.config, self.mesh, self.rows = config, mesh, make_rows()
    self.denoiser = Denoiser(config.model, VOCAB)
    self.plan = make_curriculum(
      config.stages,
      [len(self.rows)] * len(config.stages),
      config.rows_per_update,
    )
    if schedule is None:
      schedule = learning_rate_schedule(config.optimizer, self.plan)
    self.optimizer = make_optimizer(config.optimizer, schedule)
    self.schedule = schedule
    train = config.train
    self.guard = SpikeGuard(train.spike_sigmas, train.spike_window)
    self.parts = step_lib.Parts(
      *(config.seed, self.denoiser, self.optimizer, schedule, self.guard),
      config.optimizer.ema_decay,
    )
    self.step = make_train_step(self.parts, *self.asks)

  def init(self):
    """Returns new arrays every time: a step takes them."""
    return _copy(self._start)

  @functools.cached_property
  def _start(self):
    key = rng.stream(self.config.seed, "init")
    return jax.jit(self._init)(key)

  def _init(self, key):
    params = self.denoiser.init(key)
    return initial_state(params, self.optimizer, self.guard)

  def abstract(self):
    return jax.eval_shape(lambda: self._init(jax.random.key(0)))

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
      metrics.append(jax.tree.map(lambda v: np.asarray(v).tolist(), values))
    return state, metrics

  def diagnosis(self, update):
    diagnose = step_lib.make_diagnosis(self.parts, *self.asks)
    number = jnp.asarray(update, jnp.int32)
    return jax.device_get(
      diagnose(self.init().params, {}, number, self.batch(update))
    )

  @functools.cached_property
  def asks(self):
    """The objective of the first stage, and its plan."""
    config, stage = self.config, self.config.stages[0]
    shards, length = data_shards(self.mesh), stage.length
    plan = Plan(
      *(config.optimizer.accumulation, config.data.batch_size, length),
      *(shards, length, length),
    )
    objective = build(
      *(config.objective, stage.objective, config.noise, VOCAB, plan)
    )
    return objective, plan

  def examples(self, update):
    return self._examples(jnp.asarray(update), self.batch(update))

  @functools.cached_property
  def _examples(self):
    return jax.jit(functools.partial(pose, *self.asks, self.config.seed))


def pose(objective, plan, seed, step, batch):
  draws = Draws(seed, step, plan, batch.tokens.shape[1])
  return objective.examples(batch, draws)


_copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
# What is traced and compiled once, most tests can share.
shared = functools.cache(Run)


def on(name, config=CONFIG):
  mesh = make_mesh(name)
  return jax.set_mesh(mesh), lambda: shared(config, mesh)


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
  run = shared(CONFIG, mesh)
  state, metrics = run.train(run.init(), 0, 6)
  assert run.step._cache_size() == 1
  assert metrics[-1]["loss"] < metrics[0]["loss"]
  assert int(state.step) == 6


def test_microbatches_and_updates_never_share_masks(mesh):
  """At one rate, rows that drew from one key would have the same mask."""
  rates = MaskedStage(mask_rate=(0.499, 0.5))
  stage = StageConfig(length=16, objective=rates)
  run = Run(dataclasses.replace(CONFIG, stages=(stage,)), mesh)
  masks = []
  for update in range(2):
    examples = run.examples(update)
    full = np.asarray((examples.context.segments > 0).all(axis=-1))
    masks += [tuple(row) for row in np.asarray(examples.asked)[full]]
  assert {sum(mask) for mask in masks} == {8} and len(masks) > 16
  assert len(set(masks)) == len(masks)


def test_padding_is_never_masked_and_every_row_has_a_mask(mesh):
  examples = shared(CONFIG, mesh).examples(3)
  masked = examples.asked
  assert not (masked & (examples.context.segments == 0)).any()
  assert (masked.sum(axis=-1) >= 1).all()


def test_rates_are_stratified_over_the_update_and_each_microbatch(mesh):
  config = dataclasses.replace(CONFIG, stages=(StageConfig(length=16),))
  examples = shared(config, mesh).examples(0)
  rates = np.asarray(examples.context.condition)
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
    np.asarray(a.examples(0).asked).reshape(16, 16),
    np.asarray(b.examples(0).asked).reshape(16, 16),
  )
  (state_a, metrics_a), (state_b, metrics_b) = (
    r.train(r.init(), 0, 1) for r in (a, b)
  )
  assert_trees_close(state_a.params, state_b.params, rtol=1e-4, atol=1e-6)
  for name in ("loss", "grad_norm", "mask_rate", "tokens"):
    np.testing.assert_allclose(
      metrics_a[0][name], metrics_b[0][name], rtol=1e-4
    )


class Even(Toy):
  """Another objective's questions, with as much weight in each microbatch."""

  headline = "none"

  def __init__(self, inner):
    self.inner = inner

  def examples(self, batch, draws):
    found = self.inner.examples(batch, draws)
    count = found.tokens.shape[0]
    return dataclasses.replace(found, weights=_own(found) / count)

  def loss(self, model, params, part):
    return self.inner.loss(model, params, part)

  def cost(self):
    return self.inner.cost()

  def decoding(self):
    return self.inner.decoding()


def _own(examples):
  """Weights that sum to 1 in every microbatch, instead of the update."""
  weights = jnp.where(examples.asked, examples.weights, 0.0)
  return weights / weights.sum(axis=(-2, -1), keepdims=True)


@pytest.mark.parametrize("even", [True, False])
def test_microbatches_of_even_weight_make_the_step_of_multi_steps(mesh, even):
  """Of means of microbatches: not the update's mean where weights differ."""
  smooth = dataclasses.replace(CONFIG.optimizer, eps=1e-3)
  run = shared(dataclasses.replace(CONFIG, optimizer=smooth), mesh)
  objective, plan = run.asks
  objective = Even(objective) if even else objective
  step = make_train_step(run.parts, objective, plan)
  got, _ = step(run.init(), run.batch(0))
  steps = accumulate(OPTIMIZERS["adamw"](smooth, run.schedule), 2)
  params = run.init().params
  state = steps.init(params)
  examples = run.examples(0)
  examples = dataclasses.replace(examples, weights=_own(examples))
  gradient = jax.grad(run.asks[0].loss, argnums=1, has_aux=True)
  gradient = jax.jit(gradient, static_argnums=0)
  with jax.numpy_dtype_promotion("standard"):
    for i in range(2):
      part = jax.tree.map(lambda x, i=i: x[i], examples)
      grads, _ = gradient(run.denoiser, params, part)
      updates, state = steps.update(grads, state, params, step=0)
      params = optax.apply_updates(params, updates)
  if even:
    assert_trees_close(got.params, params, rtol=1e-4, atol=1e-6)
  else:
    with pytest.raises(AssertionError):
      assert_trees_close(got.params, params, rtol=1e-3, atol=1e-4)


GUARDED = dataclasses.replace(
  CONFIG, train=TrainConfig(spike_sigmas=2.0, spike_window=4)
)


EVERY_2 = dataclasses.replace(
  CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, every=2)
)
# Its dropout has another stream, that of the clean text.
BLOCKS = dataclasses.replace(
  CONFIG,
  objective=BlockConfig(name="block", block_length=4),
  stages=(StageConfig(length=16, updates=6, objective=BlockStage()),),
)


@pytest.mark.parametrize(
  "config",
  [CONFIG, pytest.param(GUARDED, marks=pytest.mark.slow), EVERY_2, BLOCKS],
  ids=["plain", "guarded", "accumulating", "blocks"],
)
def test_six_updates_equal_three_a_resume_and_three(mesh, tmp_path, config):
  run = shared(config, mesh)
  whole, losses = run.train(run.init(), 0, 6)
  half, first = run.train(run.init(), 0, 3)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(3, half, {})
  del half
  again = Run(config, mesh)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest() == 3
    state = checkpoints.restore(3, again.abstract())
  state, second = again.train(state, 3, 6)
  assert_trees_equal(state, whole)
  assert first + second == losses


def test_an_update_that_only_accumulates_says_so(mesh):
  run = shared(EVERY_2, mesh)
  _, metrics = run.train(run.init(), 0, 6)
  assert run.step._cache_size() == 1
  assert [m["accumulated"] for m in metrics] == [1, 0] * 3
  assert [m["update_norm"] == 0 for m in metrics] == [True, False] * 3
  assert not any(m["skipped"] for m in metrics)
  plain = shared(CONFIG, mesh)
  (metrics,) = plain.train(plain.init(), 0, 1)[1]
  assert "accumulated" not in metrics


@pytest.mark.parametrize("lost", ["ema_params", "opt_state", "step"])
def test_the_resume_test_would_see_what_is_lost(mesh, lost):
  run = shared(CONFIG, mesh)
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
      examples = run.examples(0)
      rate = examples.context.condition
      examples = np.asarray(examples.tokens), np.asarray(rate)
      state, metrics = run.train(run.init(), 0, 3)
      results[name] = examples, jax.device_get(state), metrics
  (tasks_a, state_a, metrics_a), (tasks_b, state_b, metrics_b) = (
    results.values()
  )
  for a, b in zip(tasks_a, tasks_b, strict=True):
    np.testing.assert_array_equal(a, b)
  for a, b in zip(metrics_a, metrics_b, strict=True):
    for name in ("loss", "mask_bins", "mask_rate"):
      np.testing.assert_allclose(a[name], b[name], rtol=1e-5, err_msg=name)
    assert a["mask_bins"].count == b["mask_bins"].count and a["skipped"] == 0
  # Adam divides by the gradient's size: a tiny one's rounding shows.
  assert_trees_close(state_a.params, state_b.params, atol=2e-4)


@pytest.mark.parametrize(
  "weighting", ["masked_ce", pytest.param("nelbo", marks=pytest.mark.slow)]
)
def test_three_devices_update_as_one_does(mesh, weighting):
  """Of 3 x 3 rows a microbatch the last one is padding, and counts nowhere."""
  config = dataclasses.replace(
    CONFIG,
    objective=MaskedConfig(weighting=weighting, label_smoothing=0.1),
    optimizer=dataclasses.replace(CONFIG.optimizer, eps=1e-3),
  )
  one = shared(config, mesh)
  state_one, (told_one,) = one.train(one.init(), 0, 1)
  masks = jax.device_get(one.examples(0).asked)
  diagnosis = one.diagnosis(0)
  three = jax.make_mesh((3, 1, 1), AXES, devices=jax.devices()[:3])
  with jax.set_mesh(three):
    run = Run(config, three)
    assert run.batch(0).tokens.shape == (2, 9, 16)
    now = jax.device_get(run.examples(0).asked)
    np.testing.assert_array_equal(now[:, :8], masks)
    assert not now[:, 8].any()
    state, (told,) = run.train(run.init(), 0, 1)
    again = run.diagnosis(0)
  for name, value in told_one.items():
    np.testing.assert_allclose(told[name], value, rtol=1e-4, err_msg=name)
  assert_trees_close(state.params, state_one.params, rtol=1e-4, atol=1e-6)
  assert_trees_close(again, diagnosis, rtol=1e-3, atol=1e-5)


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
      checkpoints.save(2, state, {})
    saved = jax.device_get(state)
  context, make = on("1x1")
  with context:
    run = make()
    with Checkpoints(tmp_path) as checkpoints:
      like = run.abstract()
      restored = checkpoints.restore(2, like)
      part = {"ema_params": like.ema_params}
      ema = checkpoints.restore(2, part, partial=True)["ema_params"]
    assert_trees_equal(restored, saved)
    assert_trees_equal(ema, saved.ema_params)
    assert len(restored.params["embedding"].sharding.device_set) == 1
    run.train(restored, 2, 3)


def test_a_checkpoint_of_another_model_is_refused(mesh, tmp_path):
  run = shared(CONFIG, mesh)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(0, run.init(), {})
  wider = dataclasses.replace(CONFIG.model, embed_dim=32)
  other = Run(dataclasses.replace(CONFIG, model=wider), mesh)
  like = other.abstract()
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(
      UserError, match=r"key is float32\[2, 16, 2, 8\].*\[2, 32, 2, 16\]"
    ):
      checkpoints.restore(0, like)


def test_a_checkpoint_of_another_optimizer_says_what_to_do(mesh, tmp_path):
  """As before the optimizer was a chain: moments alone, not in a tuple."""
  run = shared(CONFIG, mesh)
  like = run.abstract()
  adam = optax.scale_by_adam().init(run.init().params)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(0, dataclasses.replace(run.init(), opt_state=adam), {})
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(UserError, match="no opt_state/1/count.*init_from"):
      checkpoints.restore(0, like)


# MARK: updates that are not applied


def weigh_by(factor):
  """Every row's weight in the loss, so that loss and gradient are `factor`."""
  weights = masked_lib.row_weights
  return masked_lib, "row_weights", lambda *args: factor * weights(*args)


def nan_gradient():
  """Adds nothing whose derivative is 0 * inf: the loss stays as it is."""
  loss = cross_entropy.masked_loss
  nothing = lambda h: 0 * jnp.sqrt(0 * h)
  changed = lambda head, params, hidden, *args: loss(
    head, params, hidden + nothing(hidden), *args
  )
  return cross_entropy, "masked_loss", changed


def broken(run, monkeypatch, module, name, function):
  """The run with an update that was traced with part of the objective bad."""
  other = Run(run.config, run.mesh)
  monkeypatch.setattr(module, name, function)
  jax.block_until_ready(other.step(run.init(), run.batch(0)))  # traced now
  monkeypatch.undo()
  return other


def bits(tree):
  """A copy of every leaf's bits."""
  view = lambda x: np.array(x).reshape(-1).view(np.uint32)
  return jax.tree.map(view, jax.device_get(tree))


def with_awkward_numbers(state):
  """Zeros of both signs, subnormals and large values, in every array."""
  awkward = np.float32([-0.0, 0.0, 1e-40, -1e-45, 3e38, -1e-38])

  def put(x):
    flat = np.array(x).reshape(-1)
    flat[: len(awkward)] = awkward
    return jax.device_put(flat.reshape(x.shape), x.sharding)

  moments = (optax.tree.get(state.opt_state, name) for name in ("mu", "nu"))
  ema, mu, nu = jax.tree.map(put, (state.ema_params, *moments))
  # The last norm alone: the forward pass has to be finite.
  scale = put(state.params["final_norm"]["scale"]).at[4].set(1.0)
  return dataclasses.replace(
    state,
    params=state.params | {"final_norm": {"scale": scale}},
    ema_params=ema,
    opt_state=optax.tree.set(state.opt_state, mu=mu, nu=nu),
  )


KEPT = "params", "ema_params", "opt_state", "guard"
BAD = {
  "loss and gradient": lambda: weigh_by(np.float32(np.inf)),
  "gradient": nan_gradient,
  "a norm too large": lambda: weigh_by(np.float32(1e30)),
  "not a number": lambda: weigh_by(np.float32(np.nan)),
}


@pytest.mark.parametrize(
  "what",
  [
    pytest.param(what, marks=pytest.mark.slow)
    if what in ("a norm too large", "not a number")
    else what
    for what in BAD
  ],
)
def test_an_update_that_is_not_finite_keeps_every_bit(mesh, monkeypatch, what):
  run = shared(GUARDED, mesh)
  bad = broken(run, monkeypatch, *BAD[what]())
  state, _ = run.train(run.init(), 0, 2)
  state = with_awkward_numbers(state)
  before = {name: bits(getattr(state, name)) for name in KEPT}
  after, (metrics,) = bad.train(state, 2, 3)
  finite = what in ("gradient", "a norm too large")
  assert np.isfinite(metrics["loss"]) == finite
  assert not np.isfinite(metrics["grad_norm"])
  assert (metrics["skipped"], metrics["nonfinite"], metrics["spike"]) == (
    *(1, 1, 0),
  )
  assert metrics["update_norm"] == 0 and int(after.step) == 3
  assert int(optax.tree.get(after.opt_state, "count")) == 2
  for name in KEPT:
    assert_trees_equal(bits(getattr(after, name)), before[name])


def test_the_test_of_bits_would_see_an_update(mesh):
  run = shared(GUARDED, mesh)
  state = run.init()
  before = {name: bits(getattr(state, name)) for name in KEPT}
  after, _ = run.train(state, 0, 1)
  for name in KEPT:
    with pytest.raises(AssertionError):
      assert_trees_equal(bits(getattr(after, name)), before[name])


@pytest.mark.parametrize(
  "any_mesh",
  ["1x1", pytest.param("4x2", marks=pytest.mark.slow)],
  indirect=True,
)
def test_an_update_that_is_not_finite_changes_nothing_but_the_count(
  any_mesh, monkeypatch
):
  """Rows, masks and learning rate of the next one are those of its number."""
  run = shared(GUARDED, any_mesh)
  bad = broken(run, monkeypatch, *weigh_by(np.float32(np.inf)))
  state, _ = run.train(run.init(), 0, 2)
  state, _ = bad.train(state, 2, 3)
  skipped, metrics = run.train(state, 3, 5)
  state, _ = run.train(run.init(), 0, 2)
  state = dataclasses.replace(state, step=state.step + 1)
  passed, others = run.train(state, 3, 5)
  assert run.step._cache_size() == 1
  assert metrics == others and metrics[0]["skipped"] == 0
  assert metrics[0]["learning_rate"] == run.schedule(3)
  assert_trees_equal(bits(skipped), bits(passed))


def test_the_learning_rate_is_of_the_update_whatever_was_applied(mesh):
  still = lambda update: jnp.where(update == 3, 0.0, 1e-2)
  run = Run(CONFIG, mesh, still)
  state, metrics = run.train(run.init(), 0, 2)
  state = dataclasses.replace(state, step=state.step + 1)
  _, (third,) = run.train(state, 3, 4)
  assert third["learning_rate"] == third["update_norm"] == 0
  assert all(m["update_norm"] > 0 for m in metrics)


@pytest.mark.parametrize(
  "any_mesh",
  ["1x1", pytest.param("4x2", marks=pytest.mark.slow)],
  indirect=True,
)
def test_a_spike_is_not_applied_and_not_remembered(any_mesh, monkeypatch):
  run = shared(GUARDED, any_mesh)
  bad = broken(run, monkeypatch, *weigh_by(np.float32(1e3)))
  state, metrics = run.train(run.init(), 0, 3)
  norms = [m["grad_norm"] for m in metrics]
  assert not any(m["skipped"] for m in metrics)
  np.testing.assert_array_equal(state.guard["norms"], np.float32([*norms, 0]))
  before = {name: bits(getattr(state, name)) for name in KEPT}
  state, (metrics,) = bad.train(state, 3, 4)
  assert (metrics["skipped"], metrics["nonfinite"], metrics["spike"]) == (
    *(1, 0, 1),
  )
  assert np.isfinite(metrics["grad_norm"]) and int(state.step) == 4
  for name in KEPT:
    assert_trees_equal(bits(getattr(state, name)), before[name])


def test_without_a_guard_the_same_update_is_applied(mesh, monkeypatch):
  run = shared(CONFIG, mesh)
  bad = broken(run, monkeypatch, *weigh_by(np.float32(1e3)))
  _, metrics = bad.train(run.train(run.init(), 0, 3)[0], 3, 4)
  assert metrics[0]["skipped"] == metrics[0]["spike"] == 0


@pytest.mark.slow
def test_not_applying_needs_no_copy_of_the_state(mesh, monkeypatch):
  """Old and new moments are never both in memory."""
  # Wide, so that the state is larger than what the forward pass keeps.
  model = dataclasses.replace(CONFIG.model, embed_dim=128)
  # One microbatch: a loop over several holds the gradients twice as it is.
  optimizer = dataclasses.replace(CONFIG.optimizer, accumulation=1)
  config = dataclasses.replace(GUARDED, model=model, optimizer=optimizer)
  size = sum(x.nbytes for x in jax.tree.leaves(Run(config, mesh).init().params))

  def temporary():
    run = Run(config, mesh)
    step = lambda state, *rows: run.step(state, batches.Batch(*rows))
    batch = run.batch(0)
    program = jax.jit(step, donate_argnums=0).lower(
      *(run.init(), batch.tokens, batch.segments)
    )
    program = program.compile()
    return program.memory_analysis().temp_size_in_bytes

  guarded = temporary()
  for module in (step_lib, optimizer_lib):
    monkeypatch.setattr(module, "choose", lambda _, new, old: new)
  assert guarded - temporary() < size / 4


def test_a_row_that_is_not_finite_shows_in_its_mask_rate_alone(
  mesh, monkeypatch
):
  run = shared(CONFIG, mesh)
  examples = run.examples(0)
  row = np.asarray(run.batch(0).tokens)[0, 3]
  loss = cross_entropy.masked_loss

  def spoil(head, params, hidden, x0, *args):
    here = (x0 == row[None]).all(axis=1)
    hidden = jnp.where(here[:, None, None], jnp.nan, hidden)
    return loss(head, params, hidden, x0, *args)

  bad = broken(run, monkeypatch, cross_entropy, "masked_loss", spoil)
  _, (metrics,) = bad.train(run.init(), 0, 1)
  assert metrics["nonfinite"] == 1
  (where,) = np.nonzero(np.isnan(metrics["mask_bins"].total))
  rate = float(examples.context.condition[0, 3])
  assert where.tolist() == [int(np.ceil(rate * 10)) - 1]


def test_averaged_parameters_follow_the_parameters(mesh):
  run = shared(CONFIG, mesh)
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
    objective=MaskedConfig(weighting=weighting),
  )
  run = shared(config, mesh)

  @jax.jit
  def log_probabilities(params, tokens, context):
    hidden = run.denoiser.hidden(params, tokens, context)
    logits = run.denoiser.logits(params, hidden.reshape(-1, 16))
    return jax.nn.log_softmax(logits).reshape(8, 16, V)

  state, examples = run.init(), run.examples(0)
  total, sums, counts = 0.0, np.zeros(10), np.zeros(10)
  for i in range(2):
    part = jax.tree.map(lambda x, i=i: x[i], examples)
    context = dataclasses.replace(part.context, keys=None)
    logp = np.asarray(log_probabilities(state.params, part.tokens, context))
    x0 = np.minimum(np.asarray(part.targets), REAL - 1)[..., None]
    ce = -np.take_along_axis(logp, x0, axis=-1)[..., 0]
    ce = np.where(part.asked, ce, 0)
    count = np.asarray(part.asked).sum(axis=1)
    length = np.asarray(part.context.segments > 0).sum(axis=1)
    bins = np.searchsorted(np.linspace(0, 1, 11), part.context.condition) - 1
    np.add.at(sums, bins, ce.sum(axis=1))
    np.add.at(counts, bins, count)
    if weighting == "masked_ce":
      total += ce.sum() / np.asarray(examples.asked).sum()
    else:
      rate = np.asarray(part.context.condition)
      density = 0.25 + 0.75 / 0.2 * ((rate >= 0.4) & (rate <= 0.6))
      total += (length / density * ce.sum(axis=1) / count).sum() / np.asarray(
        examples.context.segments > 0
      ).sum()
  _, metrics = run.train(state, 0, 1)
  np.testing.assert_allclose(metrics[0]["loss"], total, rtol=1e-4)
  np.testing.assert_allclose(metrics[0]["mask_bins"].total, sums, rtol=1e-4)
  np.testing.assert_array_equal(metrics[0]["mask_bins"].count, counts)
  assert (counts > 0).sum() >= 4  # the test sees several bins


def test_state_holds_no_key_and_has_readable_paths(mesh):
  state = shared(CONFIG, mesh).init()
  assert [f.name for f in dataclasses.fields(TrainState)] == [
    "step",
    "params",
    "ema_params",
    "opt_state",
    "guard",
  ]
  flat = jax.tree_util.tree_flatten_with_path(state.params)[0]
  names = {jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in flat}
  assert "blocks/attention/query" in names
  names = [
    jax.tree_util.keystr(path, simple=True, separator="/").split("/")[:2]
    for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)
  ]
  assert {name for _, name in names} == {"count", "mu", "nu"}
  assert state.guard == {}  # a checkpoint can't hold an empty array
