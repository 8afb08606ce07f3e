"""The report of updates that were not finite: their passes, done again."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.benchmarks.workload import one_byte_a_token
from mdm_jax.blueprint import make_trainer
from mdm_jax.config import Config
from mdm_jax.data import tokenizer as tokenizers
from mdm_jax.data.config import DataConfig, StageConfig, TokenizerConfig
from mdm_jax.data.prepared import PreparedData
from mdm_jax.data.rows import Rows
from mdm_jax.model.config import ModelConfig
from mdm_jax.objectives import masked
from mdm_jax.objectives.config import MaskedStage
from mdm_jax.training import incident
from mdm_jax.training.config import OptimizerConfig

CONFIG = Config(
  seed=7,
  data=DataConfig(batch_size=8),
  tokenizer=TokenizerConfig(kind="byte"),
  model=ModelConfig(num_layers=1, embed_dim=16, num_heads=2, dropout=0.1),
  stages=(
    StageConfig(name="early", length=16, updates=2),
    StageConfig(
      name="late",
      length=16,
      updates=2,
      objective=MaskedStage(mask_rate=(0.2, 0.4)),
    ),
  ),
  optimizer=OptimizerConfig(warmup_steps=1, accumulation=2),
)


def make_rows(seed):
  tokens = np.random.default_rng(seed).integers(0, 250, (40, 16))
  segments = np.ones((40, 16), np.int32)
  segments[::3, 10:] = 0
  return Rows(tokens, segments)


def trainer_of(mesh):
  tokenizer = tokenizers.build(CONFIG.tokenizer, [])
  rows = make_rows(1), make_rows(2)
  held = one_byte_a_token(rows[0])
  data = PreparedData(tokenizer, rows, held, held, {})
  return make_trainer(CONFIG, data, mesh)


@pytest.fixture
def infinite(monkeypatch):
  """Every row weighs infinitely much in what is compiled from here on."""
  weights = masked.row_weights
  monkeypatch.setattr(
    masked,
    "row_weights",
    lambda *args: np.float32(np.inf) * weights(*args),
  )


def read(path):
  """Parses strictly: `json` takes NaN for a number by default."""

  def refuse(name):
    raise AssertionError(f"{name} is not JSON")

  report = json.loads(path.read_text(), parse_constant=refuse)
  lines = (path.parent / "rows.jsonl").read_text().splitlines()
  return report, [json.loads(line, parse_constant=refuse) for line in lines]


@pytest.mark.parametrize(
  "any_mesh",
  ["1x1", pytest.param("4x2", marks=pytest.mark.slow)],
  indirect=True,
)
def test_the_report_is_of_the_updates_that_failed(any_mesh, infinite, tmp_path):
  trainer = trainer_of(any_mesh)
  state, measured = trainer.init(), []
  for update in range(3):
    state, metrics = trainer.update(state, update)
    assert metrics["nonfinite"] == 1
    measured.append(jax.device_get(metrics))
  before = jax.device_get(state)
  path = incident.write_report(tmp_path / "new", trainer, state, [1, 2])
  assert path == tmp_path / "new" / "report.json"
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), before)
  report, rows = read(path)
  assert (report["seed"], report["step"]) == (7, 3)
  for told, update in zip(report["updates"], (1, 2), strict=True):
    metrics = measured[update]
    assert told["update"] == update
    assert told["stage"] == ("early", "late")[update // 2]
    assert told["loss"] == "inf" and math.isinf(metrics["loss"])
    assert told["learning_rate"] == metrics["learning_rate"]
    assert told["gradient_norm"]["blocks/mlp/down"] in ("inf", "nan")
    size = before.params["blocks"]["mlp"]["down"].size
    assert 0 < told["gradient_nonfinite"]["blocks/mlp/down"] <= size
    # Without the weight all is finite, and as it was.
    summaries = told["summaries"]
    share = summaries.pop("train/mask_rate")
    assert share["total"] == sum(row["masked"] for row in told["rows"])
    assert list(summaries) == [
      f"mask_bins/ce_{i / 10:.1f}-{(i + 1) / 10:.1f}" for i in range(10)
    ]
    bins = list(summaries.values())
    want = jax.device_get(metrics["mask_bins"])
    np.testing.assert_allclose(
      [b["total"] for b in bins], want.total, rtol=1e-5
    )
    assert [b["count"] for b in bins] == want.count.tolist()
    check_rows(trainer, update, told, bins)
  check_tokens(trainer, report, rows)


def check_rows(trainer, update, told, bins):
  numbers = [row["row"] for row in told["rows"]]
  assert numbers == trainer.row_numbers(update).tolist()
  counts, sums = np.zeros(10), np.zeros(10)
  for row in told["rows"]:
    real = (trainer.data.stages[update // 2].segments[row["row"]] > 0).sum()
    assert row["masked"] == math.ceil(row["mask_rate"] * real * (1 - 1e-6))
    counts[math.ceil(row["mask_rate"] * 10) - 1] += row["masked"]
    sums[math.ceil(row["mask_rate"] * 10) - 1] += row["cross_entropy"]
  np.testing.assert_array_equal([b["count"] for b in bins], counts)
  got = [b["total"] for b in bins]
  np.testing.assert_allclose(got, sums, rtol=1e-5)


def check_tokens(trainer, report, rows):
  said = [(u["update"], r["row"]) for u in report["updates"] for r in u["rows"]]
  assert [(row["update"], row["row"]) for row in rows] == said
  for row in rows:
    stage = trainer.data.stages[row["update"] // 2]
    assert row["tokens"] == stage.tokens[row["row"]].tolist()
    assert row["segments"] == stage.segments[row["row"]].tolist()


def test_a_finite_update_is_reported_exactly(mesh, tmp_path):
  """A control: the very numbers of the step, dropout and all."""
  trainer = trainer_of(mesh)
  state = trainer.init()
  report, _ = read(incident.write_report(tmp_path, trainer, state, [0]))
  _, metrics = trainer.update(state, 0)
  (told,) = report["updates"]
  assert told["loss"] == pytest.approx(float(metrics["loss"]), rel=1e-5)
  norms = np.array(list(told["gradient_norm"].values()))
  whole = float(metrics["grad_norm"])
  assert np.sqrt((norms**2).sum()) == pytest.approx(whole, rel=1e-5)
  assert told["gradient_nonfinite"] == {}
  assert not any(report["nonfinite"].values())


def test_it_says_where_the_state_is_not_finite(mesh, tmp_path):
  trainer = trainer_of(mesh)
  state = trainer.init()
  spoil = functools.partial(jax.tree_util.tree_map_with_path, _spoil)
  state = spoil(state)
  report, _ = read(incident.write_report(tmp_path, trainer, state, [0]))
  assert report["nonfinite"] == {
    "params": {"final_norm/scale": 2},
    "ema_params": {},
    "opt_state": {"1/mu/final_norm/scale": 2},
    "guard": {},
  }
  assert report["updates"][0]["loss"] == "nan"


def _spoil(path, leaf):
  name = jax.tree_util.keystr(path, simple=True, separator="/")
  if name in ("params/final_norm/scale", "opt_state/1/mu/final_norm/scale"):
    return leaf.at[:2].set(jnp.array([jnp.nan, jnp.inf]))
  return leaf


def test_numbers_json_does_not_have_are_spelled_out():
  odd = {"a": [math.nan, 1.5, {"b": -math.inf}], "c": math.inf, "d": None}
  want = {"a": ["nan", 1.5, {"b": "-inf"}], "c": "inf", "d": None}
  assert incident._strict(odd) == want
