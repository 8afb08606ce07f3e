"""How fast an update is, beside the machine's ceiling and a plain one.

  python -m mdm_jax.benchmarks.train_step --preset=char --json
  python -m mdm_jax.benchmarks.train_step --preset=gpt2 --against=plain

For every distribution of mask rates, the library's own train step, the plain
one (`plain.py`) and a few matrix products are timed in turn, over and over:

library   corruption, denoiser, loss at masked positions, optimizer, metrics
plain     the same objective with every position's logits, one-hot, AdamW
matmul    the machine's ceiling in the blocks' dtype
mfu       counted FLOP/s (`flops.py`) over the ceiling; the head is counted for
          the positions that go through it, which is what is computed

Memory is XLA's plan of each program. `process_peak_bytes` is the process's
after the library's first update: where there are several rates, only that of
the first is its own.

With --parts also: trunk, head and optimizer, each by itself (`parts.py`).
"""

import dataclasses
import json
import typing
from collections.abc import Sequence
from typing import Any

import jax
from absl import app, flags
from rich import box
from rich.table import Table

from mdm_jax.benchmarks import flops, parts, plain, timing, workload
from mdm_jax.benchmarks.workload import PRESETS, RATES, Preset, Work
from mdm_jax.core.config import MeshConfig, ModelConfig
from mdm_jax.core.progress import console
from mdm_jax.core.sharding import make_mesh
from mdm_jax.model.denoiser import compute_dtype
from mdm_jax.training import step
from mdm_jax.training.state import init_state

_TURN = 0.2  # seconds


class _Stepper:
  """A train step that is called over and over, its state handed on."""

  def __init__(self, program: timing.Program, state: Any, batch: Any):
    self.program, self._state, self._batch = program, state, batch
    self.first_loss: float | None = None

  def __call__(self) -> Any:
    self._state, metrics = self.program.call(self._state, self._batch)
    if self.first_loss is None:
      self.first_loss = float(metrics["loss"])
    return self._state


def library_step(work: Work) -> Any:
  """Returns the jitted update of a run's only stage, as the run has it."""
  trainer = work.trainer
  return step.make_train_step(
    trainer.config,
    trainer.curriculum.stages[0],
    trainer.denoiser,
    trainer.optimizer,
    trainer.schedule,
    work.mask_id,
  )


def plain_step(work: Work) -> tuple[Any, Any]:
  """Returns the plain update and its optimizer."""
  trainer = work.trainer
  optimizer = plain.make_optimizer(trainer.schedule)
  function = plain.make_train_step(
    trainer.denoiser, optimizer, trainer.schedule, work.rates, work.mask_id
  )
  return function, optimizer


def measure(
  preset: Preset,
  rates: Sequence[str] = ("uniform", "stage_3"),
  against: str = "none",
  repeats: int = 10,
  with_parts: bool = False,
) -> dict[str, Any]:
  """Returns all numbers, for every distribution of mask rates.

  Args:
    preset: model and batch.
    rates: names in `workload.RATES`.
    against: `plain` to time the plain implementation in the same turns.
    repeats: turns.
    with_parts: whether to time what a step is made of, too.
  """
  results = {
    "facts": timing.facts(),
    "preset": dataclasses.asdict(preset),
    "rates": {
      name: _measure(preset, name, against, repeats, with_parts)
      for name in rates
    },
  }
  return results | {"headline": _headline(results)}


def _measure(
  preset: Preset, rates: str, against: str, repeats: int, with_parts: bool
) -> dict[str, Any]:
  config = workload.make_config(preset, rates)
  data = workload.make_data(preset, workload.make_rows(preset))
  mesh = jax.sharding.get_mesh()
  work = workload.make_work(config, data, mesh)
  steppers = {"library": _library(work)}
  jax.block_until_ready(steppers["library"]())
  peak = timing.process_peak_bytes()  # before there is anything else
  if against == "plain":
    steppers["plain"] = _plain(work)
  dtype = compute_dtype(config.model)
  products = timing.matmuls(dtype)
  pieces = parts.make_parts(work, against) if with_parts else {}
  runs = {
    **steppers,
    **{name: product.run for name, product in products.items()},
    **pieces,
  }
  seconds = timing.interleave(runs, repeats, _TURN)
  ceiling = timing.ceiling(products, seconds)
  ceiling |= {"dtype": str(dtype), "devices": mesh.size}
  result = {
    "ceiling": ceiling,
    "tokens": work.tokens,
    "head_positions": work.head_positions,
    "process_peak_bytes": peak,
    "parts": {name: timing.spread(seconds[name]) for name in pieces},
  }
  for name, stepper in steppers.items():
    positions = work.head_positions if name == "library" else work.tokens
    result[name] = _numbers(work, stepper, seconds[name], positions, ceiling)
  if against == "plain":
    result["plain_over_library"] = (
      result["plain"]["seconds"]["median"]
      / result["library"]["seconds"]["median"]
    )
  return result


def _library(work: Work) -> _Stepper:
  state = work.trainer.init()
  program = timing.compiled(library_step(work), state, work.batch)
  return _Stepper(program, state, work.batch)


def _plain(work: Work) -> _Stepper:
  function, optimizer = plain_step(work)
  key = jax.random.key(0)
  state = init_state(work.trainer.denoiser, optimizer, key)
  program = timing.compiled(function, state, work.batch)
  return _Stepper(program, state, work.batch)


def _numbers(
  work: Work,
  stepper: _Stepper,
  seconds: list[float],
  positions: int,
  ceiling: dict[str, Any],
) -> dict[str, Any]:
  config = work.config
  count = flops.update_flops(
    config.model,
    config.rows_per_update,
    config.stages[0].length,
    positions,
    work.trainer.denoiser.vocab_size,
  )
  times = timing.spread(seconds)
  achieved = count / times["median"]
  highest = ceiling["flops_per_second"] * ceiling["devices"]
  return {
    "seconds": times,
    "tokens_per_second": work.tokens / times["median"],
    "flops": count,
    "flops_per_second": achieved,
    "mfu": achieved / highest,
    "first_loss": stepper.first_loss,
    **stepper.program.facts(),
  }


def _headline(results: dict[str, Any]) -> dict[str, float]:
  lines = {}
  for rates, measured in results["rates"].items():
    for name in ("library", "plain"):
      if name not in measured:
        continue
      numbers = measured[name]
      lines |= {
        f"{rates}, {name}: tokens/s": numbers["tokens_per_second"],
        f"{rates}, {name}: ms a step": 1e3 * numbers["seconds"]["median"],
        f"{rates}, {name}: mfu": numbers["mfu"],
        f"{rates}, {name}: MiB temporary": numbers["temporary_bytes"] / 2**20,
        f"{rates}, {name}: s to compile": numbers["compile_seconds"],
      }
    if "plain_over_library" in measured:
      ratio = measured["plain_over_library"]
      lines[f"{rates}: times as fast as plain"] = ratio
    ceiling = measured["ceiling"]["flops_per_second"]
    lines[f"{rates}: ceiling, GFLOP/s a device"] = ceiling / 1e9
  return lines


# MARK: printing


def _show(name: str, results: dict[str, Any]) -> None:
  for rates, measured in results["rates"].items():
    ceiling = measured["ceiling"]
    title = (
      f"{name}, {rates} rates, {results['facts']['device']},"
      f" ceiling {ceiling['flops_per_second'] / 1e9:,.0f} GFLOP/s"
    )
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    columns = "ms a step", "quartiles", "tokens/s", "mfu", "temp MiB", "compile"
    for column in columns:
      table.add_column(column, justify="right")
    for way in ("library", "plain"):
      if way in measured:
        table.add_row(way, *_cells(measured[way]))
    for part, times in measured["parts"].items():
      table.add_row(part, *_times(times))
    console.print(table)
    if "plain_over_library" in measured:
      ratio = measured["plain_over_library"]
      console.print(f"{ratio:.2f} times as fast as plain")


def _times(times: dict[str, float]) -> tuple[str, str]:
  low, high = 1e3 * times["low"], 1e3 * times["high"]
  return f"{1e3 * times['median']:.1f}", f"{low:.1f} - {high:.1f}"


def _cells(numbers: dict[str, Any]) -> tuple[str, ...]:
  return (
    *_times(numbers["seconds"]),
    f"{numbers['tokens_per_second']:,.0f}",
    f"{numbers['mfu']:.1%}",
    f"{numbers['temporary_bytes'] / 2**20:.0f}",
    f"{numbers['lower_seconds'] + numbers['compile_seconds']:.1f} s",
  )


def main(_: list[str]) -> None:
  values = flags.FLAGS
  # Compile times are of compiling, not of finding a compiled program.
  jax.config.update("jax_enable_compilation_cache", False)
  preset = PRESETS[values.preset]
  for name in ("batch", "dtype", "attention", "remat"):
    if values[name].value is not None:
      preset = dataclasses.replace(preset, **{name: values[name].value})
  with jax.set_mesh(make_mesh(MeshConfig())):
    results = measure(
      preset, values.rates, values.against, values.repeats, values.parts
    )
  _show(values.preset, results)
  if values.json:
    print(json.dumps(results))


def _define_flags() -> None:
  flags.DEFINE_enum("preset", "char", list(PRESETS), "Which model and batch.")
  flags.DEFINE_multi_enum(
    "rates", ["uniform", "stage_3"], list(RATES), "Which mask rates."
  )
  flags.DEFINE_enum(
    "against", "none", ["none", "plain"], "What to compare with."
  )
  flags.DEFINE_integer("repeats", 10, "Turns.", 1)
  flags.DEFINE_bool("parts", False, "Time what a step is made of, too.")
  flags.DEFINE_integer("batch", None, "Rows, in place of the preset's.", 1)
  for name in ("dtype", "attention", "remat"):
    choices = typing.get_args(typing.get_type_hints(ModelConfig)[name])
    flags.DEFINE_enum(name, None, choices, f"In place of the preset's {name}.")
  flags.DEFINE_bool("json", False, "Print JSON on the last line.")


if __name__ == "__main__":
  _define_flags()
  app.run(main)
