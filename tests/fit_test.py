"""The memory plan of every model size and mesh, kept as readable files.

tests/golden/NAME.MESH.txt is what

  python -m mdm_jax.plan --config=configs/NAME.py --mesh=MESH

prints; recommended.h100.txt what it prints with --mesh=1 --device=h100;
recommended.64x4 with --config.data.batch_size=64, a row a data shard;
from_causal.a100-80.txt is of from_causal.py:full and a Qwen3-0.6B, on the 64
devices that dLLM used.
Nothing here needs devices: all is lowered for meshes that are not there. What
the devices tell each other is told by as many fake ones, in another process.
"""

import dataclasses
import difflib
import json
import re
import subprocess
import sys

import huggingface_harness as harness
import jax
import numpy as np
import optax
import pytest
from absl import flags
from command_harness import call, check_mistake, environment
from ml_collections import config_flags
from paths import GOLDEN, ROOT

from mdm_jax import command_line, fit
from mdm_jax import config as config_lib
from mdm_jax.benchmarks import programs
from mdm_jax.core import sharding
from mdm_jax.core.errors import UserError
from mdm_jax.planning.footprint import footprint, kept_for_backward, layouts
from mdm_jax.workdir import Workdir

NAMES = ["recommended", "medium", "large", "8b"]
MESHES = ["1", "8", "64x4"]
# Medium and large differ from the others in size alone.
SLOW = [
  pytest.param(name, marks=pytest.mark.slow if name in NAMES[1:3] else ())
  for name in NAMES
]


@pytest.fixture(autouse=True)
def standard_promotion():
  """As in a run: what accelerators attend by is JAX's own."""
  with jax.numpy_dtype_promotion("standard"):
    yield


# Qwen3-0.6B, without weights: a plan reads none.
QWEN3 = harness.CONFIG | {
  "model_type": "qwen3",
  "vocab_size": 151_936,
  "hidden_size": 1024,
  "intermediate_size": 3072,
  "num_hidden_layers": 28,
  "num_attention_heads": 16,
  "num_key_value_heads": 8,
  "head_dim": 128,
  "rms_norm_eps": 1e-6,
  "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
  "tie_word_embeddings": True,
}


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory):
  """A folder of this model, as init_from names it."""
  folder = tmp_path_factory.mktemp("qwen3")
  (folder / "config.json").write_text(json.dumps(QWEN3))
  harness.tokenizer().save(str(folder / "tokenizer.json"))
  return f"hf:{folder}"


def read(name, argument="", source=""):
  """Returns what --config=configs/NAME.py:ARGUMENT is, started from a model."""
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", flag_values=values)
  values(["", f"--config={ROOT / 'configs' / name}.py:{argument}"])
  config = config_lib.from_config_dict(values.config)
  if not source:
    return config
  config = dataclasses.replace(config, init_from=source)
  return command_line.with_imported_sizes(config, Workdir("none"))


def blueprint(name, mesh, source=""):
  config = read(name, "full", source) if source else read(name)
  if config.data.batch_size % sharding.data_shards(mesh):
    data = dataclasses.replace(config.data, batch_size=mesh.shape["fsdp"])
    config = dataclasses.replace(config, data=data)
  return fit.blueprint(config, mesh)


def planned(mesh):
  return sharding.planned_mesh(sharding.parse_mesh(mesh))


# MARK: how arrays lie


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", SLOW)
def test_a_plan_is_the_golden_one(name, mesh):
  devices = planned(mesh)
  run = blueprint(name, devices)
  found = fit.describe(run, devices, footprint(run, devices))
  path = GOLDEN / f"{name}.{mesh}.txt"
  expected = path.read_text().splitlines()
  changes = difflib.unified_diff(expected, found, str(path), "now", lineterm="")
  assert found == expected, "\n".join(changes)


def test_a_plan_for_a_gpu_is_of_the_program_that_runs_there(capsys):
  """Unrolled layers that keep everything, cuDNN's attention, larger batches.

  XLA's GPU compiler assigns this update 3.20 GiB, and 64 rows 12.56 GiB
  (docs/performance.md).
  """
  fit.plan_mesh(read("recommended"), "1", "h100")
  expected = (GOLDEN / "recommended.h100.txt").read_text()
  assert capsys.readouterr().out == expected


def test_a_causal_model_is_converted_on_the_published_devices(capsys, qwen3):
  config = read("from_causal", "full", qwen3)
  assert config.rows_per_update == 2048
  fit.plan_mesh(config, "64", "a100-80")
  expected = (GOLDEN / "from_causal.a100-80.txt").read_text()
  assert capsys.readouterr().out == expected


def test_layers_that_are_split_over_gpus_stay_one_loop(capsys, monkeypatch):
  # The test above has them; each takes another trace.
  monkeypatch.setattr(fit.larger_batches, "fitting", lambda *_: [])
  found = fit.plan_mesh(read("recommended"), "8", "h100")
  told = capsys.readouterr().out
  assert "attention cudnn, remat dots" in told
  assert "on h100, layers one loop, remat dots: split parameters" in told
  # What cuDNN's kernel gives is kept, too: it does not run twice.
  assert re.search(r"attention +bfloat16 +9.00 MiB  12 x 4096/8 x 768\n", told)
  # Scores of all pairs of positions would be 60 MiB more.
  assert found["passing"]["block"] < 60 * 2**20


@pytest.mark.parametrize("name", SLOW)
def test_average_and_moments_lie_as_the_parameters_do(name):
  """A moment that is whole on every device is fsdp's saving lost in silence."""
  mesh = planned("64x4")
  run = blueprint(name, mesh)
  with jax.sharding.use_abstract_mesh(mesh):
    state = run.abstract()
  split = lambda tree: [
    (layout.shape, layout.shards, layout.dtype)
    for layout in layouts(tree, mesh)
  ]
  expected = split(state.params)
  moments = (optax.tree.get(state.opt_state, name) for name in ("mu", "nu"))
  for tree in (state.ema_params, *moments):
    assert split(tree) == expected
  matrices = [p for p in layouts(state.params, mesh) if "norm" not in p.name]
  assert matrices and all(np.prod(p.shards) == 256 for p in matrices)


def test_bytes_are_what_devices_hold(any_mesh, tiny_config):
  """Of a real state on the mesh, and of what the plan says of it."""
  config = dataclasses.replace(tiny_config, mesh=config_lib.MeshConfig())
  abstract = programs.abstract(any_mesh)
  run = fit.blueprint(config, abstract)
  found = footprint(run, abstract)
  params = jax.jit(run.denoiser.init)(jax.random.key(0))
  held = [
    leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params)
  ]
  assert [layout.bytes for layout in found.params] == held
  assert found.held["parameters"] == sum(held)


def test_the_last_of_unrolled_layers_counts_like_the_others(mesh, tiny_config):
  """It stands behind the loop that is traced."""
  model = dataclasses.replace(
    tiny_config.model, layer_loop="unrolled", remat="none"
  )
  abstract = mesh.abstract_mesh
  config = dataclasses.replace(tiny_config, model=model)
  run = fit.blueprint(config, abstract)
  kept = kept_for_backward(run, run.curriculum.stages[0], abstract)
  assert {layout.shape[0] for layout in kept} == {model.num_layers}


@pytest.mark.parametrize("name", NAMES)
def test_any_size_can_be_tried_out(name):
  mesh = planned("1")
  found = footprint(fit.blueprint(read(name, "quick"), mesh), mesh)
  assert found.total < 2**28


# MARK: the command


@pytest.fixture(scope="module")
def env(tmp_path_factory):
  """Of the commands."""
  return environment(tmp_path_factory.mktemp("cache"))


def test_a_plan_is_printed_with_its_verdict(tmp_path, env):
  done = call(
    *(tmp_path, env, f"--config={ROOT / 'configs' / '8b.py'}", "--mode=plan"),
    *("--mesh=64x4", "--device=v5e", "--json"),
  )
  assert done.returncode == 0, done.stderr
  *printed, kernel, caveat, verdict, values = done.stdout.splitlines()
  assert "\n".join(printed) == (GOLDEN / "8b.64x4.txt").read_text().strip()
  found = "splash attention, of bfloat16, heads of 128"
  assert kernel == f"on v5e, attention splash: {found}"
  assert caveat == "planned with XLA's own attention, which needs more memory"
  total = json.loads(values)["total"]
  assert verdict == f"fits v5e: {total / 2**30:.2f} of 16 GiB"


def test_a_run_that_does_not_fit_is_one_line(tmp_path, env):
  config = f"--config={ROOT / 'configs' / '8b.py'}"
  done = call(tmp_path, env, config, "--mode=plan", "--mesh=8", "--device=v5e")
  printed = (GOLDEN / "8b.8.txt").read_text()
  mib = float(printed.split()[-2].replace(",", ""))
  assert done.stdout.startswith(printed)
  told = f"v5e has 16 GiB, each device would need {mib / 2**10:.2f} GiB"
  check_mistake(done, told, "mesh.fsdp", "optimizer.accumulation")


@pytest.mark.parametrize(
  "name, mesh, device, told",
  [
    ("8b", "64x4", "v5", "'v5': did you mean"),
    ("8b", "64y4", None, "'64y4': write"),
    ("8b", "64x3", None, "key/value heads=8 does not split over mesh.tensor=3"),
  ],
)
def test_what_is_impossible_is_an_error(name, mesh, device, told):
  with pytest.raises(UserError, match=re.escape(told)):
    fit.plan_mesh(read(name), mesh, device)


# MARK: lowering, without devices


@pytest.mark.parametrize("program", programs.PROGRAMS)
@pytest.mark.parametrize("name", SLOW)
def test_it_lowers_for_a_mesh_that_is_not_there(name, program):
  mesh = planned("64x4")
  run, program = blueprint(name, mesh), programs.Program(program)
  traced = programs.trace(run, program, mesh)
  text = traced.lower(lowering_platforms=("tpu",)).as_text()
  assert '"fsdp"=64, "tensor"=4' in text


# MARK: what devices tell each other


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What a program of a run on 64 x 4 devices can't do without, in bytes.

  Attributes:
    steps: microbatches, or denoiser calls.
    weights: of the blocks, a tensor shard's, in bfloat16.
    table: the same of a table of the vocabulary.
    states: a data shard's residual stream, in bfloat16.
    masked: states that go through the head, and what is reduced of them.
    logits: of the tokens that a step of the sampler draws.
  """

  steps: int
  layers: int
  weights: int
  table: int
  states: int
  masked: int
  logits: int


def sizes(name, program, source):
  mesh = planned("64x4")
  run = blueprint(name, mesh, source)
  config, model = run.config, run.config.model
  params = footprint(run, mesh).params
  whole = lambda layout: layout.bytes * mesh.shape["fsdp"] // 2
  blocks = [p for p in params if p.name.startswith("blocks/")]
  sampler = program == "sampler"
  rows = 1 if sampler else config.data.batch_size // 64
  steps = config.sample.num_steps if sampler else config.optimizer.accumulation
  length = config.sample_length if sampler else config.stages[-1].length
  states = rows * length * model.embed_dim * 2
  return Sizes(
    steps=steps,
    layers=model.num_layers,
    weights=sum(whole(p) for p in blocks if len(p.shape) > 2),
    table=run.vocab.size // 4 * model.embed_dim * 2,
    states=states,
    masked=0 if sampler else states + 4 * rows * length * 4,
    logits=-(-length // steps) * run.vocab.size * 4 if sampler else 0,
  )


def budget(s, program, remat):
  """Returns the most bytes by kind and axes that sharding needs."""
  if program == "sampler":
    return {
      "all-gather over fsdp": s.steps * (s.weights + 2 * s.table),
      "all-reduce over tensor": s.steps * s.states * (2 * s.layers + 1),
      # A token is drawn by the device that has its row.
      "all-gather over tensor": s.steps * s.logits,
      "all-reduce over fsdp": s.steps * 64,
    }
  passes = 3 if remat == "full" else 2
  norms = s.layers * 2**16
  # Forward 2, backward one for each of query, key, value, gate, up; and what
  # is computed again.
  reduced = 2 + 5 + (passes - 2)
  return {
    "all-gather over fsdp": s.steps * (passes * s.weights + 2 * s.table),
    "all-reduce over fsdp": s.steps * (2 * s.weights + norms),
    "reduce-scatter over fsdp": s.steps * 2 * 2 * s.table,
    "all-reduce over tensor": s.steps
    * (s.states * (reduced * s.layers + 1) + s.masked),
  }


def slow(name):
  return pytest.param(name, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def lowered():
  """Runs the command once a config; what it says of both programs."""
  found = {}

  def run(name, source=""):
    if name not in found:
      found[name] = _lower(name, source)
    return found[name]

  return run


def _lower(name, source):
  args = [f"--config={ROOT / 'configs' / name}.py", "--mesh=64x4", "--json"]
  if source:
    args[0] += ":full"
    args.append(f"--config.init_from={source}")
  if name == "recommended":
    args.append("--config.data.batch_size=64")
  done = subprocess.run(
    [sys.executable, "-m", "mdm_jax.benchmarks.lowering", *args],
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("program", programs.PROGRAMS)
@pytest.mark.parametrize(
  "name",
  [*map(slow, ("recommended", "medium", "large", "from_causal")), "8b"],
)
def test_devices_tell_each_other_what_sharding_needs(
  lowered, qwen3, name, program
):
  source = qwen3 if name == "from_causal" else ""
  found = lowered(name, source)[program]["by_kind"]
  remat = "full" if name == "8b" else "dots"
  allowed = budget(sizes(name, program, source), program, remat)
  found = {k: v for k, v in found.items() if v["bytes"] > 2**12}
  assert found.keys() <= allowed.keys()
  for kind, sums in found.items():
    assert sums["bytes"] <= 1.01 * allowed[kind], kind
  gathered = "all-gather over fsdp"
  assert found[gathered]["bytes"] > 0.6 * allowed[gathered]


def test_the_optimizer_moves_nothing(lowered):
  """Moments, average and parameters stay where they are."""
  outside = [
    c
    for c in lowered("8b")["train_step"]["collectives"]
    if re.match(r"jit\(train_step\)/(?!.*while/body)", c["source"])
  ]
  assert outside and all(c["bytes"] <= 64 for c in outside)
