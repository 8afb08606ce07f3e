"""Several processes on this machine that join each other, and what they run.

The children are Python programs with fake devices each; all that they print is
kept, and none outlives its block.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

from paths import ROOT, TESTS

TIMEOUT = 120.0  # seconds, of a machine that is busy with something else
_POLL = 0.05
_UPDATES = 4
_PRESET = 2, 32, 4, 27, 16, 8  # see `workload.Preset`


@dataclasses.dataclass
class Child:
  """One process, and the file of what it prints."""

  process: subprocess.Popen
  path: pathlib.Path

  @property
  def output(self) -> str:
    """What it has printed so far, errors too."""
    return self.path.read_text(errors="replace")

  @property
  def result(self) -> Any:
    """The last line that it printed and that is JSON."""
    for line in reversed(self.output.splitlines()):
      with contextlib.suppress(ValueError):
        return json.loads(line)
    raise AssertionError(f"no result:\n{self.output}")

  def wait(self, timeout: float = TIMEOUT) -> int:
    """Returns the exit code."""
    try:
      return self.process.wait(timeout)
    except subprocess.TimeoutExpired as error:
      raise AssertionError(f"still running:\n{self.output}") from error

  def wait_for(self, text: str, timeout: float = TIMEOUT) -> None:
    """Waits until it has printed a text."""
    until = time.monotonic() + timeout
    while text not in self.output:
      alive = self.process.poll() is None and time.monotonic() < until
      assert alive, f"no {text!r} in:\n{self.output}"
      time.sleep(_POLL)

  def end(self) -> None:
    """Kills what is left of it, stopped or not."""
    if self.process.poll() is None:
      self.process.send_signal(signal.SIGKILL)
      self.process.wait()


def free_port() -> int:
  """Returns a port of this machine that nobody listens at."""
  with socket.socket() as listener:
    listener.bind(("localhost", 0))
    return listener.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
  """Returns conftest.py's environment, with so many fake devices."""
  cache = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
  return os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(devices),
    "JAX_COMPILATION_CACHE_DIR": os.path.join(cache, "mdm_jax", "xla_tests"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "PYTHONPATH": os.pathsep.join([str(TESTS), str(ROOT)]),
    "PYTHONUNBUFFERED": "1",
  }


@contextlib.contextmanager
def running(
  commands: Sequence[Sequence[str]], devices: int = 1
) -> Iterator[list[Child]]:
  """Starts every command, and kills what is left of them in the end."""
  with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
    children = []
    for i, command in enumerate(commands):
      path = pathlib.Path(folder) / f"{i}.txt"
      file = stack.enter_context(path.open("w"))
      process = subprocess.Popen(
        command,
        stdout=file,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env=environment(devices),
        cwd=ROOT,
        preexec_fn=_hear_sigint,
      )
      children.append(Child(process, path))
      stack.callback(children[-1].end)
    yield children


def _hear_sigint() -> None:
  """Undoes what a shell does to what it starts in the background.

  A script that finds SIGINT ignored can't ask for it any more.
  """
  signal.signal(signal.SIGINT, signal.SIG_DFL)


def python(script: str, count: int) -> list[list[str]]:
  """Returns commands that run a script with address, count and own number."""
  address = f"localhost:{free_port()}"
  return [
    [sys.executable, "-c", script, address, str(count), str(i)]
    for i in range(count)
  ]


# MARK: what they do


def join(**settings: Any) -> int:
  """Joins the others by the arguments of `python`; returns the own number."""
  from mdm_jax.core import distributed

  address, number, own = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
  distributed.initialize(address, number, own, **settings)
  return own


def sha256(*arrays: Any) -> str:
  """Returns a hash of arrays' values and shapes."""
  told = hashlib.sha256()
  for array in arrays:
    told.update(str((array.shape, array.dtype)).encode())
    told.update(array.tobytes())
  return told.hexdigest()


def measure(mesh: Any) -> dict[str, Any]:
  """Returns what must not depend on how many devices or processes there are."""
  import jax

  with jax.set_mesh(mesh):
    trainer = _trainer(mesh)
    state, losses = trainer.init(), []
    for update in range(_UPDATES):
      state, metrics = trainer.update(state, update)
      losses.append(float(metrics["loss"]))
    result = measure_data(mesh) | {"losses": losses}
    return result | _use(trainer, state.params)


def measure_data(mesh: Any) -> dict[str, Any]:
  """Returns hashes of every update's tokens and masks, and the own rows."""
  import jax

  from mdm_jax.core import distributed
  from mdm_jax.objectives.draws import Draws

  trainer = _trainer(mesh)
  stage = trainer.curriculum.stages[0]
  found: dict[str, Any] = {"tokens": [], "masks": []}
  with jax.set_mesh(mesh):
    objective, plan = trainer.objective(stage), trainer.plan(stage)

    @jax.jit
    def pose(step, batch):
      padded = batch.tokens.shape[1]
      draws = Draws(trainer.seed, step, plan, padded)
      return objective.examples(batch, draws)

    for update in range(_UPDATES):
      batch = trainer.batch(stage, update)
      made = pose(update, batch)
      rate = made.context.condition
      whole = distributed.fetch([batch, made.asked, made.tokens, rate])
      found["tokens"].append(sha256(whole[0].tokens, whole[0].segments))
      found["masks"].append(sha256(*whole[1:]))
  held = {s.index[1].indices(8)[:2] for s in batch.tokens.addressable_shards}
  return found | {"own_rows": sorted(held)}


def _use(trainer: Any, params: Any) -> dict[str, Any]:
  from mdm_jax.evaluation.evaluator import Evaluator
  from mdm_jax.planning import calibration

  objective = trainer.objective(trainer.curriculum.stages[-1])
  held = trainer.data.validation.subset(5)
  evaluator = Evaluator(
    _config().eval, objective, trainer.denoiser, trainer.mesh
  )
  measured = evaluator.measure(params, held).head()
  return {
    "likelihood": [measured.value, measured.error],
    "samples": _samples(trainer, params),
    "update_seconds": calibration.update_seconds(trainer)[0],
  }


def _trainer(mesh: Any) -> Any:
  from mdm_jax.benchmarks import workload
  from mdm_jax.blueprint import make_trainer

  preset = workload.Preset(*_PRESET)
  data = workload.make_data(preset, workload.make_rows(preset, count=30))
  return make_trainer(_config(), data, mesh)


def _config() -> Any:
  from mdm_jax.benchmarks import workload
  from mdm_jax.training.config import OptimizerConfig

  config = workload.make_config(workload.Preset(*_PRESET))
  return dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, dropout=0.1),
    optimizer=OptimizerConfig(warmup_steps=1, accumulation=2),
  )


def _samples(trainer: Any, params: Any) -> dict[str, Any]:
  from mdm_jax.sampling.config import SampleConfig
  from mdm_jax.sampling.generate import TextSampler

  sampler = TextSampler(
    trainer.denoiser, trainer.data.tokenizer, trainer.mesh, 16
  )
  config = SampleConfig(num_steps=4, temperature_range=None)
  drawn = sampler(params, ["1 2 3"] * 3, config)
  return {
    "texts": drawn.texts,
    "path": sha256(drawn.path),
    "shape": list(drawn.path.shape),
    "step": drawn.step.tolist(),
  }
