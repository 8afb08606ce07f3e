"""Compiling for devices that are not here.

For GPUs this needs jax[cuda13], 4.5 GB. With it installed beside the project,
in an environment whose interpreter CUDA_PYTHON names, or with CUDA_PYTHON=new
in one that is made for the test:

  CUDA_PYTHON=new pytest -n 0 -m slow tests/benchmarks/topology_test.py
"""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
from apart_harness import python_with
from command_harness import environment

from mdm_jax.benchmarks import topology
from mdm_jax.core.errors import UserError

LAYERS, WIDTH, VOCABULARY = 12, 768, 50_257  # of the preset gpt2
STEPS = 20  # of a text, by default
# What was predicted of 64 rows, and three in a hundred more: of an update, and
# of drawing them.
MOST_SECONDS = 1.03 * 0.0552
MOST_SECONDS_TO_DRAW = 1.03 * 0.2819


@pytest.mark.parametrize("name", ["h100", "h100:0", "h100:12", "h200:x"])
def test_a_number_of_gpus_that_hosts_do_not_have_is_told(name):
  with pytest.raises(UserError, match=re.escape(repr(name))) as told:
    topology.devices(name)
  assert "a multiple of 8" in str(told.value)


@pytest.mark.parametrize(
  "name, extra", [("h100:1", "cuda13"), ("v5e:1", "tpu")]
)
def test_without_their_compiler_one_line_says_what_to_install(name, extra):
  installed = {"cuda13": "jax_cuda13_plugin", "tpu": "libtpu"}[extra]
  if importlib.util.find_spec(installed):
    pytest.skip(f"{installed} is installed here")
  with pytest.raises(UserError, match=r"pip install -e '\.\[" + extra):
    topology.devices(name)


# MARK: for an H100, in an environment of its own


@pytest.fixture(scope="module")
def python(tmp_path_factory):
  """An interpreter that has XLA's GPU compiler."""
  if importlib.util.find_spec("jax_cuda13_plugin"):
    return sys.executable
  asked = os.environ.get("CUDA_PYTHON")
  if asked is None:
    pytest.skip("jax[cuda13] (4.5 GB) is not installed: see this file's top")
  if asked != "new":
    return asked
  return python_with(tmp_path_factory.mktemp("cuda"), "cuda13", "")


def command(python, folder, *arguments):
  """Returns what the command says of the programs of gpt2."""
  env = environment(folder)
  # conftest.py's flags make XLA compile fast, not well.
  del env["XLA_FLAGS"]
  done = subprocess.run(
    [python, "-m", "mdm_jax.benchmarks.lowering", "--preset=gpt2"]
    + ["--batch=64", "--texts=64", "--json", *arguments],
    env=env,
    capture_output=True,
    text=True,
    timeout=900,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def compiled(python, tmp_path_factory):
  return command(python, tmp_path_factory.mktemp("cache"), "--topology=h100:1")


def products(program, dtype):
  """Returns the products with an operand of a dtype."""
  kinds = [k for k in program["kernels"] if k["kind"].startswith("product")]
  return [k for k in kinds if dtype in k["kind"].split()]


@pytest.mark.slow
def test_no_product_of_the_vocabularys_size_is_in_float32(compiled):
  """On a GPU it would take three times as long as one of bfloat16."""
  found = products(compiled["train_step"], "f32")
  # Of a single row: anything larger has the vocabulary in it.
  small = 2 * VOCABULARY * WIDTH
  assert all(k["operations"] < small * k["times"] for k in found), found
  assert products(compiled["train_step"], "bf16")


@pytest.mark.slow
def test_attention_runs_forward_once_a_layer(compiled):
  """Its output is kept, not computed again for the gradient."""
  kinds = compiled["train_step"]["by_kind"]
  assert kinds["attention, forward"]["times"] == LAYERS
  assert kinds["attention, backward"]["times"] == LAYERS


@pytest.mark.slow
def test_an_update_takes_no_longer_than_it_did(compiled):
  assert 0 < compiled["train_step"]["predicted_seconds"] < MOST_SECONDS


@pytest.mark.slow
def test_a_loop_over_split_layers_keeps_attention_too(python, tmp_path):
  found = command(python, tmp_path, "--topology=h100:2", "--program=train_step")
  kinds = found["train_step"]["by_kind"]
  assert kinds["all-gather"]["times"] > LAYERS  # their parameters are split
  assert kinds["attention, forward"]["times"] == LAYERS
  assert kinds["attention, backward"]["times"] == LAYERS


@pytest.mark.slow
def test_drawing_takes_no_longer_than_it_did(compiled):
  found = compiled["sampler"]
  assert 0 < found["predicted_seconds"] < MOST_SECONDS_TO_DRAW
  # cuDNN's, in all layers but the last, of which few positions are read.
  calls = found["by_kind"]["attention, forward"]["times"]
  assert calls == STEPS * (LAYERS - 1)
