"""Measures how fast rows get from files to the devices, and who waits for them.

  python -m mdm_jax.benchmarks.input --preset=char --json

The rows are random, in memory-mapped files like those of `data/prepared.py`.
They were just written, so they are in the page cache. The run's own functions
are measured:

input    draw row numbers, read the rows, put them on the devices, wait
steps    updates that all get the same batch, dispatched as a run does
run      updates that each read their own batch, in turn with `steps`
waited   1 - steps / run: the share of a step that reading adds to it; for long
         steps, noise of the machine is larger than this
reading over a step: the time of `input` over that of `steps`, the share that
         would be waited for if reading overlapped with nothing
data_wait  what a run would log as `perf/data_wait` with updates of --step_ms: a
         sleep takes the place of the device, so that this processor is as free
         as beside an accelerator. The rows are read in turn with the updates,
         or ahead of them, as a run does
"""

import dataclasses
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
from absl import flags

from mdm_jax.benchmarks import timing, train_step, workload
from mdm_jax.benchmarks.workload import PRESETS, Preset, Work
from mdm_jax.core import log_lines
from mdm_jax.core.progress import console
from mdm_jax.core.sharding import MeshConfig, make_mesh
from mdm_jax.data.batches import Batch
from mdm_jax.training.read_ahead import read_ahead

_BATCHES = 50  # read per turn
_SECONDS = 1.0  # of updates per turn, about
_MOST_UPDATES = 50


def measure(
  preset: Preset,
  rows: int,
  repeats: int = 5,
  with_steps: bool = True,
  step_seconds: float = 0.02,
) -> dict[str, Any]:
  """Measures rows/s, tokens/s and the share of a step spent waiting for rows.

  Args:
    preset: batch and row length, and the model of the steps.
    rows: number of rows in the files.
    repeats: turns.
    with_steps: whether to time updates as well.
    step_seconds: of the updates that `data_wait` is given for.
  """
  config = workload.make_config(preset)
  with tempfile.TemporaryDirectory() as folder:
    on_disk = workload.on_disk(workload.make_rows(preset, rows), folder)
    data = workload.make_data(preset, on_disk)
    work = workload.make_work(config, data, jax.sharding.get_mesh())
    results = _reading(work, repeats)
    waits = _data_wait(work, repeats, step_seconds)
    if with_steps:
      results |= _steps(work, repeats)
      results["reading_over_step"] = (
        results["batch_seconds"]["median"] / results["step_seconds"]["median"]
      )
  headline = {
    "input: rows/s": results["rows_per_second"],
    "input: tokens/s": results["tokens_per_second"],
    "input: ms a batch": 1e3 * results["batch_seconds"]["median"],
  }
  at = f"at {1e3 * step_seconds:g} ms a step"
  for way, wait in waits.items():
    headline[f"input: data_wait {at}, read {way}"] = wait["median"]
  if with_steps:
    share = results["waited"]["median"]
    headline["input: share of a step waited for"] = share
    headline["input: reading over a step"] = results["reading_over_step"]
  return {
    "facts": timing.facts(),
    "preset": dataclasses.asdict(preset),
    "rows": rows,
    **results,
    "data_wait": {"step_seconds": step_seconds, **waits},
    "headline": headline,
  }


def _reading(work: Work, repeats: int) -> dict[str, Any]:
  trainer = work.trainer
  stage = trainer.curriculum.stages[0]

  def read():
    for update in range(_BATCHES):
      batch = jax.block_until_ready(trainer.batch(stage, update))
    return batch

  seconds = timing.interleave({"input": read}, repeats)["input"]
  times = timing.spread([s / _BATCHES for s in seconds])
  rate = work.config.rows_per_update / times["median"]
  return {
    "batch_seconds": times,
    "rows_per_second": rate,
    "tokens_per_second": rate * work.config.stages[0].length,
  }


def _data_wait(
  work: Work, repeats: int, step_seconds: float
) -> dict[str, dict[str, float]]:
  """Returns the share of sleeping updates that is spent waiting for rows."""
  trainer = work.trainer
  stage = trainer.curriculum.stages[0]
  updates = max(round(_SECONDS / step_seconds), 1)
  shares: dict[str, list[float]] = {"in turn": [], "ahead": []}
  numbers = itertools.count()
  with read_ahead(trainer, range(stage.updates)) as batches:
    ways = {
      "in turn": (lambda: trainer.batch(stage, next(numbers)), lambda: None),
      "ahead": (batches.take, batches.read_next),
    }
    for _ in range(repeats):
      for way, (next_batch, read_next) in ways.items():
        waited, began = 0.0, time.perf_counter()
        for _ in range(updates):
          asked = time.perf_counter()
          next_batch()
          waited += time.perf_counter() - asked
          read_next()
          time.sleep(step_seconds)
        shares[way].append(waited / (time.perf_counter() - began))
  return {way: timing.spread(found) for way, found in shares.items()}


class _Updates:
  """Makes updates one after the other, as a run does."""

  def __init__(self, work: Work):
    self._work, self._state = work, work.trainer.init()
    function = train_step.library_step(work)
    self._step = timing.compiled(function, self._state, work.batch).call
    self._done = 0

  def same_batch(self, updates: int) -> Any:
    """Makes updates that need not wait for rows."""
    return self._advance(updates, lambda: self._work.batch, lambda: None)

  def own_batches(self, updates: int) -> Any:
    """Makes updates whose rows are read ahead, as in a run."""
    numbers = range(self._done, self._done + updates)
    self._done += updates
    with read_ahead(self._work.trainer, numbers) as batches:
      return self._advance(updates, batches.take, batches.read_next)

  def _advance(
    self,
    updates: int,
    next_batch: Callable[[], Batch],
    read_next: Callable[[], None],
  ) -> Any:
    previous = None
    for _ in range(updates):
      self._state, metrics = self._step(self._state, next_batch())
      read_next()
      # As in a run: metrics are fetched once the next update is dispatched.
      jax.device_get(previous)
      previous = metrics
    return self._state


def _steps(work: Work, repeats: int) -> dict[str, Any]:
  """Measures what reading rows adds to updates."""
  work_done = _Updates(work)
  # Turns of about the same length, whatever the model.
  once = timing.interleave({"step": lambda: work_done.same_batch(2)}, 1)
  updates = round(2 * _SECONDS / once["step"][0])
  updates = min(max(updates, 2), _MOST_UPDATES)
  runs = {
    "steps": lambda: work_done.same_batch(updates),
    "run": lambda: work_done.own_batches(updates),
  }
  seconds = timing.interleave(runs, repeats)
  # Ratios within a turn: the load of the machine changes slowly, so it cancels.
  pairs = zip(seconds["steps"], seconds["run"], strict=True)
  waited = [1 - steps / run for steps, run in pairs]
  each = {name: [s / updates for s in seconds[name]] for name in runs}
  return {
    "step_seconds": timing.spread(each["steps"]),
    "run_seconds": timing.spread(each["run"]),
    "updates_a_turn": updates,
    "waited": timing.spread(waited),
  }


def main(_: list[str]) -> None:
  values = flags.FLAGS
  preset = PRESETS[values.preset]
  if values.batch:
    preset = dataclasses.replace(preset, batch=values.batch)
  with jax.set_mesh(make_mesh(MeshConfig())):
    results = measure(
      *(preset, values.rows, values.repeats, values.steps),
      values.step_ms / 1000,
    )
  for name, value in results["headline"].items():
    console.print(f"{name}: {value:,.4g}")
  if values.json:
    print(json.dumps(results))


def _define_flags() -> None:
  flags.DEFINE_enum("preset", "char", list(PRESETS), "Which model and batch.")
  flags.DEFINE_integer("batch", None, "Rows, in place of the preset's.", 1)
  flags.DEFINE_integer("rows", 50_000, "Rows in the files.", 1)
  flags.DEFINE_integer("repeats", 5, "Turns.", 1)
  flags.DEFINE_bool("steps", True, "Time updates that read and that do not.")
  flags.DEFINE_float("step_ms", 20.0, "Of the updates of data_wait.", 0.1)
  flags.DEFINE_bool("json", False, "Print JSON on the last line.")


if __name__ == "__main__":
  _define_flags()
  log_lines.run(main)
