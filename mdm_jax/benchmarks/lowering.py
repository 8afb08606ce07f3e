"""Lowers or compiles a run's programs for a mesh of devices you don't have.

  python -m mdm_jax.benchmarks.lowering --config=configs/8b.py --mesh=64x4
  python -m mdm_jax.benchmarks.lowering --config=configs/8b.py --mesh=64x4 \\
    --topology=v5e:16x16

The first command lists the collectives of an update and of a sampler's call:
kinds, mesh axes and bytes per device, from the partitioned program for as many
fake CPU devices. The second compiles both with the TPU compiler, which needs no
TPU (extra `tpu`), and prints the memory that it assigns. Nothing is run.
"""

import collections
import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.experimental import topologies
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich import box
from rich.table import Table

from mdm_jax import command_line, fit
from mdm_jax.benchmarks import collectives
from mdm_jax.benchmarks.collectives import Collective
from mdm_jax.blueprint import Blueprint
from mdm_jax.config import Config
from mdm_jax.core import log_lines, sharding
from mdm_jax.core.errors import Failure, UserError
from mdm_jax.core.progress import console
from mdm_jax.core.sharding import AXES, batch_sharding, data_shards
from mdm_jax.planning.footprint import abstract_batch, footprint
from mdm_jax.sampling import schedule, tokens
from mdm_jax.sampling.call import Canvas
from mdm_jax.sampling.sampler import make_sampler

PROGRAMS = "train_step", "sampler"
_EXPLICIT = (jax.sharding.AxisType.Explicit,) * len(AXES)
_LISTED = 12


def trace(run: Blueprint, program: str, mesh: Any) -> jax.stages.Traced:
  """Traces a program of the run for a mesh of any kind.

  Args:
    run: made by `fit.blueprint`.
    program: `train_step`, an update of the last stage; or `sampler`, a call of
      the sampler with one row per data shard.
    mesh: an abstract mesh, or one of real, fake or topology devices.
  """
  # Built on an abstract mesh: small arrays are computed on the way, and a
  # topology has no device that could.
  with jax.sharding.use_abstract_mesh(_abstract(mesh)):
    make = _sampler if program == "sampler" else _train_step
    function, arguments = make(run, mesh)
  with _on(mesh):
    return function.trace(*arguments)


def _train_step(run: Blueprint, mesh: Any) -> tuple[Any, tuple[Any, ...]]:
  stage = run.curriculum.stages[-1]
  state = _on_mesh(run.abstract(), mesh)
  return run.step(stage), (state, abstract_batch(run, stage, mesh))


def _sampler(run: Blueprint, mesh: Any) -> tuple[Any, tuple[Any, ...]]:
  config = run.config.sample
  rows, length = data_shards(mesh), run.config.sample_length
  shape = lambda dtype, *sizes: jax.ShapeDtypeStruct(
    sizes, dtype, sharding=batch_sharding(mesh, len(sizes))
  )
  canvas = Canvas(
    shape(jnp.int32, rows, length),
    shape(jnp.bool_, rows, length),
    shape(jnp.int32, rows),
  )
  whole = NamedSharding(mesh, P())
  replicated = lambda x: jax.ShapeDtypeStruct(
    np.shape(x), np.asarray(x).dtype, sharding=whole
  )
  pace = jax.tree.map(replicated, schedule.pace(config, length, None))
  settings = tokens.effective_settings(config)
  # Random keys have a dtype of their own; this finds it without a device.
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
  keys = jax.ShapeDtypeStruct(
    keys.shape, keys.dtype, sharding=batch_sharding(mesh, 1)
  )
  function = make_sampler(config, run.denoiser, run.vocab)
  params = _on_mesh(run.abstract().params, mesh)
  return function, (params, canvas, pace, settings, keys)


def _on_mesh(tree: Any, mesh: Any) -> Any:
  """Returns a tree's shapes with their shardings on a mesh."""

  def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    spec = x.sharding.spec if x.sharding else P()
    split = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split)

  return jax.tree.map(place, tree)


@contextlib.contextmanager
def _on(mesh: Any) -> Iterator[None]:
  if isinstance(mesh, AbstractMesh):
    with jax.sharding.use_abstract_mesh(mesh):
      yield
  else:
    with jax.set_mesh(mesh):
      yield


def _abstract(mesh: Any) -> AbstractMesh:
  """Returns the abstract mesh of the same shape."""
  return AbstractMesh(tuple(mesh.shape.values()), AXES, _EXPLICIT)


# MARK: on fake devices: what is communicated


def communicated(
  run: Blueprint, program: str, mesh: jax.sharding.Mesh
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


# MARK: for real TPUs: what is in memory


def compiled_for_tpu(
  run: Blueprint, program: str, topology: str, sizes: tuple[int, ...]
) -> dict[str, Any]:
  """Compiles a program for TPUs that are not here; returns memory and time.

  Args:
    run: made by `fit.blueprint`.
    program: `train_step` or `sampler`.
    topology: name of the TPUs, as in v5e:16x16.
    sizes: of the mesh axes.

  Returns:
    Seconds to compile, and bytes per device.

  Raises:
    UserError: libtpu is not installed, or does not know the topology.
  """
  mesh = _tpus(topology, sizes)
  lowered = trace(run, program, mesh).lower()
  began = time.monotonic()
  memory = lowered.compile().memory_analysis()
  return {
    "compile_seconds": time.monotonic() - began,
    "argument_bytes": memory.argument_size_in_bytes,
    "temporary_bytes": memory.temp_size_in_bytes,
    "program_bytes": memory.generated_code_size_in_bytes,
    "bytes": memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes,
  }


def _tpus(topology: str, sizes: tuple[int, ...]) -> jax.sharding.Mesh:
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server here
  try:
    # libtpu describes the devices without having any.
    found = topologies.get_topology_desc(topology, platform="tpu")
  except (RuntimeError, NotImplementedError) as error:
    reason = str(error).splitlines()[0]
    raise UserError(
      f"topology {topology!r}: {reason}; it is written as v5e:16x16, and needs"
      " libtpu: pip install -e '.[tpu]'"
    ) from error
  if len(found.devices) != math.prod(sizes):
    raise UserError(
      f"topology {topology!r} has {len(found.devices)} devices, the mesh"
      f" {math.prod(sizes)}"
    )
  return jax.make_mesh(sizes, AXES, devices=found.devices)


# MARK: the program


def measure(
  config: Config, mesh: str, programs: list[str], topology: str | None
) -> dict[str, Any]:
  """Returns what every program communicates, or the memory TPUs need for it.

  Args:
    config: the run's config.
    mesh: axis sizes, as in 64x4.
    programs: names from `PROGRAMS`.
    topology: TPUs to compile for; None lists collectives instead.
  """
  planned = sharding.planned_mesh(sharding.parse_mesh(mesh))
  if not topology:
    # Before JAX starts its backend, after which the number is fixed.
    jax.config.update("jax_num_cpu_devices", planned.size)
  run = fit.blueprint(config, planned)
  sizes = tuple(planned.shape.values())
  held = footprint(run, planned)
  result: dict[str, Any] = {"mesh": sizes, "planned_bytes": held.total}
  if topology:
    for program in programs:
      result[program] = compiled_for_tpu(run, program, topology, sizes)
    return result
  devices = jax.make_mesh(sizes, AXES)
  for program in programs:
    found = communicated(run, program, devices)
    result[program] = {
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
  try:
    config = command_line.read_config()
    result = measure(config, values.mesh, values.program, values.topology)
  except Failure as error:
    return command_line.fail(error)
  for program in values.program:
    show = _show_memory if values.topology else _show_collectives
    show(config, program, result)
  if values.json:
    print(json.dumps(result))
  return 0


def _show_collectives(
  config: Config, program: str, result: dict[str, Any]
) -> None:
  sizes = " x ".join(map(str, result["mesh"]))
  table = Table(
    title=f"{config.name}, {program}, mesh {sizes}: bytes a device",
    box=box.SIMPLE_HEAD,
    pad_edge=False,
    collapse_padding=True,
  )
  for name in ("collective", "times", "MiB", "shape"):
    justify = "left" if name in ("collective", "shape") else "right"
    table.add_column(name, justify=justify, no_wrap=True)
  found = result[program]["collectives"]
  for c in found[:_LISTED]:
    kind = f"{c['kind']} over {' x '.join(c['axes'])}"
    total = f"{c['total'] / 2**20:,.1f}"
    table.add_row(kind, f"{c['times']:,}", total, c["shape"])
  console.print(table)
  for kind, sums in result[program]["by_kind"].items():
    console.print(
      f"all {kind}: {sums['times']:,} of {sums['bytes'] / 2**20:,.1f} MiB"
    )


def _show_memory(config: Config, program: str, result: dict[str, Any]) -> None:
  memory = result[program]
  gib = lambda name: f"{memory[name] / 2**30:.2f}"
  console.print(
    f"{config.name}, {program}: {gib('argument_bytes')} GiB of arguments and"
    f" {gib('temporary_bytes')} GiB of temporaries a device, {gib('bytes')} GiB"
    f" in all (planned for an update: {result['planned_bytes'] / 2**30:.2f});"
    f" compiled in {memory['compile_seconds']:.0f} s",
    soft_wrap=True,
  )


def _define_flags() -> None:
  flags.DEFINE_string("workdir", None, "A run's folder, for its config.")
  flags.DEFINE_string("mesh", "8", "FSDP, FSDPxTENSOR, or with REPLICAx.")
  flags.DEFINE_multi_enum(
    "program", list(PROGRAMS), list(PROGRAMS), "Which programs."
  )
  flags.DEFINE_string("topology", None, "Compile for TPUs, as v5e:16x16.")
  flags.DEFINE_bool("json", False, "Print JSON on the last line.")


if __name__ == "__main__":
  _define_flags()
  log_lines.run(main, flags_parser=command_line.parse)
