"""Lowers or compiles a run's programs for a mesh of devices you don't have.

  python -m mdm_jax.benchmarks.lowering --config=configs/8b.py --mesh=64x4
  python -m mdm_jax.benchmarks.lowering --config=configs/8b.py --mesh=64x4 \\
    --topology=v5e:16x16
  python -m mdm_jax.benchmarks.lowering --preset=gpt2 --batch=64 \\
    --topology=h100:1

The first command lists the collectives of an update and of a sampler's call:
kinds, mesh axes and bytes per device, from the partitioned program for as many
fake CPU devices. The second compiles both with the TPU compiler, which needs no
TPU (extra `tpu`), and prints the memory that it assigns, the largest arrays and
the Pallas kernels. The third does so with XLA's GPU compiler, which needs no
GPU (extra `cuda13`), and lists the kernels instead, with their bytes,
operations and predicted time. Nothing is run.
"""

import collections
import dataclasses
import json
import time
from typing import Any

import jax
from absl import flags
from jax.sharding import AbstractMesh
from rich import box
from rich.table import Table

from mdm_jax import command_line, fit
from mdm_jax.benchmarks import (
  collectives,
  gpu_program,
  topology,
  tpu_program,
  workload,
)
from mdm_jax.benchmarks.collectives import Collective
from mdm_jax.benchmarks.gpu_program import Rates
from mdm_jax.benchmarks.programs import PROGRAMS, Program, abstract, trace
from mdm_jax.blueprint import Blueprint
from mdm_jax.core import accelerators, log_lines, sharding
from mdm_jax.core.errors import Failure, UserError
from mdm_jax.core.progress import console
from mdm_jax.core.sharding import AXES
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.model.kernels import KERNELS
from mdm_jax.planning.footprint import footprint
from mdm_jax.sampling import sampler

_LISTED = 12


# MARK: on fake devices: what is communicated


def communicated(
  run: Blueprint, program: Program, mesh: jax.sharding.Mesh
) -> list[Collective]:
  """Returns the collectives of a program on a mesh of fake devices."""
  lowered = trace(run, program, mesh).lower()
  return collectives.collectives(lowered, mesh)


def by_kind(found: list[Collective]) -> dict[str, dict[str, int]]:
  """Returns the number and the bytes of collectives by kind and mesh axes."""
  sums: dict[str, dict[str, int]] = collections.defaultdict(
    lambda: {"times": 0, "bytes": 0}
  )
  for c in found:
    total = sums[f"{c.kind} over {' x '.join(c.axes)}"]
    total["times"] += c.times
    total["bytes"] += c.total
  return dict(sums)


# MARK: for devices that aren't here: memory, and a GPU's kernels


def compiled(
  run: Blueprint,
  program: Program,
  mesh: jax.sharding.Mesh,
  rates: Rates | None = None,
) -> dict[str, Any]:
  """Compiles a program for devices that are not here.

  Args:
    run: made by `fit.blueprint`.
    program: which program.
    mesh: devices of a topology.
    rates: of a GPU, if it is one, to list and predict its kernels.

  Returns:
    Seconds to compile, bytes per device; a GPU's `kernels`, or a TPU's largest
    `arrays` and its `pallas` kernels.
  """
  lowered = trace(run, program, mesh).lower()
  began = time.monotonic()
  is_sampler = rates is not None and program.name == "sampler"
  found = lowered.compile(sampler.GPU_OPTIONS if is_sampler else None)
  seconds = time.monotonic() - began
  memory = found.memory_analysis()
  result = {
    "compile_seconds": seconds,
    "argument_bytes": memory.argument_size_in_bytes,
    "temporary_bytes": memory.temp_size_in_bytes,
    "program_bytes": memory.generated_code_size_in_bytes,
    "bytes": memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes,
  }
  text = found.as_text()
  return result | (_kernels(text, rates) if rates else _arrays(text))


def _kernels(text: str, rates: Rates) -> dict[str, Any]:
  found = gpu_program.kernels(text, rates)
  return {
    "predicted_seconds": sum(kernel.seconds for kernel in found),
    "by_kind": gpu_program.sums(found, lambda kernel: kernel.kind),
    "by_source": gpu_program.sums(found, str),
    "kernels": [dataclasses.asdict(kernel) for kernel in found],
  }


def _arrays(text: str) -> dict[str, Any]:
  found = tpu_program.arrays(text)[:_LISTED]
  return {
    "arrays": [dataclasses.asdict(array) for array in found],
    "pallas": tpu_program.kernels(text),
  }


# MARK: the program


def measure(
  run: Blueprint,
  programs: dict[str, Program],
  mesh: jax.sharding.Mesh,
  name: str | None,
) -> dict[str, Any]:
  """Returns what every program communicates, or what compiling it gives.

  Args:
    run: made by `fit.blueprint`.
    programs: by the names of their results.
    mesh: fake CPU devices, or those of a topology.
    name: of the topology to compile for; None lists collectives instead.
  """
  gpu = topology.gpu(name) if name else None
  device = gpu and accelerators.by_kind(gpu.kind)
  planned = footprint(
    run, abstract(mesh, device), fit.has_scores(run.config, device)
  )
  result: dict[str, Any] = {
    "mesh": tuple(mesh.shape.values()),
    "device": mesh.devices.flat[0].device_kind,
    "planned_bytes": planned.total,
  }
  for label, program in programs.items():
    if name:
      result[label] = compiled(run, program, mesh, gpu and gpu.rates)
      continue
    found = communicated(run, program, mesh)
    result[label] = {
      "by_kind": by_kind(found),
      "collectives": [
        dataclasses.asdict(c) | {"total": c.total} for c in found
      ],
    }
  return result


def main(_: list[str]) -> int:
  values = flags.FLAGS
  # No run can use these programs: keep them out of the cache.
  jax.config.update("jax_enable_compilation_cache", False)
  # And whatever device this machine has is not needed.
  jax.config.update("jax_platforms", "cpu")
  try:
    mesh = _mesh(values.mesh, values.topology)
    run = _blueprint(values, abstract(mesh))
    programs = _programs(run, values)
    result = measure(run, programs, mesh, values.topology)
  except Failure as error:
    return command_line.fail(error)
  for label in programs:
    title = f"{values.preset or run.config.name}, {label}"
    if not values.topology:
      _show_collectives(title, result, result[label])
      continue
    _show_memory(title, result, result[label])
    if "kernels" in result[label]:
      _show_kernels(result[label], values.most)
    else:
      _show_arrays(result[label])
  if values.json:
    print(json.dumps(result))
  return 0


def _mesh(text: str | None, name: str | None) -> jax.sharding.Mesh:
  """Returns the mesh of a topology's devices, or else of fake ones."""
  if not name:
    planned = sharding.planned_mesh(sharding.parse_mesh(text or "8"))
    # Before JAX starts its backend, after which the number is fixed.
    jax.config.update("jax_num_cpu_devices", planned.size)
    return jax.make_mesh(tuple(planned.shape.values()), AXES)
  found = topology.devices(name)
  config = sharding.parse_mesh(text or str(len(found)))
  planned = sharding.planned_mesh(config)
  if planned.size != len(found):
    raise UserError(
      f"topology {name!r} has {len(found)} devices, the mesh {planned.size}"
    )
  return jax.make_mesh(tuple(planned.shape.values()), AXES, devices=found)


def _blueprint(values: Any, mesh: AbstractMesh) -> Blueprint:
  # A topology's devices say themselves which attention and layout is theirs.
  auto = {"dtype": "bfloat16"} if values.topology else fit.PLANNED
  if not values.preset:
    return fit.blueprint(command_line.read_config(), mesh, auto=auto)
  preset = workload.PRESETS[values.preset]
  for name in ("batch", "attention"):
    if values[name].value is not None:
      preset = dataclasses.replace(preset, **{name: values[name].value})
  config = workload.make_config(preset, values.rates)
  return fit.blueprint(config, mesh, Vocabulary.after_text(preset.vocab), auto)


def _programs(run: Blueprint, values: Any) -> dict[str, Program]:
  """Returns the programs that were asked for, by the names of their results."""
  programs = {}
  for name in values.program:
    if name == "train_step" and values.stages == "all":
      for i in range(len(run.curriculum.stages)):
        programs[f"train_step_{i + 1}"] = Program(name, stage=i)
    else:
      programs[name] = Program(name, texts=values.texts)
  return programs


def _show_collectives(
  title: str, result: dict[str, Any], program: dict[str, Any]
) -> None:
  sizes = " x ".join(map(str, result["mesh"]))
  table = Table(
    title=f"{title}, mesh {sizes}: bytes a device",
    box=box.SIMPLE_HEAD,
    pad_edge=False,
    collapse_padding=True,
  )
  for name in ("collective", "times", "MiB", "shape"):
    justify = "left" if name in ("collective", "shape") else "right"
    table.add_column(name, justify=justify, no_wrap=True)
  for c in program["collectives"][:_LISTED]:
    kind = f"{c['kind']} over {' x '.join(c['axes'])}"
    total = f"{c['total'] / 2**20:,.1f}"
    table.add_row(kind, f"{c['times']:,}", total, c["shape"])
  console.print(table)
  for kind, sums in program["by_kind"].items():
    console.print(
      f"all {kind}: {sums['times']:,} of {sums['bytes'] / 2**20:,.1f} MiB"
    )


def _show_memory(
  title: str, result: dict[str, Any], program: dict[str, Any]
) -> None:
  gib = lambda name: f"{program[name] / 2**30:.2f}"
  console.print(
    f"{title}: {gib('argument_bytes')} GiB of arguments and"
    f" {gib('temporary_bytes')} GiB of temporaries a device, {gib('bytes')} GiB"
    f" in all (planned for an update: {result['planned_bytes'] / 2**30:.2f});"
    f" compiled in {program['compile_seconds']:.0f} s",
    soft_wrap=True,
  )


def _show_arrays(program: dict[str, Any]) -> None:
  console.print(f"largest arrays\n{'MiB':>9} {'places':>6}")
  for array in program["arrays"]:
    # The end of the source is the operation; before it are loops and calls.
    source = "/".join(array["source"].split("/")[-2:])
    line = f"{array['bytes'] / 2**20:>9,.1f} {array['places']:>6}"
    console.print(
      f"{line}  {array['shape']}  {source}".rstrip(),
      markup=False,
      soft_wrap=True,
    )
  runs = program["pallas"].items()
  told = ", ".join(f"{name} ({times:,} runs)" for name, times in runs)
  console.print(f"Pallas kernels: {told or 'none'}", soft_wrap=True)


def _show_kernels(program: dict[str, Any], most: int) -> None:
  launches = sum(kernel["times"] for kernel in program["kernels"])
  console.print(
    f"predicted: {1e3 * program['predicted_seconds']:.1f} ms in"
    f" {launches:,} launches"
  )
  _show_sums(program["by_kind"])
  longest = [*program["by_source"].items()][:most]
  if longest:
    console.print("of which most is")
    _show_sums(dict(longest))


def _show_sums(sums: dict[str, dict[str, Any]]) -> None:
  # No rich table: it would cut long sources off at the width of a terminal.
  columns = f"{'ms':>8} {'launches':>8} {'GB':>8} {'TFLOP':>8}"
  console.print(columns)
  for name, s in sums.items():
    # What GPUs exchange has no prediction.
    ms = f"{1e3 * s['seconds']:.2f}" if s["seconds"] else "-"
    gigabytes, operations = s["bytes"] / 1e9, s["operations"] / 1e12
    numbers = f"{ms:>8} {s['times']:>8,} {gigabytes:>8.2f} {operations:>8.2f}"
    console.print(f"{numbers}  {name}", soft_wrap=True)


def _define_flags() -> None:
  flags.DEFINE_string("workdir", None, "A run's folder, for its config.")
  flags.DEFINE_enum(
    "preset", None, list(workload.PRESETS), "A benchmark's run, for --config."
  )
  flags.DEFINE_integer("batch", None, "Rows, in place of the preset's.", 1)
  flags.DEFINE_enum(
    "rates", "uniform", list(workload.RATES), "The preset's mask rates."
  )
  flags.DEFINE_enum("attention", None, [*KERNELS], "The preset's attention.")
  flags.DEFINE_string(
    "mesh",
    None,
    "FSDP, FSDPxTENSOR, or with REPLICAx; by default FSDP over all devices of"
    " the topology, or 8.",
  )
  flags.DEFINE_multi_enum(
    "program", list(PROGRAMS), list(PROGRAMS), "Which programs."
  )
  flags.DEFINE_enum(
    "stages", "last", ["last", "all"], "Stages whose update is compiled."
  )
  flags.DEFINE_integer(
    "texts", None, "Texts a call of the sampler; default: one a data shard.", 1
  )
  flags.DEFINE_string(
    "topology", None, "Compile for TPUs, as v5e:16x16, or GPUs, as h100:8."
  )
  flags.DEFINE_integer("most", 25, "Lines of a GPU's longest kernels.", 0)
  flags.DEFINE_bool("json", False, "Print JSON on the last line.")


if __name__ == "__main__":
  _define_flags()
  log_lines.run(main, flags_parser=command_line.parse)
