"""What a run spends beside its train step, and how long saving blocks it.

  python -m mdm_jax.benchmarks.loop --preset=char --json

The loop is the run's own (`train.py`): batches from files, numbers read and
logged, metrics.jsonl and TensorBoard, the progress line, checkpoints. Only the
train step is another: a program that sleeps, so that the time of a step is
known and the processor is as free as beside an accelerator. On a CPU the caller
waits for such a program, so nothing of the loop hides behind it: what is
measured there is the most that a loop can cost.

bare       the sleeping step alone, called over and over
loop       the run's loop around it
saving     the same, with one checkpoint in every turn
overhead   loop / bare - 1
lost       the seconds that a checkpoint adds to a run: saving - loop
blocked    the seconds `Checkpoints.save` takes, over those until it is written

On a CPU nothing is copied while `save` blocks: the arrays are written from
where they lie. The next update can't overwrite them and takes new memory for
the whole state, so that a run loses more than what it is blocked. How often is
up to `--updates`; a run's own `train.checkpoint_every` is 500 by default.
"""

import contextlib
import dataclasses
import json
import statistics
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from mdm_jax import train
from mdm_jax.benchmarks import timing, workload
from mdm_jax.benchmarks.workload import PRESETS, Preset
from mdm_jax.blueprint import make_trainer
from mdm_jax.checkpoints.checkpoint import Checkpoints
from mdm_jax.config import Config
from mdm_jax.core import log_lines
from mdm_jax.core.progress import console
from mdm_jax.core.sharding import MeshConfig, make_mesh
from mdm_jax.data.prepared import PreparedData
from mdm_jax.resume import Origin
from mdm_jax.runtime.session import Session
from mdm_jax.start import Run
from mdm_jax.training.curriculum import StagePlan
from mdm_jax.training.state import TrainState
from mdm_jax.training.step import TrainStep
from mdm_jax.training.trainer import Trainer
from mdm_jax.workdir import Workdir

_METRICS = (
  *("loss", "tokens", "param_norm", "update_norm", "skipped"),
  *("grad_norm", "learning_rate"),
)
_ROWS = 50_000


class _Sleeping(Trainer):
  """A trainer whose step takes a given time and changes nothing."""

  def __init__(
    self, config: Config, data: PreparedData, mesh: Any, seconds: float
  ):
    super().__init__(make_trainer(config, data, mesh), data, mesh)
    self.config = config
    self.sleeping = _sleeping_step(seconds)

  def step(self, stage: StagePlan) -> TrainStep:
    """Returns what every stage does."""
    return self.sleeping


def _sleeping_step(seconds: float) -> Any:
  def sleep(number):
    time.sleep(seconds)
    return np.float32(number)

  @jax.jit(donate_argnums=0)
  def step(state: TrainState, batch: Any):
    shape = jax.ShapeDtypeStruct((), jnp.float32)
    slept = jax.pure_callback(sleep, shape, state.step)
    value = 0.0 * slept + 0.0 * batch.tokens[0, 0, 0].astype(jnp.float32)
    # The next step waits for this one, as a real one does.
    later = state.step + 1 + value.astype(jnp.int32)
    new = dataclasses.replace(state, step=later)
    return new, {name: value for name in _METRICS}

  return step


def measure(
  preset: Preset, updates: int, repeats: int, step_seconds: float = 0.05
) -> dict[str, Any]:
  """Returns the loop's overhead and a checkpoint's seconds.

  Args:
    preset: the model that is saved, and the batch that is read.
    updates: of a turn, and between checkpoints where they are saved.
    repeats: turns.
    step_seconds: of the sleeping step.
  """
  with tempfile.TemporaryDirectory() as folder:
    rows = workload.on_disk(workload.make_rows(preset, _ROWS), folder)
    data = workload.make_data(preset, rows)
    loops = _overhead(preset, data, updates, repeats, step_seconds)
    saves = _saves(preset, data, repeats)
  return {
    "facts": timing.facts(),
    "preset": dataclasses.asdict(preset),
    "updates": updates,
    "step_seconds": step_seconds,
    **loops,
    "checkpoint": saves,
    "headline": {
      f"loop: overhead at {1e3 * step_seconds:g} ms a step": loops["overhead"],
      f"loop: the same, a checkpoint every {updates} updates": loops[
        "overhead_saving"
      ],
      "loop: s lost to a checkpoint": loops["lost_seconds"]["median"],
      "checkpoint: MiB": saves["bytes"] / 2**20,
      "checkpoint: s blocked": saves["blocked_seconds"]["median"],
      "checkpoint: s until written": saves["written_seconds"]["median"],
      "checkpoint: share blocked": saves["blocked"],
    },
  }


def _overhead(
  preset: Preset,
  data: PreparedData,
  updates: int,
  repeats: int,
  step_seconds: float,
) -> dict[str, Any]:
  mesh = jax.sharding.get_mesh()
  never = workload.make_config(preset)
  saving = workload.make_config(preset, checkpoint_every=updates)
  trainer = _Sleeping(never, data, mesh, step_seconds)
  batch = trainer.batch(trainer.curriculum.stages[0], 0)
  state = trainer.init()

  def bare():
    nonlocal state
    for _ in range(updates):
      state, metrics = trainer.sleeping(state, batch)
    return metrics

  with contextlib.ExitStack() as stack:
    runs = {"bare": bare}
    for name, config in (("loop", never), ("saving", saving)):
      turn = _Turn(_Sleeping(config, data, mesh, step_seconds), updates)
      runs[name] = stack.enter_context(turn)
    seconds = timing.interleave(runs, repeats)
  each = {name: [s / updates for s in seconds[name]] for name in runs}
  # Turn by turn: what else the machine does changes slowly.
  pairs = lambda a, b: zip(seconds[a], seconds[b], strict=True)
  over = lambda name: statistics.median(
    loop / bare - 1 for loop, bare in pairs(name, "bare")
  )
  lost = [saving - loop for saving, loop in pairs("saving", "loop")]
  return {
    "update_seconds": {name: timing.spread(each[name]) for name in runs},
    "overhead": over("loop"),
    "overhead_saving": over("saving"),
    "lost_seconds": timing.spread(lost),
  }


class _Turn:
  """The run's loop, some updates further every time it is called."""

  def __init__(self, trainer: _Sleeping, updates: int):
    self._trainer, self._updates = trainer, updates
    self._stack = contextlib.ExitStack()

  def __enter__(self) -> "_Turn":
    enter = self._stack.enter_context
    self.workdir = Workdir(enter(tempfile.TemporaryDirectory()))
    keep = self._trainer.config.train.keep_latest
    self.checkpoints = enter(Checkpoints(self.workdir.path, keep))
    session = enter(Session(self.workdir.path))
    run = Run(
      *(self._trainer.config, self._trainer, self.workdir),
      *(self.checkpoints, session, Origin()),
    )
    self._hooks = enter(run.subscribed())
    self.state = self._trainer.init()
    # A checkpoint then falls into the middle of a turn, and is written in it.
    self._until = self._updates // 2
    return self

  def __exit__(self, *_: Any) -> None:
    self._stack.close()

  def __call__(self) -> None:
    self._until += self._updates
    self.state = train.train(
      self._trainer, self.state, self._until, *self._hooks
    )


def _saves(preset: Preset, data: PreparedData, repeats: int) -> dict[str, Any]:
  """Times saves of a state, each waited for before the next."""
  config = workload.make_config(preset)
  trainer = make_trainer(config, data, jax.sharding.get_mesh())
  state = jax.block_until_ready(trainer.init())
  blocked, written = [], []
  with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as saver:
    for number in range(repeats + 1):
      progress = {"tokens_seen": 0.0, "wall_seconds": 0.0}
      began = time.perf_counter()
      saver.save(number, state, progress)
      returned = time.perf_counter()
      saver.wait()  # until all is on disk and hashed
      if number:  # the first makes folders and threads
        blocked.append(returned - began)
        written.append(time.perf_counter() - began)
  pairs = zip(blocked, written, strict=True)
  return {
    "bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
    "blocked_seconds": timing.spread(blocked),
    "written_seconds": timing.spread(written),
    "blocked": statistics.median(b / w for b, w in pairs),
  }


def main(_: list[str]) -> None:
  values = flags.FLAGS
  with jax.set_mesh(make_mesh(MeshConfig())):
    results = measure(
      PRESETS[values.preset],
      values.updates,
      values.repeats,
      values.step_ms / 1000,
    )
  for name, value in results["headline"].items():
    console.print(f"{name}: {value:.4f}")
  if values.json:
    print(json.dumps(results))


def _define_flags() -> None:
  flags.DEFINE_enum("preset", "char", list(PRESETS), "Which model and batch.")
  flags.DEFINE_integer("updates", 200, "Of a turn.", 1)
  flags.DEFINE_integer("repeats", 3, "Turns.", 1)
  flags.DEFINE_float("step_ms", 50.0, "Milliseconds that a step sleeps.", 0.0)
  flags.DEFINE_bool("json", False, "Print JSON on the last line.")


if __name__ == "__main__":
  _define_flags()
  log_lines.run(main)
