"""Measures how long an update takes to compile, by the number of layers.

  python -m mdm_jax.benchmarks.compile_time --preset=gpt2 --depths=2,12 --json

Nothing is run: the update is traced, lowered and compiled for abstract arrays,
each depth several times in turn, without any cache.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mdm_jax.benchmarks import timing, train_step, workload
from mdm_jax.benchmarks.workload import PRESETS, Preset
from mdm_jax.core import log_lines
from mdm_jax.core.progress import console
from mdm_jax.core.sharding import MeshConfig, make_mesh


def measure(
  preset: Preset, depths: Sequence[int], repeats: int = 3
) -> dict[str, Any]:
  """Measures the seconds of tracing and of compiling at every depth.

  Args:
    preset: the model and the batch.
    depths: numbers of layers.
    repeats: compilations of each.
  """
  phases = ("lower_seconds", "compile_seconds")
  taken = {d: {phase: [] for phase in phases} for d in depths}
  _program(dataclasses.replace(preset, num_layers=1))  # warm-up
  for _ in range(repeats):
    for depth in depths:
      # Else the second turn would find the traced function.
      jax.clear_caches()
      program = _program(dataclasses.replace(preset, num_layers=depth))
      for phase in phases:
        taken[depth][phase].append(getattr(program, phase))
  by_depth = {
    depth: {phase: timing.spread(s) for phase, s in phases.items()}
    for depth, phases in taken.items()
  }
  first, last = (_whole(by_depth[d]) for d in (depths[0], depths[-1]))
  return {
    "facts": timing.facts(),
    "preset": dataclasses.asdict(preset),
    "by_depth": by_depth,
    "last_over_first": last / first,
    "headline": {
      f"{depth} layers: s to trace and compile": _whole(by_depth[depth])
      for depth in depths
    }
    | {f"{depths[-1]} over {depths[0]} layers": last / first},
  }


def _whole(phases: dict[str, dict[str, float]]) -> float:
  return sum(seconds["median"] for seconds in phases.values())


def _program(preset: Preset) -> timing.Program:
  config = workload.make_config(preset)
  data = workload.make_data(preset, workload.make_rows(preset, preset.batch))
  work = workload.make_work(config, data, jax.sharding.get_mesh())
  # Shapes are enough to compile; no state is allocated.
  state = jax.tree.map(_placed, work.trainer.abstract())
  return timing.compiled(train_step.library_step(work), state, work.batch)


def _placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  """Returns a shape with its sharding on the current mesh."""
  spec = leaf.sharding.spec if leaf.sharding else P()
  sharding = NamedSharding(jax.sharding.get_mesh(), spec)
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def main(_: list[str]) -> None:
  values = flags.FLAGS
  jax.config.update("jax_enable_compilation_cache", False)
  depths = [int(depth) for depth in values.depths]
  with jax.set_mesh(make_mesh(MeshConfig())):
    results = measure(PRESETS[values.preset], depths, values.repeats)
  for name, value in results["headline"].items():
    console.print(f"{name}: {value:.2f}")
  if values.json:
    print(json.dumps(results))


def _define_flags() -> None:
  flags.DEFINE_enum("preset", "char", list(PRESETS), "Which model and batch.")
  flags.DEFINE_list("depths", ["2", "12"], "Numbers of layers.")
  flags.DEFINE_integer("repeats", 3, "Turns.", 1)
  flags.DEFINE_bool("json", False, "Print JSON on the last line.")


if __name__ == "__main__":
  _define_flags()
  log_lines.run(main)
