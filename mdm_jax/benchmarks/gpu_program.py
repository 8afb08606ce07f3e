"""Lists the kernels of a program compiled for a GPU, and predicts their time.

A kernel takes at least the time of its memory traffic and that of its products;
the longer of the two is its prediction (the roofline model: Williams, Waterman
and Patterson 2009, doi:10.1145/1498765.1498785). Traffic and operations are
read from the compiled program's text, so no GPU is needed. Nothing is timed:
the arithmetic between products, the time to launch a kernel and what a GPU
loses while its last blocks finish are not in the prediction.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from mdm_jax.benchmarks import collectives, hlo
from mdm_jax.benchmarks.hlo import Computation, Instruction, Program

# They give a value another name or shape, without a kernel.
_FREE = (
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast"),
  *("after-all", "partition-id", "replica-id", "opt-barrier"),
)
_SAME_ELEMENTS = ("bitcast", "reshape", "copy", "convert")
_SLICES = ("slice", "dynamic-slice", "gather")
# Of a library call's results, an array of bytes is its scratch space.
_SCRATCH = re.compile(r"\b[us]8\[[\d,]*\]")
_PLACES = re.compile(r"(?:while|body|closed_call|checkpoint|shard_map)/")
_TRITON = "__gpu$xla.gpu.triton"
_CUDNN_ATTENTION = "__cudnn$fmha"
# A flash attention's gradient has five products where the forward pass has two.
_GRADIENT_PRODUCTS = 2.5


@dataclasses.dataclass(frozen=True)
class Rates:
  """What a GPU sustains, per second.

  Attributes:
    memory: bytes, read and written.
    half: operations of products of bfloat16 or float16.
    float32: operations of products of float32, in TF32 as XLA runs them.
    attention: operations of cuDNN's flash attention and its gradient.
  """

  memory: float
  half: float
  float32: float
  attention: float


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A kernel, with all its runs in one call of the program.

  Attributes:
    name: of the instruction.
    kind: what it does, as in `product of bf16`.
    times: runs.
    bytes: read from and written to the GPU's memory by all runs.
    operations: of products and of cuDNN's attention in all runs; those of other
      kernels, such as Triton's, are not counted.
    seconds: predicted for all runs; 0 for a collective, as it depends on what
      connects the GPUs.
    source: JAX's name of the operation that it belongs to.
  """

  name: str
  kind: str
  times: int
  bytes: int
  operations: int
  seconds: float
  source: str

  def __str__(self) -> str:
    """Formats as the kind and the source, without its loops and calls."""
    return f"{self.kind}: {_PLACES.sub('', self.source)}"


@dataclasses.dataclass(frozen=True)
class _Work:
  """What one run of a kernel does."""

  kind: str
  bytes: int
  operations: int = 0

  def seconds(self, rates: Rates) -> float:
    """Returns the predicted time."""
    if self.kind in collectives.KINDS:
      return 0.0
    rate = rates.half
    if self.kind.startswith("attention"):
      rate = rates.attention
    elif "f32" in self.kind.split():
      rate = rates.float32
    return max(self.bytes / rates.memory, self.operations / rate)


def kernels(text: str, rates: Rates) -> list[Kernel]:
  """Returns a program's kernels, those that take longest first.

  Args:
    text: the optimised program, from `jax.stages.Compiled.as_text`.
    rates: of the GPU that it is compiled for.
  """
  program = hlo.parse(text)
  found = []
  for instruction, inside, times in program.runs():
    # The second half of an asynchronous operation only waits.
    if instruction.op in _FREE or instruction.op.endswith("-done"):
      continue
    work = _work(instruction, inside, program)
    found.append(
      Kernel(
        name=instruction.name,
        kind=work.kind,
        times=times,
        bytes=times * work.bytes,
        operations=times * work.operations,
        seconds=times * work.seconds(rates),
        source=instruction.source,
      )
    )
  return sorted(found, key=lambda kernel: -kernel.seconds)


def sums(
  found: Iterable[Kernel], group: Callable[[Kernel], str]
) -> dict[str, dict[str, Any]]:
  """Sums kernels up by group, that with most time first.

  Args:
    found: kernels.
    group: the group of a kernel; `str` puts those of unrolled layers together,
      which are of the same kind and source.

  Returns:
    `times`, `bytes`, `operations` and `seconds`, by group.
  """
  groups: dict[str, dict[str, Any]] = collections.defaultdict(
    lambda: {"times": 0, "bytes": 0, "operations": 0, "seconds": 0.0}
  )
  for kernel in found:
    total = groups[group(kernel)]
    for name in total:
      total[name] += getattr(kernel, name)
  return dict(sorted(groups.items(), key=lambda item: -item[1]["seconds"]))


def _work(
  instruction: Instruction, inside: Computation, program: Program
) -> _Work:
  op = instruction.op
  if op == "fusion":
    return _fusion(instruction, program)
  if op == "custom-call":
    return _library_call(instruction, inside)
  if op == "dot":
    return dataclasses.replace(
      _product(instruction, inside), bytes=_traffic(instruction, inside)
    )
  if op.removesuffix("-start") in collectives.KINDS:
    return _collective(instruction, inside)
  if op in _SLICES:
    return _Work(op, 2 * hlo.size_of(instruction.shape))
  if op == "dynamic-update-slice":
    return _Work(op, 2 * _written(instruction, inside))
  return _Work(op, _traffic(instruction, inside))


def _traffic(instruction: Instruction, inside: Computation) -> int:
  """Returns the bytes of the result and of all operands."""
  return hlo.size_of(instruction.shape) + _operand_bytes(instruction, inside)


def _operand_bytes(instruction: Instruction, inside: Computation) -> int:
  return sum(hlo.size_of(inside[name].shape) for name in instruction.operands)


def _collective(instruction: Instruction, inside: Computation) -> _Work:
  given = _operand_bytes(instruction, inside)
  whole = hlo.size_of(instruction.shape)
  kind = instruction.op.removesuffix("-start")
  # The result of the first half holds the operands as well, except that of an
  # all-reduce.
  result = whole - given if kind != "all-reduce" else whole
  return _Work(kind, max(given, result))


# MARK: fusions


def _fusion(instruction: Instruction, program: Program) -> _Work:
  (called,) = program.called(instruction)
  body = program.computations[called]
  root = next(inner for inner in body.values() if inner.root)
  moved = _written(root, body) + sum(
    round(_share_read(name, body) * hlo.size_of(inner.shape))
    for name, inner in body.items()
    if inner.op == "parameter"
  )
  inner = [_product(i, body) for i in body.values() if i.op == "dot"]
  inner += [
    _library_call(i, body) for i in body.values() if i.op == "custom-call"
  ]
  # A fused product is called a product: that is what takes its time.
  kind = instruction.attribute(r"kind=k(\w+)").lower() + " fusion"
  kind = inner[-1].kind if inner else kind
  return _Work(kind, moved, sum(work.operations for work in inner))


def _share_read(name: str, body: Computation) -> float:
  """Returns which part of a value the instructions after it read.

  Of a value that is only sliced this is the slices; of one that is updated in
  place, nothing.
  """
  if body[name].root:  # a result, such as a cast value
    return 1.0
  share = 0.0
  for use in body.values():
    if name not in use.operands:
      continue
    if use.op in _SAME_ELEMENTS:
      share += _share_read(use.name, body)
    elif use.operands[0] == name and use.op in _SLICES:
      share += hlo.size_of(use.shape) / hlo.size_of(body[name].shape)
    elif use.operands[0] == name and use.op == "dynamic-update-slice":
      continue
    else:
      return 1.0
  return min(share, 1.0)


def _written(instruction: Instruction, body: Computation) -> int:
  """Returns the bytes written for a result: of an update in place, its part."""
  inner = [body[name] for name in instruction.operands if name in body]
  if instruction.op == "dynamic-update-slice":
    return hlo.size_of(inner[1].shape)
  if instruction.op == "tuple":
    return sum(_written(part, body) for part in inner)
  if instruction.op in ("bitcast", "convert"):
    updated = _written(inner[0], body)
    if updated < hlo.size_of(inner[0].shape):
      return updated
  return hlo.size_of(instruction.shape)


# MARK: products and attention


def _product(instruction: Instruction, inside: Computation) -> _Work:
  """Returns the operations of a matrix product, without its traffic."""
  # The second form is that of cuBLAS calls.
  contracted = instruction.attribute(
    r"lhs_contracting_dims=\{([\d,]*)\}"
  ) or instruction.attribute(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
  shapes = [inside[name].shape for name in instruction.operands[:2]]
  left = hlo.sizes_of(shapes[0])
  axes = [
    int(axis.strip('"')) for axis in (contracted or "").split(",") if axis
  ]
  shared = math.prod(left[axis] for axis in axes)
  dtypes = sorted({hlo.dtype_of(shape) for shape in shapes})
  operations = 2 * shared * math.prod(hlo.sizes_of(instruction.shape))
  return _Work(f"product of {' x '.join(dtypes)}", 0, operations)


def _library_call(instruction: Instruction, inside: Computation) -> _Work:
  target = instruction.attribute(r'custom_call_target="([^"]+)"') or "call"
  moved = _operand_bytes(instruction, inside)
  moved += hlo.size_of(_SCRATCH.sub("", instruction.shape))
  if "gemm" in target or "matmul" in target:
    return dataclasses.replace(_product(instruction, inside), bytes=moved)
  if not target.startswith(_CUDNN_ATTENTION):
    return _Work("Triton kernel" if target == _TRITON else target, moved)
  query, key = (
    hlo.sizes_of(inside[name].shape) for name in instruction.operands[:2]
  )
  batch, queries, heads, size = query
  # Two products: queries x keys, and weights x values.
  operations = 4 * batch * heads * queries * key[1] * size
  if "Backward" not in target:
    return _Work("attention, forward", moved, operations)
  operations = round(_GRADIENT_PRODUCTS * operations)
  return _Work("attention, backward", moved, operations)
