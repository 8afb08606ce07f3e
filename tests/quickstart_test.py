"""The README's first command, whole."""

import json
import os
import subprocess
import sys

import pytest
from paths import ROOT


@pytest.mark.slow
def test_the_quickstart_learns_what_its_page_says(tmp_path):
  command = [sys.executable, "-m", "mdm_jax.main"]
  command += [f"--config={ROOT / 'configs' / 'quickstart.py'}"]
  command += [f"--workdir={tmp_path}", "--json"]
  ours = ("NPROC", "XLA_FLAGS")  # set for the other tests, in conftest.py
  env = {k: v for k, v in os.environ.items() if k not in ours}
  done = subprocess.run(
    command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=3000
  )
  assert done.returncode == 0, done.stderr
  results = json.loads((tmp_path / "results.json").read_text())
  assert json.loads(done.stdout.splitlines()[-1]) == results
  assert results["updates"] == 3000
  # 1.68 in docs/quickstart.md.
  assert results["bits_per_byte"] < 1.74
  assert results["nelbo_stderr"] < 0.15  # over 12 documents
  curve = list(results["ce_by_mask_rate"].values())
  assert curve[0] < curve[-1] - 0.8  # it reads what is visible
  assert len(results["samples"]) == 4 and all(results["samples"])


@pytest.mark.slow
def test_what_a_gpu_has_to_show_can_be_tried_on_any_device():
  command = [sys.executable, ROOT / "tests" / "on_gpu.py", "--updates=3"]
  done = subprocess.run(
    command, capture_output=True, text=True, timeout=1200, check=False
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert done.stdout.splitlines()[-1] == "all of it holds"
  assert len(done.stdout.splitlines()) == 9
