"""The ablation: its arithmetic, and the program as a user runs it."""

import json
import math

import pytest
from command_harness import call, environment
from paths import ROOT

from mdm_jax.objectives.measured import Curve, Measured, Value, to_json
from mdm_jax.studies import ablate

CONFIG = ROOT / "configs" / "ablation.py"


def _run(loss, entropy=None):
  text = {"own": {"title": "entropy", "value": entropy}}
  curve = Curve(
    (0.0, 0.5, 1.0), (loss - 1, loss, loss + 1), "a curve", point="f({})"
  )
  measured = Measured({"loss": Value(loss, "Loss")}, {"f": curve}, "loss")
  more = {"text_metrics": {"sampling": text}} if entropy else {}
  return to_json(measured) | more


def test_variants_are_compared_seed_by_seed():
  """What is common to a seed, here 1 against 3, is no error of the loss."""
  lines = ablate.compare(
    {"base": [_run(1.0), _run(3.0)], "other": [_run(1.5), _run(3.5, 2.0)]}
  )
  assert ablate._cells(lines, ["vs baseline", "Loss", "entropy"]) == [
    ["base", "0.000 ± 0.000", "2.000 ± 1.000", "-"],
    ["other", "0.500 ± 0.000", "2.500 ± 1.000", "2.000"],
  ]
  assert lines["other"]["f(1)"].value == 3.5
  assert math.isnan(lines["base"]["entropy"].value)


def _call(folder, *args):
  env = environment(folder / "cache")
  return call(folder, env, *args, module="mdm_jax.studies.ablate")


@pytest.mark.slow
def test_a_sweep_trains_compares_and_resumes(tmp_path):
  args = f"--config={CONFIG}", "--quick", "--variants=plain"
  args += ("--workdir=w", "--seeds=1")
  done = _call(tmp_path, *args)
  assert done.returncode == 0, done.stderr
  header, line = (tmp_path / "w/ablation.csv").read_text().splitlines()
  folder = tmp_path / "w" / "plain" / "seed_0"
  results = json.loads((folder / "results.json").read_text())
  assert header.startswith("variant,seed,")
  assert line.startswith(f"plain,0,{results['nelbo_per_token']}")
  name = json.loads((folder / "config.json").read_text())["name"]
  assert name == "ablation_plain_quick"
  table = (tmp_path / "w/ablation.md").read_text()
  assert table.startswith("| variant | vs baseline |")
  assert "| plain | 0.000 |" in table
  again = _call(tmp_path, *args)
  assert again.returncode == 0 and "is finished" in again.stdout


@pytest.mark.parametrize(
  "args, words",
  [
    ([], "--config"),
    (["--config=none.py"], "none.py"),
    ([f"--config={CONFIG}", "--variants=strct"], "'strct'|'strict'"),
    ([f"--config={CONFIG.parent / 'baseline.py'}"], "VARIANTS"),
    ([f"--config={CONFIG}", "--seeds=0"], "seeds"),
    ([f"--config={CONFIG}", "extra"], "'extra'"),
  ],
)
def test_a_mistake_is_one_line(args, words, tmp_path):
  done = _call(tmp_path, *args)
  assert done.returncode == 2
  assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
  for word in words.split("|"):
    assert word in done.stderr
