"""Reads HLO text, the form in which XLA prints its programs.

A program is a set of computations. One of them is the entry; the bodies of
loops, the branches of conditionals and the insides of fusions are others. An
instruction is one line of a computation:

  %name = bf16[8,4]{1,0} dot(%left, %right), lhs_contracting_dims={1}, ...
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_COMPUTATION = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(
  r"(ROOT )?%([\w.\-]+) = (\(.*?\)|\w+\[[\d,]*\](?:\{[^}]*\})?) ([\w\-]+)\((.*)"
)
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
  r"(?:to_apply|calls|branch_computations|true_computation|false_computation)="
  r"(\{[^}]*\}|%[\w.\-]+)"
)
# Operations whose computations are run as a part of the program. A fusion's is
# one kernel; that of a reduction or a sort is applied to two elements.
_CALLS = ("call", "conditional", "async-start")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: unique within the computation.
    shape: of the result, as in bf16[8,4]{1,0}; a tuple's in brackets.
    op: the operation, as in `dot`.
    rest: all that stands behind the operation's opening bracket.
    root: whether it is the result of the computation.
  """

  name: str
  shape: str
  op: str
  rest: str
  root: bool

  @functools.cached_property
  def operands(self) -> tuple[str, ...]:
    """Names of the instructions whose results this one reads."""
    return tuple(_NAME.findall(self.rest.split("), ")[0]))

  @property
  def source(self) -> str:
    """JAX's name of the operation that it belongs to, or ""."""
    return self.attribute(r'op_name="([^"]*)"') or ""

  def attribute(self, pattern: str) -> str | None:
    """Returns the first group of a regular expression in `rest`, or None."""
    found = re.search(pattern, self.rest)
    return found and found.group(1)


# Instructions by name, in the order in which they are printed.
Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Program:
  """The computations of a program, by name, and the name of the entry."""

  computations: dict[str, Computation]
  entry: str

  def runs(self) -> Iterator[tuple[Instruction, Computation, int]]:
    """Yields what one call of the program runs.

    A loop's body is run once per iteration; without a known number of them it
    counts as one. Each branch of a conditional counts once.

    Yields:
      An instruction, the computation it stands in, and how often it is run.
      Loops and calls themselves are left out, fusions are not entered.
    """
    yield from self._runs(self.entry, 1)

  def _runs(self, name: str, times: int):
    inside = self.computations[name]
    for instruction in inside.values():
      if instruction.op == "while":
        body = instruction.attribute(r"body=%([\w.\-]+)")
        yield from self._runs(body, times * self._trips(instruction))
      elif instruction.op in _CALLS:
        for called in self.called(instruction):
          yield from self._runs(called, times)
      else:
        yield instruction, inside, times

  def called(self, instruction: Instruction) -> list[str]:
    """Returns the names of the computations that an instruction calls."""
    groups = _CALLED.findall(instruction.rest)
    return [name for group in groups for name in _NAME.findall(group)]

  def _trips(self, loop: Instruction) -> int:
    """Returns a loop's number of iterations, or 1 if it isn't known."""
    # The compiler writes it down only late; before, it is the constant that the
    # condition compares with.
    known = loop.attribute(r'known_trip_count":\{"n":"(\d+)"')
    if known:
      return int(known)
    condition = self.computations[loop.attribute(r"condition=%([\w.\-]+)")]
    ends = [
      int(i.rest.split(")")[0])
      for i in condition.values()
      if i.op == "constant" and re.match(r"\d+\)", i.rest)
    ]
    return ends[0] if len(ends) == 1 else 1


def parse(text: str) -> Program:
  """Parses HLO text."""
  computations: dict[str, Computation] = {}
  name = entry = ""
  for line in text.splitlines():
    start = _COMPUTATION.match(line)
    found = _INSTRUCTION.match(line.lstrip())
    if start:
      name = start.group(2)
      computations[name] = {}
      entry = name if start.group(1) else entry
    elif name and found:
      root, *parts = found.groups()
      instruction = Instruction(*parts, root=bool(root))
      computations[name][instruction.name] = instruction
  return Program(computations, entry)


# MARK: shapes


def size_of(shape: str) -> int:
  """Returns the bytes of a shape, or of a tuple of shapes."""
  return sum(
    math.prod(_numbers(sizes)) * max(int(bits or 8) // 8, 1)
    for _, bits, sizes in _ARRAY.findall(shape)
  )


def dtype_of(shape: str) -> str:
  """Returns the dtype of a shape, or of the first of a tuple."""
  return _ARRAY.search(shape).group(1)


def sizes_of(shape: str) -> list[int]:
  """Returns the size of every axis of a shape, or of the first of a tuple."""
  return _numbers(_ARRAY.search(shape).group(3))


def _numbers(text: str) -> list[int]:
  return [int(n) for n in text.split(",") if n]
