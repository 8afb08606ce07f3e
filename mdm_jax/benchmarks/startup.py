"""Measures how long the program takes to answer, from the start of its process.

  python -m mdm_jax.benchmarks.startup --json
  python -m mdm_jax.benchmarks.startup --workdir=runs/quickstart --json

Whole processes are started in turn:

python      an interpreter that does nothing
help        python -m mdm_jax.main --help
import      an interpreter that imports all that sampling needs
first text  python -m mdm_jax.main --mode=sample --workdir=..., until the first
            text is printed, with every program compiled by an earlier process

Without --workdir an untrained model is made and sampled.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
from absl import flags

from mdm_jax.benchmarks import timing, workload
from mdm_jax.benchmarks.workload import PRESETS, Preset
from mdm_jax.blueprint import make_trainer
from mdm_jax.checkpoints.checkpoint import Checkpoints
from mdm_jax.core import log_lines
from mdm_jax.core.errors import UserError
from mdm_jax.core.progress import console
from mdm_jax.core.sharding import MeshConfig, make_mesh
from mdm_jax.data import tokenizer as tokenizers
from mdm_jax.data.config import TokenizerConfig
from mdm_jax.workdir import Workdir

_PYTHON = (sys.executable,)
_MAIN = (*_PYTHON, "-m", "mdm_jax.main")
_IMPORT = "import mdm_jax.sample"


def measure(workdir: str, repeats: int) -> dict[str, Any]:
  """Measures the seconds of every kind of process.

  Args:
    workdir: a run's folder with a checkpoint.
    repeats: processes of each kind.
  """
  with tempfile.TemporaryDirectory() as cache:
    # An empty compilation cache: the first process fills it, the others find
    # it.
    env = os.environ | {"XDG_CACHE_HOME": cache}
    # It would take precedence over that cache.
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    sample = (*_MAIN, "--mode=sample", f"--workdir={workdir}")
    cold = _first_text(sample, env)
    texts: list[tuple[float, float]] = []
    runs = {
      "python": lambda: _whole((*_PYTHON, "-c", "pass"), env),
      "help": lambda: _whole((*_MAIN, "--help"), env),
      "import": lambda: _whole((*_PYTHON, "-c", _IMPORT), env),
      "sample": lambda: texts.append(_first_text(sample, env)),
    }
    seconds = timing.interleave(runs, repeats)
  first = [first for first, _ in texts[1:]]  # without the warm-up
  return {
    "facts": timing.facts(),
    "seconds": {name: timing.spread(s) for name, s in seconds.items()}
    | {"first_text": timing.spread(first)},
    "cold_first_text_seconds": cold[0],
    "headline": {
      "--help: s": timing.spread(seconds["help"])["median"],
      "sample, to the first text, compiled before: s": timing.spread(first)[
        "median"
      ],
      "sample, to the first text, nothing compiled: s": cold[0],
    },
  }


def _whole(command: tuple[str, ...], env: dict[str, str]) -> None:
  done = subprocess.run(command, env=env, capture_output=True, text=True)
  if done.returncode not in (0, 1):  # absl's --help exits with 1
    raise UserError(f"{' '.join(command)}: {done.stderr}")


def _first_text(
  command: tuple[str, ...], env: dict[str, str]
) -> tuple[float, float]:
  """Returns seconds until the first line of a text, and until the end."""
  began, first = time.perf_counter(), None
  with (
    # Not a pipe: nobody reads it, and a full pipe would block the process.
    tempfile.TemporaryFile("w+") as errors,
    subprocess.Popen(
      command, env=env, stdout=subprocess.PIPE, stderr=errors, text=True
    ) as process,
  ):
    heading = False
    for line in process.stdout:
      if heading and first is None:
        first = time.perf_counter() - began
      heading = heading or "sample 1" in line
    process.wait()
    errors.seek(0)
    if process.returncode or first is None:
      raise UserError(f"{' '.join(command)}: {errors.read()}")
  return first, time.perf_counter() - began


def make_workdir(preset: Preset, folder: str) -> None:
  """Makes a run's folder with a checkpoint of an untrained byte model."""
  config = workload.make_config(preset)
  config = dataclasses.replace(config, tokenizer=TokenizerConfig(kind="byte"))
  tokenizer = tokenizers.build(config.tokenizer, [])
  preset = dataclasses.replace(preset, vocab=sum(map(bool, tokenizer.pieces)))
  data = workload.make_data(preset, workload.make_rows(preset))
  workdir = Workdir(folder)
  workdir.write_config(config, tokenizer.sha256)
  tokenizer.save(folder)
  trainer = make_trainer(config, data, jax.sharding.get_mesh())
  with Checkpoints(folder) as checkpoints:
    progress = {"tokens_seen": 0.0, "wall_seconds": 0.0}
    checkpoints.save(0, trainer.init(), progress)


def _make_in_its_own_process(preset: str, folder: str) -> None:
  """Keeps an accelerator free for the processes that are timed."""
  command = (*_PYTHON, "-m", "mdm_jax.benchmarks.startup")
  done = subprocess.run(
    (*command, f"--preset={preset}", f"--make_only={folder}"),
    capture_output=True,
    text=True,
  )
  if done.returncode:
    raise UserError(done.stderr)


def main(_: list[str]) -> None:
  values = flags.FLAGS
  if values.make_only:
    with jax.set_mesh(make_mesh(MeshConfig())):
      return make_workdir(PRESETS[values.preset], values.make_only)
  with tempfile.TemporaryDirectory() as folder:
    if values.workdir is None:
      _make_in_its_own_process(values.preset, folder)
    results = measure(values.workdir or folder, values.repeats)
  for name, value in results["headline"].items():
    console.print(f"{name}: {value:.2f}")
  if values.json:
    print(json.dumps(results))


def _define_flags() -> None:
  flags.DEFINE_string("workdir", None, "A run's folder (None: untrained).")
  flags.DEFINE_enum("preset", "char", list(PRESETS), "Of the untrained model.")
  flags.DEFINE_string("make_only", None, "Make an untrained run here, and end.")
  flags.DEFINE_integer("repeats", 5, "Processes of each kind.", 1)
  flags.DEFINE_bool("json", False, "Print JSON on the last line.")


if __name__ == "__main__":
  _define_flags()
  log_lines.run(main)
