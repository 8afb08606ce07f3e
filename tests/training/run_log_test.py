"""The run log: means over updates, bins, and what a resume keeps."""

import json
import math
import re

import jax
import jaxtyping
import numpy as np
import pytest
from etils import epath
from paths import ROOT

from mdm_jax.benchmarks import workload
from mdm_jax.blueprint import make_trainer
from mdm_jax.core.progress import ProgressLine
from mdm_jax.objectives.base import Ratio
from mdm_jax.runtime.attempt import Attempt
from mdm_jax.training import run_log
from mdm_jax.training.run_log import RunLog
from mdm_jax.training.writers import Writers

EVERY = 20  # updates between two points
TINY = workload.PRESETS["tiny"]
PAGE = ROOT / "docs" / "reliability.md"
TIMED = re.compile("perf/|goodput/|memory/|.*seconds|.*per_second|health/att")


@pytest.fixture(autouse=True)
def _unchecked():
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def trainer(mesh):
  data = workload.make_data(TINY, workload.make_rows(TINY, 32))
  return make_trainer(workload.make_config(TINY), data, mesh)


COUNTS = np.array([0, 5, 5, 0, 3, 1, 9, 0, 0, 2], np.float32)


def _numbers(update, **changed):
  """What a step returns, different for every update."""
  rng = np.random.default_rng(update)
  return {
    "loss": np.float32(rng.uniform(1, 9)),
    "grad_norm": np.float32(rng.uniform()),
    "mask_rate": Ratio(np.float32(rng.integers(1, 99)), np.float32(128)),
    "tokens": np.float32(128),
    "skipped": np.float32(0),
    "nonfinite": np.float32(0),
    "spike": np.float32(0),
    "mask_bins": Ratio(rng.uniform(1, 9, 10).astype(np.float32), COUNTS),
  } | changed


def _log(trainer, folder, updates, progress=None, after=0, numbers=_numbers):
  """Logs updates; returns the points, and what a checkpoint would keep."""
  path = epath.Path(folder)
  with (
    Writers(path, after) as writers,
    ProgressLine(100) as line,
    Attempt(path, "", 3) as attempt,
  ):
    log = RunLog(trainer, writers, line, attempt, progress, EVERY)
    log.on_stage(trainer.curriculum.stages[0], after)
    for update in updates:
      log.on_metrics(update, numbers(update))
    log.flush()
    kept = json.loads(json.dumps(log.progress(), allow_nan=False))
  points = [json.loads(x) for x in (folder / "metrics.jsonl").open()]
  return points, kept, log


def _steady(point):
  return {k: v for k, v in point.items() if not TIMED.match(k)}


def test_a_point_begun_before_a_resume_is_the_same(trainer, tmp_path):
  every = EVERY
  last = 2 * every
  whole, _, _ = _log(trainer, tmp_path, range(1, last + 1))
  parts = tmp_path / "parts"
  parts.mkdir()
  cut = every + every // 2
  _, kept, _ = _log(trainer, parts, range(1, cut + 1))
  found, _, _ = _log(trainer, parts, range(cut + 1, last + 1), kept, after=cut)
  assert list(map(_steady, found)) == list(map(_steady, whole))
  # The control: without what was kept, it is the mean over fewer.
  lost, _, _ = _log(trainer, parts, range(cut + 1, last + 1), None, after=cut)
  assert lost[-1]["train/loss"] != whole[-1]["train/loss"]


def test_what_is_kept_comes_back_bit_for_bit():
  odd = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45, 3e38, 0.1], np.float32)
  one = Ratio(np.float32(0.1), np.float32(3))
  values = {"loss": math.nan, "x": 0.1, "y": one, "z": Ratio(odd, odd[::-1])}
  text = json.dumps(run_log._to_plain(values), allow_nan=False)
  back = run_log._from_plain(json.loads(text))
  assert math.isnan(back["loss"]) and back["x"] == 0.1
  bits = lambda x: np.asarray(x).view(np.int32)
  for name in "yz":
    for got, want in zip(back[name], values[name], strict=True):
      assert got.dtype == want.dtype and got.shape == want.shape
      np.testing.assert_array_equal(bits(got), bits(want))


def test_bins_are_means_over_tokens_and_empty_ones_are_left_out(
  trainer, tmp_path
):
  every = EVERY
  points, _, _ = _log(trainer, tmp_path, range(1, every + 1))
  updates = [_numbers(u) for u in range(1, every + 1)]
  found = {k: v for k, v in points[0].items() if k.startswith("mask_bins/")}
  assert list(found) == [
    f"mask_bins/ce_0.{i}-{(i + 1) / 10:.1f}" for i in (1, 2, 4, 5, 6, 9)
  ]
  loss = sum(u["mask_bins"].total[4].astype(float) for u in updates)
  assert found["mask_bins/ce_0.4-0.5"] == pytest.approx(loss / (3 * every))
  masked = sum(u["mask_rate"].total for u in updates)
  assert points[0]["train/mask_rate"] == pytest.approx(masked / (128 * every))


def test_what_is_not_finite_is_in_no_mean_but_counted(trainer, tmp_path):
  bad = {"loss": np.float32(np.nan), "skipped": np.float32(1)}
  bad |= {"nonfinite": np.float32(1), "grad_norm": np.float32(np.inf)}
  losses = np.array([1, np.nan, *[1] * 8], np.float32)
  bad["mask_bins"] = Ratio(losses, COUNTS)
  numbers = lambda u: _numbers(u, **(bad if u in (2, 3) else {}))
  every = EVERY
  points, kept, log = _log(
    trainer, tmp_path, range(1, every + 1), numbers=numbers
  )
  good = [_numbers(u)["loss"] for u in range(1, every + 1) if u not in (2, 3)]
  assert points[0]["train/loss"] == pytest.approx(np.mean(good))
  assert points[0]["train/nonfinite"] == pytest.approx(2 / every)
  assert all(math.isfinite(v) for v in points[0].values())
  assert points[0]["health/nonfinite_total"] == 2 == kept["nonfinite_total"]
  assert log.failed == []  # the updates after them were applied


def test_failures_in_a_row_are_remembered(trainer, tmp_path):
  skipped = lambda u: _numbers(u, skipped=np.float32(u > 4))
  _, kept, log = _log(trainer, tmp_path, range(1, 8), numbers=skipped)
  assert log.failed == [5, 6, 7]
  _, more, _ = _log(
    trainer, tmp_path, range(8, 10), kept, after=7, numbers=skipped
  )
  assert more["skipped_total"] == 5  # 5, 6, 7, 8, 9: it never goes down


def test_every_name_is_documented(trainer, tmp_path):
  every = EVERY
  points, _, _ = _log(trainer, tmp_path, range(1, every + 1))
  groups = {name.partition("/")[0] for name in points[0]} - {"step"}
  told = PAGE.read_text().partition("## What is logged")[2]
  documented = set(re.findall(r"^\| .*?`(\w+)/", told, re.MULTILINE))
  assert groups == documented - {"validation", "samples"}
  assert jax.default_backend() != "cpu" or "perf/mfu" not in points[0]
