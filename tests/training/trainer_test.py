"""A run's pure parts together: updates, calibration, plan, starting points."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from mesh_harness import make_mesh

from mdm_jax import config as config_lib
from mdm_jax import plan as plan_lib
from mdm_jax import preview
from mdm_jax.blueprint import make_trainer
from mdm_jax.config import Config
from mdm_jax.core.errors import NumericsError, UserError
from mdm_jax.data import batches
from mdm_jax.data.config import DataConfig, StageConfig, TokenizerConfig
from mdm_jax.data.prepared import prepare
from mdm_jax.model.config import ModelConfig
from mdm_jax.objectives.config import MaskedStage
from mdm_jax.planning import calibration
from mdm_jax.training.config import OptimizerConfig, TrainConfig
from mdm_jax.training.curriculum import make_curriculum
from mdm_jax.training.trainer import Trainer


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  return Config(
    data=DataConfig(
      corpus="python_docs",
      batch_size=4,
      max_documents=12,
      cache_dir=str(tmp_path_factory.mktemp("cache")),
    ),
    tokenizer=TokenizerConfig(kind="byte"),
    model=ModelConfig(num_layers=2, embed_dim=16, num_heads=2),
    stages=(
      StageConfig(
        name="first",
        unit="sentences",
        length=64,
        easiest=0.5,
        updates=3,
        objective=MaskedStage(mask_rate=(0.75, 0.9)),
      ),
      StageConfig(
        name="second",
        length=32,
        updates=2,
        objective=MaskedStage(mask_rate=(0.05, 0.2)),
      ),
    ),
    optimizer=OptimizerConfig(warmup_steps=1, accumulation=2),
  )


@pytest.fixture(scope="module")
def trainer(config):
  mesh = make_mesh("1x1")
  with jax.set_mesh(mesh):
    yield make_trainer(config, prepare(config.rows), mesh)


def _trees_equal(a, b):
  equal = jax.tree.map(np.array_equal, jax.device_get(a), jax.device_get(b))
  return all(jax.tree.leaves(equal))


def test_updates_follow_the_stages(trainer):
  state = trainer.init()
  for update in range(5):
    stage = trainer.curriculum.stage_at(update)
    batch = trainer.batch(stage, update)
    assert batch.tokens.shape == (2, 4, 64 if update < 3 else 32)
    state, metrics = trainer.update(state, update)
    assert int(state.step) == update + 1
    assert metrics["learning_rate"] == trainer.schedule(update)


def test_an_updates_rows_are_those_of_its_number(trainer):
  for update in range(5):
    stage = trainer.curriculum.stage_at(update)
    numbers = trainer.row_numbers(update)
    rows = trainer.data.stages[stage.index].tokens[numbers]
    batch = trainer.batch(stage, update)
    np.testing.assert_array_equal(rows, np.concatenate(batch.tokens))
  seed = batches.stage_seed(trainer.seed, 1)
  first = batches.row_numbers(len(trainer.data.stages[1]), seed, 0, 8)
  np.testing.assert_array_equal(trainer.row_numbers(3), first)


def test_a_skipped_update_only_counts(trainer):
  state, _ = trainer.update(trainer.init(), 0)
  before = jax.device_get(state)
  after = dataclasses.replace(state, step=state.step + 1)
  assert int(after.step) == 2
  same = dataclasses.replace(before, step=after.step)
  assert _trees_equal(after, same)
  _, metrics = trainer.update(after, 2)
  assert metrics["learning_rate"] == trainer.schedule(2)


def _perturbed(trainer, monkeypatch, part, which):
  """Makes one of two updates wrong, in the last bit of one number."""
  update, made = Trainer.update, []

  def wrong(self, *args):
    state, metrics = update(self, *args)
    made.append(0)
    if len(made) == which:
      leaves, tree = jax.tree.flatten(getattr(state, part))
      values = np.array(leaves[0])
      values.flat[-1] = np.nextafter(values.flat[-1], np.float32(9))
      leaves[0] = jax.device_put(values, leaves[0].sharding)
      changed = {part: jax.tree.unflatten(tree, leaves)}
      state = dataclasses.replace(state, **changed)
    return state, metrics

  monkeypatch.setattr(Trainer, "update", wrong)


def _twice(trainer, monkeypatch):
  monkeypatch.setattr(trainer, "recheck_every", 1)
  batch = trainer.batch(trainer.curriculum.stages[0], 0)
  return trainer.checked_update(trainer.init(), 0, batch)


def test_fault_29_an_update_made_twice_is_that_update(trainer, monkeypatch):
  (twice, metrics), (once, expected) = (
    _twice(trainer, monkeypatch),
    trainer.update(trainer.init(), 0),
  )
  for a, b in zip(
    jax.tree.leaves((twice, metrics)),
    jax.tree.leaves((once, expected)),
    strict=True,
  ):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("part", ["params", "ema_params"])
@pytest.mark.parametrize("which", [1, 2])
def test_fault_29_one_wrong_bit_is_reported(trainer, monkeypatch, part, which):
  _perturbed(trainer, monkeypatch, part, which)
  with pytest.raises(NumericsError, match="update 1, computed twice"):
    _twice(trainer, monkeypatch)


def test_skipped_updates_are_half_open_ranges(config, trainer):
  train = dataclasses.replace(config.train, skip_updates="1:3, 7:8")
  config = dataclasses.replace(config, train=train)
  some = make_trainer(config, trainer.data, trainer.mesh)
  assert [u for u in range(10) if some.curriculum.skips(u)] == [1, 2, 7]
  assert not any(trainer.curriculum.skips(u) for u in range(10))


@pytest.mark.parametrize(
  "text, part",
  [
    ("5:5", "5:5"),
    ("1:2,9:8", "9:8"),
    ("-1:3", "-1:3"),
    ("1200", "1200"),
    ("1:2,", ""),
    ("1:b", "1:b"),
    ("1:2:3", "1:2:3"),
    ("\u0663:9", "\u0663:9"),
  ],
)
def test_a_wrong_range_is_named(text, part):
  train = TrainConfig(skip_updates=text)
  with pytest.raises(UserError) as told:
    Config(train=train)
  said = str(told.value)
  assert said.startswith("train.skip_updates=") and "\n" not in said
  assert repr(part) in said and "1200:1500,1800:1810" in said


def test_a_state_from_parameters_is_a_fresh_start(trainer):
  state, _ = trainer.update(trainer.init(), 0)
  trained = jax.device_get(state.ema_params)
  again = trainer.init_from(state.ema_params)
  assert int(again.step) == 0
  assert _trees_equal(again.params, trained)
  assert _trees_equal(again.ema_params, trained)
  assert _trees_equal(again.opt_state, trainer.init().opt_state)


def test_calibration_times_the_stages_that_are_left(trainer):
  seconds = calibration.update_seconds(trainer)
  assert set(seconds) == {0, 1} and all(s > 0 for s in seconds.values())
  assert set(calibration.update_seconds(trainer, after=2)) == {0, 1}
  assert set(calibration.update_seconds(trainer, after=3)) == {1}


def test_calibration_changes_nothing(trainer):
  before, _ = trainer.update(trainer.init(), 0)
  before = jax.device_get(before)
  calibration.update_seconds(trainer)
  after, _ = trainer.update(trainer.init(), 0)
  assert _trees_equal(before, after)


def test_calibration_compiles_what_the_run_uses(config, trainer, caplog):
  trainer = make_trainer(config, trainer.data, trainer.mesh)
  compiling = "Compiling jit(train_step)"
  steps = lambda: [r for r in caplog.messages if compiling in r]
  caplog.set_level("WARNING")
  with jax.log_compiles():
    calibration.update_seconds(trainer)
    assert len(steps()) == 2  # the test sees compilations
    state = trainer.init()
    for update in range(5):
      state, _ = trainer.update(state, update)
  assert len(steps()) == 2


# MARK: plan


@pytest.fixture(scope="module")
def plan(config, trainer):
  return plan_lib.make_plan(config, trainer, after=1)


def test_the_plan_counts_what_the_run_does(plan, trainer):
  first, second = plan["stages"]
  rows = [len(r) for r in trainer.data.stages]
  tokens = [int((r.segments > 0).sum()) for r in trainer.data.stages]
  assert (first["rows"], second["rows"]) == tuple(rows)
  assert (first["tokens"], second["tokens"]) == tuple(tokens)
  assert first["epochs"] == pytest.approx(3 * 8 / rows[0])
  seen = sum(
    8 * n * t / r for n, t, r in zip((3, 2), tokens, rows, strict=True)
  )
  assert plan["tokens"] == round(seen)
  assert plan["unique_tokens"] == max(tokens)
  assert plan["laws"]["flops"] == pytest.approx(6 * plan["params"] * seen)
  assert sum(s["flops"] for s in plan["stages"]) == pytest.approx(
    plan["laws"]["flops"]
  )


def test_the_plan_knows_what_is_left(config, trainer, monkeypatch):
  times = {0: 2.0, 1: 10.0}
  monkeypatch.setattr(
    calibration,
    "update_seconds",
    lambda _, after: {i: t for i, t in times.items() if i or after < 3},
  )
  left = lambda after: plan_lib.make_plan(config, trainer, after)["seconds"]
  assert [left(n) for n in (0, 1, 3, 4)] == [26.0, 24.0, 20.0, 10.0]


def test_the_plan_is_printed(plan, capsys):
  plan_lib.show(plan)
  out = capsys.readouterr().out
  for word in ("first", "second", "0.75-0.9", f"{plan['params']:,} parameters"):
    assert word in out
  assert "warning: no stage trains on mask rates" in out
  assert "outside the fitted range" in out


# MARK: preview


def test_the_preview_says_what_each_stage_reads(config):
  data = prepare(config.rows)
  counts = data.manifest["rows"]["stage_1"]
  first, second = preview.describe(config, data).values()
  selected, found = counts["units_selected"], counts["units_found"]
  assert selected == math.ceil(found / 2)
  assert f"the easiest {selected:,} of {found:,} sentences" in first
  assert f"{counts['texts_too_long']:,} longer than 64 tokens" in first
  assert f"cut at {counts['difficulty']['cut']:.3f}" in first
  assert "paragraphs of all" in second and "cut" not in second
  for text, name in ((first, "stage_1"), (second, "stage_2")):
    examples = data.manifest["rows"][name]["examples"]
    assert len(examples) == 5
    for example in examples:
      assert example.split("\n")[0] in text


def test_the_histogram_marks_the_cut():
  bars, mark = preview._histogram([0, 1, 4, 8, 0], 0.5)
  assert bars.endswith("difficulty 0  \u2581\u2584\u2588  1")
  assert mark.index("^") == bars.index("\u2584")
  assert mark.endswith("cut at 0.500")


# MARK: starting from another run's tokenizer


def test_a_given_runs_tokenizer_is_used(config, tmp_path):
  chars = dataclasses.replace(config, tokenizer=TokenizerConfig(kind="char"))
  origin = prepare(chars.rows)
  origin.tokenizer.save(tmp_path / "origin")
  started = dataclasses.replace(config, init_from=str(tmp_path / "origin"))
  data = prepare(started.rows)
  assert data.tokenizer.sha256 == origin.tokenizer.sha256
  np.testing.assert_array_equal(data.stages[0].tokens, origin.stages[0].tokens)


def test_a_run_keeps_the_tokenizer_when_its_origin_is_gone(config, tmp_path):
  gone = dataclasses.replace(config, init_from=str(tmp_path / "gone"))
  with pytest.raises(UserError, match="gone.* is not a finished run"):
    prepare(gone.rows, tmp_path)
  origin = prepare(config.rows).tokenizer
  origin.save(tmp_path)
  assert prepare(gone.rows, tmp_path).tokenizer.sha256 == origin.sha256


# MARK: numbers at their bounds

LEAST = {
  "optimizer": {
    **dict(learning_rate=1e-300, warmup_steps=0, min_lr_ratio=0),
    **dict(weight_decay=0, clip_norm=1e-9, b1=0, b2=0, eps=1e-30, ema_decay=0),
  },
  "model": {"rope_theta": 1, "dropout": 0},
  "noise": {"schedule": "polynomial", "exponent": 0.01},
  "stages": [{"length": 32, "epochs": 1e-300}],
}
MOST = {
  "seed": 2**32 - 1,
  "optimizer": {
    **dict(learning_rate=1, warmup_steps=2**31 - 1, min_lr_ratio=1, eps=1),
    **dict(weight_decay=1, clip_norm=1e9, b1=0.999999, b2=0.999999),
    **dict(ema_decay=1),
  },
  "model": {"rope_theta": 1e12, "dropout": 0.9},
  "noise": {"schedule": "polynomial", "exponent": 100},
  "objective": {"label_smoothing": 0.9},
  "stages": [{"length": 32, "updates": 2**31 - 1, "min_words": 0}],
  "train": {"spike_sigmas": 1e6, "spike_window": 65536},
}


@pytest.mark.parametrize("extreme", [LEAST, MOST], ids=["least", "most"])
def test_numbers_at_their_bounds_train(config, extreme):
  raw = config_lib.to_dict(config)
  for section, values in extreme.items():
    nested = isinstance(values, dict)
    raw[section] = raw[section] | values if nested else values
  config = config_lib.from_dict(raw)
  mesh = make_mesh("1x1")
  with jax.set_mesh(mesh):
    trainer = make_trainer(config, prepare(config.rows), mesh)
    state = trainer.init()
    for update in range(3):
      state, metrics = trainer.update(state, update)
      assert math.isfinite(metrics["loss"])
    for leaf in jax.tree.leaves(state.params):
      assert np.isfinite(leaf).all()


@pytest.mark.parametrize("stages", [[1e9], [1e5, 1e5]])
def test_more_updates_than_can_be_counted(config, stages):
  config = dataclasses.replace(
    config, stages=tuple(StageConfig(epochs=e) for e in stages)
  )
  with pytest.raises(UserError, match=r"stages\[.\] is .* 2,147,483,647"):
    make_curriculum(
      config.stages, [100_000] * len(stages), config.rows_per_update
    )
