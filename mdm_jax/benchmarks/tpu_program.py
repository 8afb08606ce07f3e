"""Lists the largest arrays and the Pallas kernels of a program for TPUs."""

import collections
import dataclasses
import re

from mdm_jax.benchmarks import hlo

# They give a value another name or shape; they make no array.
_FREE = (
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast"),
  "opt-barrier",
)
_KERNEL = 'custom_call_target="tpu_custom_call"'
_ARRAY = re.compile(r"\w+\[[\d,]+\]")
# The compiler numbers what has the same name.
_NUMBER = re.compile(r"[.\d]+$")


@dataclasses.dataclass(frozen=True)
class Array:
  """An array that a program computes, on one device.

  Attributes:
    shape: as in bf16[8,4].
    bytes: its size, without what the compiler adds to fill its tiles.
    places: instructions of the program that give such an array.
    source: JAX's name of the operation that the first of them belongs to.
  """

  shape: str
  bytes: int
  places: int
  source: str


def arrays(text: str) -> list[Array]:
  """Returns what a program computes, by shape, the largest first.

  A result that a loop hands on, or that is copied, counts in every place. What
  exists inside a fusion or a kernel only is left out.

  Args:
    text: the optimised program, from `jax.stages.Compiled.as_text`.
  """
  found: dict[str, Array] = {}
  for instruction, _, _ in hlo.parse(text).runs():
    if instruction.op in _FREE or instruction.op.endswith("-done"):
      continue
    for shape in _ARRAY.findall(instruction.shape):
      size, source = hlo.size_of(shape), instruction.source
      known = found.get(shape, Array(shape, size, 0, source))
      found[shape] = dataclasses.replace(
        known, places=known.places + 1, source=known.source or source
      )
  return sorted(found.values(), key=lambda array: -array.bytes)


def kernels(text: str) -> dict[str, int]:
  """Returns how often one call of a program runs each Pallas kernel, by name.

  Args:
    text: the optimised program.
  """
  times: collections.Counter[str] = collections.Counter()
  for instruction, _, count in hlo.parse(text).runs():
    if _KERNEL in instruction.rest:
      times[_NUMBER.sub("", instruction.name)] += count
  return dict(times)
