"""Measures an update's speed, against the machine's ceiling and other steps.

  python -m mdm_jax.benchmarks.train_step --preset=char --json
  python -m mdm_jax.benchmarks.train_step --preset=gpt2 --against=plain
  python -m mdm_jax.benchmarks.train_step --preset=char --against=md4

For every distribution of mask rates, the library's own train step, a step to
compare with and a few matrix products are timed in turn, over and over:

library   corruption, denoiser, loss at masked positions, optimizer, metrics
plain     the same blocks and objective with every position's logits, one-hot,
          AdamW (`plain.py`)
md4       MD4's own blocks too, in float32 whatever the preset says (`md4.py`)
torch     MDLM's model and step in PyTorch, compiled, in a process of its own
          (`torch_mdlm.py`); its rates are uniform, which its work does not
          depend on
matmul    the machine's ceiling in the blocks' dtype
mfu       counted FLOP/s (`model/flops.py`) over the ceiling; for the head, the
          positions that each step computes are counted

A speed-up is the median of the ratios within each turn, where the two steps are
timed one right after the other. Most presets have no dropout; --dropout turns
it on in the library's, MD4's and MDLM's blocks, never in the plain step.

Memory is XLA's plan for each program; for PyTorch, what its allocator counted.
`process_peak_bytes` is read after the library's first update; with several
rates, only the first one's excludes what came before.

--parts also times trunk, head and optimizer alone (`parts.py`).
"""

import contextlib
import dataclasses
import json
import os
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import flags
from rich import box
from rich.table import Table

from mdm_jax.benchmarks import md4, parts, plain, timing, torch_mdlm, workload
from mdm_jax.benchmarks.workload import PRESETS, RATES, Preset, Work
from mdm_jax.config import Config
from mdm_jax.core import log_lines
from mdm_jax.core.errors import Failure
from mdm_jax.core.progress import console
from mdm_jax.core.sharding import MeshConfig, make_mesh
from mdm_jax.model import flops
from mdm_jax.model.config import ModelConfig
from mdm_jax.model.denoiser import compute_dtype
from mdm_jax.model.kernels import KERNELS
from mdm_jax.training.state import TrainState, initial_state

_TURN = 0.2  # seconds
_MEMORY = {"temporary_bytes": "temporary", "peak_bytes": "peak"}


@dataclasses.dataclass(frozen=True)
class Way:
  """A train step to time.

  Attributes:
    step: the jitted update.
    init: returns a fresh state.
    head_positions: positions per update that go through the head.
    vocab_size: the number of logits of each.
  """

  step: Any
  init: Callable[[], TrainState]
  head_positions: int
  vocab_size: int


class _Stepper:
  """A train step that is called over and over, on the state it returned.

  Attributes:
    flops: of an update.
  """

  def __init__(self, way: Way, work: Work):
    self._state, self._batch = way.init(), work.batch
    self._program = timing.compiled(way.step, self._state, self._batch)
    self._first_loss: float | None = None
    self.flops = flops.update_flops(
      work.config.model,
      work.config.rows_per_update,
      work.reads,
      way.head_positions,
      way.vocab_size,
    )

  def __call__(self) -> Any:
    self._state, metrics = self._program.call(self._state, self._batch)
    if self._first_loss is None:
      self._first_loss = float(metrics["loss"])
    return self._state

  @property
  def facts(self) -> dict[str, Any]:
    """The loss of the first update, and what compiling it took."""
    return {"first_loss": self._first_loss, **self._program.facts()}


def library_step(work: Work) -> Any:
  """Returns the jitted update of a run's first stage, as the run has it."""
  trainer = work.trainer
  return trainer.step(trainer.curriculum.stages[0])


def _library(work: Work) -> Way:
  trainer = work.trainer
  vocab_size = trainer.denoiser.vocab.size
  return Way(library_step(work), trainer.init, work.head_positions, vocab_size)


def _plain(work: Work) -> Way:
  trainer = work.trainer
  denoiser, schedule = trainer.denoiser, trainer.schedule
  optimizer = plain.make_optimizer(schedule)
  update = plain.make_train_step(
    denoiser, optimizer, schedule, work.rates, work.mask_id
  )
  init = jax.jit(
    lambda: initial_state(denoiser.init(jax.random.key(0)), optimizer)
  )
  return Way(update, init, work.tokens, denoiser.vocab.size)


def _md4(work: Work) -> Way:
  model, schedule = work.config.model, work.trainer.schedule
  vocab_size = work.trainer.denoiser.vocab.predictable
  optimizer = plain.make_optimizer(schedule)
  update = md4.make_train_step(model, optimizer, schedule, work.rates)
  fresh = jax.jit(lambda: md4.init(jax.random.key(0), model, vocab_size))
  init = jax.jit(lambda: initial_state(fresh(), optimizer))
  return Way(update, init, work.tokens, vocab_size)


WAYS: dict[str, Callable[[Work], Way]] = {
  "library": _library,
  "plain": _plain,
  "md4": _md4,
}
_TORCH = "torch"
OTHERS = [*(name for name in WAYS if name != "library"), _TORCH]


def measure(
  preset: Preset,
  rates: Sequence[str] = ("uniform", "stage_3"),
  against: str = "none",
  repeats: int = 10,
  with_parts: bool = False,
) -> dict[str, Any]:
  """Measures everything, for every distribution of mask rates.

  Args:
    preset: the model and the batch.
    rates: names in `workload.RATES`.
    against: name in `OTHERS` to time in the same turns, or `none`.
    repeats: turns.
    with_parts: whether to time the parts of a step as well.
  """
  results = {
    "facts": timing.facts(),
    "preset": dataclasses.asdict(preset),
    "rates": {
      name: _measure(
        *(preset, workload.make_config(preset, name)),
        *(against, repeats, with_parts),
      )
      for name in rates
    },
  }
  return results | {"headline": _headline(results)}


def _measure(
  preset: Preset, config: Config, against: str, repeats: int, with_parts: bool
) -> dict[str, Any]:
  data = workload.make_data(preset, workload.make_rows(preset))
  mesh = jax.sharding.get_mesh()
  work = workload.make_work(config, data, mesh)
  console.print("compiling library")
  steppers = {"library": _Stepper(WAYS["library"](work), work)}
  jax.block_until_ready(steppers["library"]())
  peak = timing.process_peak_bytes()  # before anything else is allocated
  dtype = compute_dtype(config.model)
  products = timing.matmuls(dtype)
  pieces = parts.make_parts(work, against) if with_parts else {}
  with contextlib.ExitStack() as peers:
    if against != "none":
      # Some take minutes; a benchmark that is stopped then says where it was.
      console.print(f"compiling {against}")
    if against == _TORCH:
      peer = torch_mdlm.Peer(preset)
      steppers[against] = peers.enter_context(peer)
    elif against != "none":
      steppers[against] = _Stepper(WAYS[against](work), work)
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
    result[name] = _numbers(work, stepper, seconds[name], ceiling)
  if against != "none":
    result |= _compare(result, seconds, against)
  return result


def _compare(
  result: dict[str, Any], seconds: dict[str, list[float]], other: str
) -> dict[str, Any]:
  """Returns the ratios of seconds within each turn, and of memory."""
  # Within a turn: the load of the machine changes slowly, so it cancels.
  pairs = zip(seconds[other], seconds["library"], strict=True)
  ours, theirs = result["library"], result[other]
  return {
    f"{other}_over_library": timing.spread([b / a for b, a in pairs]),
    f"memory_share_of_{other}": {
      name: ours[name] / theirs[name] for name in _MEMORY
    },
  }


def _numbers(
  work: Work,
  stepper: _Stepper | torch_mdlm.Peer,
  seconds: list[float],
  ceiling: dict[str, Any],
) -> dict[str, Any]:
  times = timing.spread(seconds)
  achieved = stepper.flops / times["median"]
  # The ceiling is that of one device.
  highest = ceiling["flops_per_second"] * ceiling["devices"]
  return {
    "seconds": times,
    "tokens_per_second": work.tokens / times["median"],
    "flops": stepper.flops,
    "flops_per_second": achieved,
    "mfu": achieved / highest,
    **stepper.facts,
  }


def _headline(results: dict[str, Any]) -> dict[str, float]:
  lines = {}
  for rates, measured in results["rates"].items():
    for name in _measured(measured):
      numbers = measured[name]
      lines |= {
        f"{rates}, {name}: tokens/s": numbers["tokens_per_second"],
        f"{rates}, {name}: ms a step": 1e3 * numbers["seconds"]["median"],
        f"{rates}, {name}: mfu": numbers["mfu"],
        f"{rates}, {name}: MiB temporary": numbers["temporary_bytes"] / 2**20,
        f"{rates}, {name}: s to compile": numbers["compile_seconds"],
      }
    for name in _measured(measured)[1:]:
      ratio = measured[f"{name}_over_library"]
      lines |= {
        f"{rates}: times as fast as {name}": ratio["median"],
        f"{rates}: times as fast as {name}, lower quartile": ratio["low"],
        f"{rates}: times as fast as {name}, upper quartile": ratio["high"],
      }
      for key, share in measured[f"memory_share_of_{name}"].items():
        lines[f"{rates}: {_MEMORY[key]} memory, share of {name}'s"] = share
    ceiling = measured["ceiling"]["flops_per_second"]
    lines[f"{rates}: ceiling, GFLOP/s a device"] = ceiling / 1e9
  return lines


def _measured(measured: dict[str, Any]) -> list[str]:
  """Returns the names of the steps that were timed, the library first."""
  return [name for name in ("library", *OTHERS) if name in measured]


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
    for way in _measured(measured):
      table.add_row(way, *_cells(measured[way]))
    for part, times in measured["parts"].items():
      table.add_row(part, *_times(times))
    console.print(table)
    for way in _measured(measured)[1:]:
      ratio = measured[f"{way}_over_library"]
      share = measured[f"memory_share_of_{way}"]
      console.print(
        f"{ratio['median']:.2f} times as fast as {way}"
        f" ({ratio['low']:.2f} - {ratio['high']:.2f})",
        *(
          f"{share[key]:.1%} of its {name} memory"
          for key, name in _MEMORY.items()
        ),
        sep=", ",
      )


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


def main(_: list[str]) -> int:
  values = flags.FLAGS
  # Compile times must not be those of reading a cache.
  jax.config.update("jax_enable_compilation_cache", False)
  preset = PRESETS[values.preset]
  for name in ("batch", "dtype", "attention", "remat", "dropout"):
    if values[name].value is not None:
      preset = dataclasses.replace(preset, **{name: values[name].value})
  try:
    if values.against == _TORCH:
      torch_mdlm.check()
      # JAX takes three quarters of a device's memory by default, and PyTorch
      # needs its share of the same device.
      os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with jax.set_mesh(make_mesh(MeshConfig())):
      results = measure(
        *(preset, values.rates, values.against, values.repeats, values.parts)
      )
  except Failure as error:
    print(error, file=sys.stderr)
    return error.code
  _show(values.preset, results)
  if values.json:
    print(json.dumps(results))
  return 0


def _define_flags() -> None:
  flags.DEFINE_enum("preset", "char", list(PRESETS), "Which model and batch.")
  flags.DEFINE_multi_enum(
    "rates", ["uniform", "stage_3"], list(RATES), "Which mask rates."
  )
  flags.DEFINE_enum(
    "against", "none", ["none", *OTHERS], "What to compare with."
  )
  flags.DEFINE_integer("repeats", 10, "Turns.", 1)
  flags.DEFINE_bool("parts", False, "Time what a step is made of, too.")
  flags.DEFINE_integer("batch", None, "Rows, in place of the preset's.", 1)
  hints = typing.get_type_hints(ModelConfig)
  for name, choices in (
    ("dtype", typing.get_args(hints["dtype"])),
    ("attention", [*KERNELS]),
    ("remat", typing.get_args(hints["remat"])),
  ):
    flags.DEFINE_enum(name, None, choices, f"In place of the preset's {name}.")
  flags.DEFINE_float(
    "dropout", None, "In place of the preset's; not in plain.", 0.0, 0.99
  )
  flags.DEFINE_bool("json", False, "Print JSON on the last line.")


if __name__ == "__main__":
  _define_flags()
  log_lines.run(main)
