"""Tasks whose answers can be checked exactly: `task:NAME`, generated.

A task draws problems from a seed: a prompt and one right answer. `right` says
of any answer whether it solves a prompt, so a problem may have several. An
answer is behind its prompt, or where [MASK] stands in it. A task
is named `task:NAME` or `task:NAME:SEED`; it has `COUNT` different problems, or
`data.max_documents`, which are split like the documents of any corpus. So no
problem is in two splits.
"""

import dataclasses
import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

from mdm_jax.core.errors import UserError
from mdm_jax.core.registry import Registry
from mdm_jax.data import answers
from mdm_jax.data.config import DataConfig
from mdm_jax.data.text_files import Document

COUNT = 20_000
HOLE = "[MASK]"
_PATIENCE = 100  # draws per problem, before there seem to be no new ones


@dataclasses.dataclass(frozen=True)
class Task:
  """A kind of problem.

  Attributes:
    draw: (random numbers) -> a prompt and a right answer.
    right: (prompt, answer) -> whether the answer is right.
    in_text: whether its answers are holes in the prompts.
  """

  draw: Callable[[random.Random], tuple[str, str]]
  right: Callable[[str, str], bool]
  in_text: bool = False


TASKS: Registry[Task] = Registry("task", "data.corpus=task")


def of_corpus(corpus: str) -> Task | None:
  """Returns the task of a corpus; None if it is no task."""
  kind, _, name = corpus.partition(":")
  return TASKS[name.partition(":")[0]] if kind == "task" else None


def has_holes(corpus: str) -> bool:
  """Returns whether a corpus is a task whose answers are holes in prompts."""
  task = of_corpus(corpus)
  return task is not None and task.in_text


def read(name: str, _: Any, data: DataConfig) -> Iterator[Document]:
  """Yields the problems of NAME or NAME:SEED as documents with answers.

  Raises:
    UserError: there is no such task, the seed is no number, or it hasn't as
      many different problems.
  """
  name, _, seed = name.partition(":")
  TASKS.check(name, "data.corpus=task")
  if seed and not seed.isdecimal():
    raise UserError(f"data.corpus=task:{name}:{seed}: the seed is not a number")
  draw, known = random.Random(f"{name} {seed or 0}"), set()
  count = data.max_documents or COUNT
  for number in range(count):
    for _ in range(_PATIENCE):
      prompt, answer = TASKS[name].draw(draw)
      if prompt not in known:
        break
    else:
      raise UserError(
        f"task:{name} has no {count:,} different problems; set"
        f" data.max_documents to {number:,} or less"
      )
    known.add(prompt)
    yield Document(f"{name}:{number}", _document(prompt, answer))


def _document(prompt: str, answer: str) -> str:
  before, hole, behind = prompt.partition(HOLE)
  if hole:
    return answers.hole(before, answer, behind)
  return answers.exchange(prompt, answer)


# MARK: sudoku

_SIDE = 4
_CELLS = [divmod(cell, _SIDE) for cell in range(_SIDE**2)]


def _box(row: int, column: int) -> int:
  return row // 2 * 2 + column // 2


def _may_hold(grid: list[str], at: int, digit: str) -> bool:
  """Returns whether no other cell of the row, column or box has the digit."""
  row, column = _CELLS[at]
  return not any(
    grid[i] == digit
    and i != at
    and (r == row or c == column or _box(r, c) == _box(row, column))
    for i, (r, c) in enumerate(_CELLS)
  )


def _solutions(grid: list[str], most: int = 2) -> list[str]:
  """Returns up to `most` ways to fill the empty cells, "."."""
  if "." not in grid:
    return ["".join(grid)]
  at, found = grid.index("."), []
  for digit in "1234":
    if _may_hold(grid, at, digit):
      found += _solutions([*grid[:at], digit, *grid[at + 1 :]], most)
    if len(found) >= most:
      break
  return found[:most]


@functools.lru_cache
def _grids() -> list[str]:
  """Returns all 288 full grids."""
  return _solutions(["."] * _SIDE**2, most=10**6)


def _draw_sudoku(draw: random.Random) -> tuple[str, str]:
  grid = draw.choice(_grids())
  puzzle = list(grid)
  # Cells are emptied while there is one solution, 8 to 10 of them.
  order = draw.sample(range(_SIDE**2), _SIDE**2)
  most = draw.randint(8, 10)
  for at in order:
    if puzzle.count(".") == most:
      break
    kept, puzzle[at] = puzzle[at], "."
    if len(_solutions(puzzle)) > 1:
      puzzle[at] = kept
  return "".join(puzzle) + "=", grid


def _right_sudoku(prompt: str, answer: str) -> bool:
  puzzle = prompt.removesuffix("=")
  if len(answer) != len(puzzle) or set(answer) - set("1234"):
    return False
  kept = all(p in (".", a) for p, a in zip(puzzle, answer, strict=True))
  return kept and all(
    _may_hold([*answer], i, digit) for i, digit in enumerate(answer)
  )


TASKS.register("sudoku", Task(_draw_sudoku, _right_sudoku))


# MARK: numbers


def _draw_addition(draw: random.Random) -> tuple[str, str]:
  # First the number of digits: else nearly all numbers would have four.
  a, b = (draw.randrange(10 ** draw.randint(1, 4)) for _ in range(2))
  return f"{a}+{b}=", str(a + b)


def _right_addition(prompt: str, answer: str) -> bool:
  a, b = prompt.removesuffix("=").split("+")
  return answer == str(int(a) + int(b))


TASKS.register("addition", Task(_draw_addition, _right_addition))


def _draw_sorting(draw: random.Random) -> tuple[str, str]:
  digits = draw.choices("0123456789", k=draw.randint(2, 10))
  return "".join(digits) + "=", "".join(sorted(digits))


def _right_sorting(prompt: str, answer: str) -> bool:
  return answer == "".join(sorted(prompt.removesuffix("=")))


TASKS.register("sorting", Task(_draw_sorting, _right_sorting))


# MARK: a grammar

_LONGEST = 8  # brackets of a hole
_PAIRS = {"(": ")", "[": "]", "{": "}"}


def _draw_brackets(draw: random.Random) -> tuple[str, str]:
  text, open_ones = "", []
  for _ in range(draw.randint(4, 14)):
    if open_ones and draw.random() < 0.4:
      text += open_ones.pop()
    else:
      left = draw.choice([*_PAIRS])
      text += left
      open_ones.append(_PAIRS[left])
  if not open_ones:
    return _draw_brackets(draw)
  return text + "=", "".join(reversed(open_ones))


def _right_brackets(prompt: str, answer: str) -> bool:
  open_ones = []
  for mark in prompt.removesuffix("=") + answer:
    if mark in _PAIRS:
      open_ones.append(_PAIRS[mark])
    elif not open_ones or open_ones.pop() != mark:
      return False
  return not open_ones


TASKS.register("brackets", Task(_draw_brackets, _right_brackets))


def _draw_middle(draw: random.Random) -> tuple[str, str]:
  # Some of the open brackets are closed behind the hole, so that how many it
  # closes is only known from both sides.
  prompt, closing = _draw_brackets(draw)
  size = draw.randint(1, min(len(closing), _LONGEST))
  return prompt[:-1] + HOLE + closing[size:] + ".", closing[:size]


def _right_middle(prompt: str, answer: str) -> bool:
  before, _, behind = prompt.removesuffix(".").partition(HOLE)
  return _right_brackets(before + "=", answer + behind)


TASKS.register("middle", Task(_draw_middle, _right_middle, in_text=True))
