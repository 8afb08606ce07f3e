"""Lists the collectives of a program: kinds, bytes and mesh axes.

XLA's SPMD partitioner turns a program for a mesh into the program of one device
and inserts all collectives that the shardings ask for. This module reads them
there, before a backend merges, reorders or overlaps them. A gradient that is
summed and then split is an all-reduce here; TPUs and GPUs turn the two into a
reduce-scatter.
"""

import collections
import dataclasses
import math
import re
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f64": 8, "s64": 8, "u64": 8}
# Lines of HLO text, as XLA dumps it: `%x = f32[8,4] all-gather(%y), ...`.
_INSTRUCTION = re.compile(rf"= (\S+) ({_KINDS})\((.*)")
_WHILE = re.compile(r" while\(.*condition=%([\w.\-]+), body=%([\w.\-]+)")
_CALLS = re.compile(r"(?:to_apply|calls|_computation)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%([\w.\-]+) \(.*\{$")


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
  bodies, entry = _computations(text)
  for name, times in _times(bodies, entry).items():
    for line in bodies[name]:
      match = _INSTRUCTION.search(line)
      if match:
        source = _source(line, bodies[name])
        yield _collective(*match.groups(), source, times, mesh)


def _source(line: str, body: list[str]) -> str:
  """Returns the op_name of an instruction, or else of its first reader."""
  name = line.split("=")[0].replace("ROOT", "").strip()
  reads = re.compile(re.escape(name) + r"[,)#]")
  for other in [line, *filter(reads.search, body)]:
    source = re.search(r'op_name="([^"]*)"', other)
    if source:
      return source.group(1)
  return ""


def _collective(shape, kind, rest, source, times, mesh) -> Collective:
  group = _first_group(rest)
  size = _size(shape) * (len(group) if kind == "reduce-scatter" else 1)
  shape = re.sub(r"\{[^}]*\}", "", shape)
  axes = _axes(group, mesh)
  return Collective(kind, axes, shape, size, times, source)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  """Returns the lines of every HLO computation, and the name of the entry."""
  bodies: dict[str, list[str]] = {}
  name = entry = ""
  for line in text.splitlines():
    start = _COMPUTATION.match(line)
    if start:
      name = start.group(1)
      bodies[name] = []
      entry = name if line.startswith("ENTRY") else entry
    elif name:
      bodies[name].append(line)
  return bodies, entry


def _times(bodies: dict[str, list[str]], entry: str) -> dict[str, int]:
  """Returns how often one call of the program runs each computation."""
  times: collections.Counter[str] = collections.Counter()

  def visit(name: str, count: int) -> None:
    times[name] += count
    for line in bodies[name]:
      # A loop body runs once per iteration; branches of a conditional count
      # once each.
      loop = _WHILE.search(line)
      if loop:
        visit(loop.group(2), count * _trips(bodies[loop.group(1)]))
        continue
      branches = ",".join(_BRANCHES.findall(line))
      called = _CALLS.findall(line) + re.findall(r"%([\w.\-]+)", branches)
      for other in called:
        visit(other, count)

  visit(entry, 1)
  return times


def _trips(condition: list[str]) -> int:
  """Returns a loop's number of iterations, or 1 if it isn't a constant."""
  ends = [
    m.group(1)
    for m in map(re.compile(r" constant\((\d+)\)").search, condition)
    if m
  ]
  return int(ends[0]) if len(ends) == 1 else 1


def _size(shape: str) -> int:
  """Returns the bytes of an HLO shape, or of a tuple of shapes."""
  return sum(
    # Of other types (f32, s32, u32) an element has 4 bytes.
    _BYTES.get(dtype, 4) * math.prod(int(n) for n in sizes.split(",") if n)
    for dtype, sizes in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shape)
  )


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
