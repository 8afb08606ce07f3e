"""What devices tell each other in a program, read off its partitioned form.

XLA's partitioner turns a program for a mesh into one for a device, and puts in
every collective that the shardings ask for. That is read here, before a backend
merges, reorders or overlaps them: kinds, bytes and mesh axes are the program's
own. A gradient that is added up and then cut is an all-reduce here; TPUs and
GPUs make a reduce-scatter of the two.
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
_INSTRUCTION = re.compile(rf"= (\S+) ({_KINDS})\((.*)")
_WHILE = re.compile(r" while\(.*condition=%([\w.\-]+), body=%([\w.\-]+)")
_CALLS = re.compile(r"(?:to_apply|calls|_computation)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%([\w.\-]+) \(.*\{$")


@dataclasses.dataclass(frozen=True)
class Collective:
  """Collectives of one kind and shape in one place of a program.

  Attributes:
    kind: of the operation.
    axes: mesh axes it goes over.
    shape: of its result on a device, as in bf16[4096,3072].
    bytes: of its result on a device, or of its argument for a reduce-scatter.
    times: it is done in a call; in a loop without a known end, an iteration.
    source: what it is for, as JAX names it.
  """

  kind: str
  axes: tuple[str, ...]
  shape: str
  bytes: int
  times: int
  source: str

  @property
  def total(self) -> int:
    """Bytes a call."""
    return self.bytes * self.times


def collectives(
  lowered: jax.stages.Lowered, mesh: jax.sharding.Mesh
) -> list[Collective]:
  """Returns the collectives of a program, the largest total first.

  Args:
    lowered: for the mesh; it is compiled here.
    mesh: whose devices are numbered from 0 in its own order.
  """
  with tempfile.TemporaryDirectory() as folder:
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
  return [c for c in found if c.axes]  # the others are of one device


def read(text: str, mesh: Any) -> Iterator[Collective]:
  """Yields the collectives of a partitioned program's text."""
  bodies, entry = _computations(text)
  for name, times in _times(bodies, entry).items():
    for line in bodies[name]:
      match = _INSTRUCTION.search(line)
      if match:
        source = _source(line, bodies[name])
        yield _collective(*match.groups(), source, times, mesh)


def _source(line: str, body: list[str]) -> str:
  """Returns where an instruction comes from, or else what reads it first."""
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
  """Returns the lines of every computation, and the name of the first one."""
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
  """Returns how often each computation is done."""
  times: collections.Counter[str] = collections.Counter()

  def visit(name: str, count: int) -> None:
    times[name] += count
    for line in bodies[name]:
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
  """Returns the end that a loop counts to, 1 if the program does not know."""
  ends = [
    m.group(1)
    for m in map(re.compile(r" constant\((\d+)\)").search, condition)
    if m
  ]
  return int(ends[0]) if len(ends) == 1 else 1


def _size(shape: str) -> int:
  """Returns the bytes of a shape or of a tuple of shapes."""
  return sum(
    _BYTES.get(dtype, 4) * math.prod(int(n) for n in sizes.split(",") if n)
    for dtype, sizes in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shape)
  )


# MARK: groups of devices


def _first_group(rest: str) -> list[int]:
  """Returns the devices that a collective's first group is of.

  They are written as lists, as a grid that is turned and cut, or as named axes
  of such a grid.
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
  """Reads mesh['a'=4,'b'=64], device_ids=([64,4]T(1,0)) {'a'}."""
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
  """Reads [64,4]T(1,0): devices in a grid, and the order of its axes."""
  shape, _, order = text.partition("T")
  shape = _numbers(shape.strip("[]"))
  ids = np.arange(math.prod(shape)).reshape(shape)
  return ids.transpose(_numbers(order.strip("()"))) if order else ids


def _numbers(text: str) -> list[int]:
  return [int(n) for n in text.split(",")]


def _axes(group: list[int], mesh: Any) -> tuple[str, ...]:
  """Returns the mesh axes that a group of devices lies along."""
  places = np.unravel_index(group, tuple(mesh.shape.values()))
  return tuple(
    axis
    for axis, place in zip(mesh.axis_names, places, strict=True)
    if len(set(place.tolist())) > 1
  )
