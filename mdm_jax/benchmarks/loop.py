"""Measures the training loop's overhead, and how long a checkpoint blocks it.

  python -m mdm_jax.benchmarks.loop --preset=char --json

The loop is the run's own (`training_loop.py`), with batches from files, the
log, metrics.jsonl and TensorBoard, the progress line and checkpoints. Only the
train step is replaced, by a program that sleeps: so the time of a step is
known, and the processor is as free as beside an accelerator. On a CPU the
caller waits for such a program and nothing overlaps with it, so the result is
an upper bound of the loop's cost.

bare       the sleeping step alone, called over and over
loop       the run's loop around it
saving     the same, with one checkpoint in every turn
overhead   loop / bare - 1
data_wait  share of the loop's time in which it waits for rows
lost       seconds that a checkpoint adds to a run: saving - loop
blocked    seconds in `Checkpoints.save`, over seconds until all is written

On a CPU `save` copies nothing: arrays are written from where they are. The next
update can't reuse that memory and allocates a new state, so a run loses more
time than it is blocked. `--updates` sets how often a checkpoint is saved; a
run's own `train.checkpoint_every` is 500 by default.
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

from mdm_jax import training_loop
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
from mdm_jax.runtime.goodput import Cause
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
    """Returns the sleeping step, the same for all stages."""
    return self.sleeping


def _sleeping_step(seconds: float) -> Any:
  def sleep(number):
    time.sleep(seconds)
    return np.float32(number)

  @jax.jit(donate_argnums=0)
  def step(state: TrainState, batch: Any, base: Any = None):
    shape = jax.ShapeDtypeStruct((), jnp.float32)
    slept = jax.pure_callback(sleep, shape, state.step)
    # Uses the batch as well, so that the step waits for its rows.
    value = 0.0 * slept + 0.0 * batch.tokens[0, 0, 0].astype(jnp.float32)
    # Depends on the result, so that the next step waits for this one.
    later = state.step + 1 + value.astype(jnp.int32)
    new = dataclasses.replace(state, step=later)
    return new, {name: value for name in _METRICS}

  return step


def measure(
  preset: Preset, updates: int, repeats: int, step_seconds: float = 0.05
) -> dict[str, Any]:
  """Measures the loop's overhead and the seconds that a checkpoint takes.

  Args:
    preset: the model that is saved, and the batch that is read.
    updates: updates per turn; with checkpoints, one per as many updates.
    repeats: turns.
    step_seconds: how long the step sleeps.
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
      "loop: data_wait": loops["data_wait"]["median"],
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
  # Without the first call, which also compiles.
  waits = runs["loop"].data_waits[-repeats:]
  each = {name: [s / updates for s in seconds[name]] for name in runs}
  # Ratios within a turn: the load of the machine changes slowly, so it cancels.
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
    "data_wait": timing.spread(waits),
  }


class _Turn:
  """The run's loop; every call continues it by some updates."""

  def __init__(self, trainer: _Sleeping, updates: int):
    self._trainer, self._updates = trainer, updates
    self._stack = contextlib.ExitStack()
    self.data_waits: list[float] = []  # of each call

  def __enter__(self) -> "_Turn":
    enter = self._stack.enter_context
    self.workdir = Workdir(enter(tempfile.TemporaryDirectory()))
    keep = self._trainer.config.train.keep_latest
    self.checkpoints = enter(Checkpoints(self.workdir.path, keep))
    session = enter(Session(self.workdir.path))
    self._ledger = session.attempt.ledger
    run = Run(
      *(self._trainer.config, self._trainer, self.workdir),
      *(self.checkpoints, session, Origin()),
    )
    self._hooks = enter(run.subscribed())
    self.state = self._trainer.init()
    # So a checkpoint falls into the middle of a turn, and is written within it.
    self._until = self._updates // 2
    return self

  def __exit__(self, *_: Any) -> None:
    self._stack.close()

  def __call__(self) -> None:
    self._until += self._updates
    before, began = self._ledger.seconds(), time.perf_counter()
    self.state = training_loop.train(
      self._trainer, self.state, self._until, *self._hooks
    )
    waited = self._ledger.seconds()[Cause.DATA] - before[Cause.DATA]
    self.data_waits.append(waited / (time.perf_counter() - began))


def _saves(preset: Preset, data: PreparedData, repeats: int) -> dict[str, Any]:
  """Times saves of a state, waiting for each before the next."""
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
      if number:  # the first one also makes folders and threads
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
