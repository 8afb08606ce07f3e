"""Eight fake devices, strict promotion, and a compilation cache."""

import gc
import importlib.metadata
import os
import signal

# Before jax starts: with two cores, unsynchronised steps on several fake
# devices deadlock unless the thread pool is larger than the core count.
os.environ["NPROC"] = "16"
# Tiny programs: compiling them costs more than running them. The newer way to
# compile fusions on CPUs takes longest. Not every jaxlib has such flags: XLA
# ends a process over one that it does not know.
os.environ["XLA_FLAGS"] = (
  "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
# Splitting a program to compile its parts in parallel costs more than it saves.
if importlib.metadata.version("jaxlib").startswith("0.10."):
  os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
  os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"

import hypothesis
import jax
import pytest
from absl import flags
from mesh_harness import MESHES, make_mesh

from mdm_jax.config import Config
from mdm_jax.evaluation.config import EvalConfig
from mdm_jax.model.config import ModelConfig

# A shell's background job ignores SIGINT, and so would all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tracing makes many objects that stay: to look through them all the time took
# a fifth of the suite.
gc.set_threshold(50_000, 20, 100)

# On a busy machine an example may take longer than the 200 ms of the default.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

CACHE = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update(
  "jax_compilation_cache_dir",
  os.path.join(CACHE, "mdm_jax", "xla_tests"),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

# Files whose tests take longest come first: one that started last would run
# alone, while the other process has nothing to do.
LONGEST = (
  *("quickstart_test", "remote_run_test", "multiprocess_faults_test"),
  *("faults_test", "scripts_test", "main_test", "evaluate_test"),
  *("multiprocess_test", "step_test", "openness_test", "sample_test"),
  *("fit_test", "signals_test", "watchdog_test", "incident_test"),
)


def pytest_collection_modifyitems(items):
  """Sorts the files, each with its tests in their order."""
  rank = {name: i for i, name in enumerate(LONGEST)}
  items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_collection_finish():
  """What was imported stays: the garbage collector need not look at it."""
  gc.freeze()


@pytest.fixture(autouse=True)
def no_config_flag():
  """Takes the flags of a parsed config away, so that the next test can parse.

  Parsing defines them, once in a process; all others are defined on import.
  """
  yield
  for name in set(flags.FLAGS):
    if name.partition(".")[0] == "config":
      delattr(flags.FLAGS, name)


@pytest.fixture
def mesh():
  """One device, as the current mesh."""
  mesh = make_mesh("1x1")
  with jax.set_mesh(mesh):
    yield mesh


@pytest.fixture(params=list(MESHES))
def any_mesh(request):
  """One device, then eight, as the current mesh."""
  mesh = make_mesh(request.param)
  with jax.set_mesh(mesh):
    yield mesh


@pytest.fixture
def tiny_model() -> ModelConfig:
  """A denoiser that compiles fast."""
  return ModelConfig(num_layers=2, embed_dim=16, num_heads=2)


@pytest.fixture
def tiny_config(tiny_model) -> Config:
  """A config around the tiny denoiser."""
  return Config(model=tiny_model, eval=EvalConfig(batch_size=8))
