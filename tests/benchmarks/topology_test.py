"""Compiling for devices that are not here.

For GPUs this needs jax[cuda13], 4.5 GB. With it installed beside the project,
in an environment whose interpreter CUDA_PYTHON names, or with CUDA_PYTHON=new
in one that is made for the test:

  CUDA_PYTHON=new pytest -n 0 -m slow tests/benchmarks/topology_test.py

For TPUs it needs jax[tpu], 0.3 GB, in the same way with TPU_PYTHON.
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
from paths import ROOT

from mdm_jax.benchmarks import topology
from mdm_jax.core.errors import UserError

LAYERS, WIDTH, VOCABULARY = 12, 768, 50_257  # of the preset gpt2
LENGTH = 512  # of configs/recommended.py, which has as many layers
STEPS = 20  # of a text, by default
# What was predicted of 64 rows, and three in a hundred more: of an update, and
# of drawing them.
MOST_SECONDS = 1.03 * 0.0541
MOST_SECONDS_TO_DRAW = 1.03 * 0.2819


@pytest.mark.parametrize("name", ["h100", "h100:0", "h100:12", "h200:x"])
def test_a_number_of_gpus_that_hosts_do_not_have_is_reported(name):
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


def python(folder, extra, module, variable):
  """Returns an interpreter that has the compiler of an extra."""
  if importlib.util.find_spec(module):
    return sys.executable
  asked = os.environ.get(variable)
  if asked is None:
    pytest.skip(f"jax[{extra}] is not installed: see this file's top")
  return python_with(folder, extra, "") if asked == "new" else asked


def lowering(interpreter, folder, *args):
  """Returns what the command says."""
  env = environment(folder)
  # conftest.py's flags make XLA compile fast, not well.
  del env["XLA_FLAGS"]
  done = subprocess.run(
    [interpreter, "-m", "mdm_jax.benchmarks.lowering", *args, "--json"],
    env=env,
    capture_output=True,
    text=True,
    timeout=900,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def cuda_python(tmp_path_factory):
  """Returns an interpreter that has XLA's GPU compiler."""
  folder = tmp_path_factory.mktemp("cuda")
  return python(folder, "cuda13", "jax_cuda13_plugin", "CUDA_PYTHON")


def of_gpt2(interpreter, folder, *args):
  """Returns what the command says of the programs of gpt2."""
  texts = "--preset=gpt2", "--batch=64", "--texts=64"
  return lowering(interpreter, folder, *texts, *args)


@pytest.fixture(scope="module")
def compiled(cuda_python, tmp_path_factory):
  folder = tmp_path_factory.mktemp("cache")
  return of_gpt2(cuda_python, folder, "--topology=h100:1")


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
def test_a_loop_over_split_layers_keeps_attention_too(cuda_python, tmp_path):
  found = of_gpt2(
    *(cuda_python, tmp_path, "--topology=h100:2"), "--program=train_step"
  )
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


# MARK: for TPUs, in an environment of its own


@pytest.fixture(scope="module")
def tpu_python(tmp_path_factory):
  """Returns an interpreter that has libtpu."""
  folder = tmp_path_factory.mktemp("tpu")
  return python(folder, "tpu", "libtpu", "TPU_PYTHON")


@pytest.fixture(scope="module")
def compiled_for_tpus(tpu_python, tmp_path_factory):
  """Returns what the command says of recommended.py on eight TPUs."""
  config = f"--config={ROOT / 'configs' / 'recommended.py'}"
  folder = tmp_path_factory.mktemp("cache")
  return lowering(tpu_python, folder, config, "--topology=v5e:2x4")


@pytest.mark.slow
def test_splash_attention_runs_forward_once_a_layer(compiled_for_tpus):
  """And one kernel has all gradients; there are two microbatches."""
  assert compiled_for_tpus["train_step"]["pallas"] == {
    "splash_mha_fwd_segmented_residuals": 2 * LAYERS,
    "splash_mha_dkv_segmented_no_residuals": 2 * LAYERS,
  }
  # A step of the sampler is one call; it needs no log-sums.
  steps = compiled_for_tpus["sampler"]["pallas"]
  assert steps == {"splash_mha_fwd_segmented_no_residuals": 25 * LAYERS}


@pytest.mark.slow
@pytest.mark.parametrize("program", ["train_step", "sampler"])
def test_there_is_no_array_of_all_pairs_on_a_tpu(compiled_for_tpus, program):
  found = [array["shape"] for array in compiled_for_tpus[program]["arrays"]]
  assert len(found) > 10
  assert not [s for s in found if re.search(rf"\b{LENGTH},{LENGTH}\]", s)]


KINDS = """
import sys
import jax
import jax.numpy as jnp
from mdm_jax.benchmarks import topology
from mdm_jax.core.sharding import AXES
from mdm_jax.model.context import Visibility, row_context
from mdm_jax.model.splash_kernel import Splash

kernel, split = Splash(), ("replica", "fsdp")

def compiled(visibility, length, size, dtype):
  def attend(query, key, value, segments):
    side = row_context(segments, visibility=visibility, most_segments=3).side
    prepared = kernel.prepare(visibility, side, side)
    return kernel.attend(query, key, value, prepared).astype(jnp.float32).sum()

  def shape(dtype, *sizes):
    spec = jax.P(split, *["tensor", None, None, None][: len(sizes) - 1])
    sharding = jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec)
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

  keys = shape(dtype, 2, 2, length, size)
  query = shape(dtype, 2, 2, 2, length, size)
  spec = jax.sharding.NamedSharding(jax.sharding.get_mesh(), jax.P(split))
  rows = jax.ShapeDtypeStruct((2, length), jnp.int32, sharding=spec)
  gradient = jax.jit(jax.grad(attend, argnums=(0, 1, 2)))
  return gradient.trace(query, keys, keys, rows).lower().compile()

devices = topology.devices(sys.argv[1])
with jax.set_mesh(jax.make_mesh((1, 2, 2), AXES, devices=devices)):
  for kind in "full", "causal", "blocks", "noisy":
    compiled(Visibility(kind, 20), 512, 64, "bfloat16")
  # The largest block of keys; and rows that have several.
  for size, length in (256, 2048), (128, 4096), (128, 8192):
    compiled(Visibility("full"), length, size, "float32")
"""


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_every_visibility_of_splash_attention_compiles(
  tpu_python, tmp_path, topology
):
  env = environment(tmp_path) | {"JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [tpu_python, "-c", KINDS, topology], env=env, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
