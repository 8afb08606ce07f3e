"""Lists the collectives of a program: kinds, bytes and mesh axes.

XLA's SPMD partitioner turns a program for a mesh into the program of one device
and inserts all collectives that the shardings ask for. This module reads them
there, before a backend merges, reorders or overlaps them. A gradient that is
summed and then split is an all-reduce here; TPUs and GPUs turn the two into a
reduce-scatter.
"""

import dataclasses
import math
import re
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from mdm_jax.benchmarks import hlo

KINDS = (
  *("all-gather", "all-reduce", "reduce-scatter", "all-to-all"),
  "collective-permute",
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """All collectives of one kind and shape in one place of a program.

  Attributes:
    kind: of the operation, as in `all-gather`.
    axes: mesh axes that it communicates over.
    shape: of its result on a device, as in bf16[4096,3072].
    bytes: of its result on a device; of its operand for a reduce-scatter.
    times: how often a call runs it; a loop without a known end counts as one
      iteration.
    source: JAX's name of the operation that it belongs to.
  """

  kind: str
  axes: tuple[str, ...]
  shape: str
  bytes: int
  times: int
  source: str

  @property
  def total(self) -> int:
    """Bytes per call."""
    return self.bytes * self.times


def collectives(
  lowered: jax.stages.Lowered, mesh: jax.sharding.Mesh
) -> list[Collective]:
  """Returns the collectives of a program, the largest total first.

  Args:
    lowered: the program, lowered for the mesh; it is compiled here.
    mesh: the mesh; its devices must be numbered from 0 in its own order.
  """
  with tempfile.TemporaryDirectory() as folder:
    # Only the partitioner's output is wanted, so the passes after it are kept
    # cheap.
    lowered.compile(
      compiler_options={
        "xla_dump_to": folder,
        "xla_dump_hlo_pass_re": "spmd-partitioning",
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
      }
    )
    (path,) = epath.Path(folder).glob("*after_spmd-partitioning*")
    text = path.read_text()
  found = sorted(read(text, mesh), key=lambda c: -c.total)
  return [c for c in found if c.axes]  # without axes it stays on one device


def read(text: str, mesh: Any) -> Iterator[Collective]:
  """Yields the collectives in the HLO text of a partitioned program."""
  for instruction, inside, times in hlo.parse(text).runs():
    if instruction.op in KINDS:
      yield _collective(instruction, _source(instruction, inside), times, mesh)


def _source(instruction: hlo.Instruction, inside: hlo.Computation) -> str:
  """Returns the source of an instruction, or else of its first reader."""
  readers = (i for i in inside.values() if instruction.name in i.operands)
  return next((i.source for i in (instruction, *readers) if i.source), "")


def _collective(
  instruction: hlo.Instruction, source: str, times: int, mesh: Any
) -> Collective:
  kind, group = instruction.op, _first_group(instruction.rest)
  size = hlo.size_of(instruction.shape)
  size *= len(group) if kind == "reduce-scatter" else 1
  shape = re.sub(r"\{[^}]*\}", "", instruction.shape)
  return Collective(kind, _axes(group, mesh), shape, size, times, source)


# MARK: groups of devices


def _first_group(rest: str) -> list[int]:
  """Returns the device numbers of a collective's first group.

  XLA writes groups in three ways: as lists, as a grid that is transposed and
  cut, or as named axes of such a grid.
  """
  given = re.search(r"replica_groups=(.*)", rest).group(1)
  if given.startswith("{{"):
    return [int(n) for n in given[2 : given.index("}")].split(",")]
  if given.startswith("mesh["):
    return _of_named_axes(given)
  shape, grid = re.match(r"\[([\d,]+)\]<=(\S+?)(?:, |$)", given).groups()
  ids = _grid(grid).reshape(_numbers(shape))
  return ids[0].tolist()


def _of_named_axes(given: str) -> list[int]:
  """Parses mesh['a'=4,'b'=64], device_ids=([64,4]T(1,0)) {'a'}."""
  sizes = [int(n) for n in re.findall(r"'=(\d+)", given)]
  names = re.findall(r"'(\w+)'=", given)
  order = re.search(r"device_ids=\((\S+?)\) ", given)
  ids = _grid(order.group(1)) if order else np.arange(math.prod(sizes))
  ids = ids.reshape(sizes)
  chosen = re.search(r"\] ?(?:, device_ids=\(\S+?\))? ?\{([^}]*)\}", given)
  chosen = set(re.findall(r"'(\w+)'", chosen.group(1)))
  at = tuple(slice(None) if name in chosen else 0 for name in names)
  return ids[at].reshape(-1).tolist()


def _grid(text: str) -> np.ndarray:
  """Parses [64,4]T(1,0): a grid of device numbers, and its transposition."""
  shape, _, order = text.partition("T")
  shape = _numbers(shape.strip("[]"))
  ids = np.arange(math.prod(shape)).reshape(shape)
  return ids.transpose(_numbers(order.strip("()"))) if order else ids


def _numbers(text: str) -> list[int]:
  return [int(n) for n in text.split(",")]


def _axes(group: list[int], mesh: Any) -> tuple[str, ...]:
  """Returns the mesh axes along which the devices of a group differ."""
  places = np.unravel_index(group, tuple(mesh.shape.values()))
  return tuple(
    axis
    for axis, place in zip(mesh.axis_names, places, strict=True)
    if len(set(place.tolist())) > 1
  )
