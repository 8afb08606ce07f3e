"""What changed between the config a run was started with and another one.

A field that shapes the parameters, the rows or the order of the updates is
marked `fixed` in config.py: with another value the run would be neither
the old one nor a new one. All others may change whenever a run is resumed.
"""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from mdm_jax.config import Config
from mdm_jax.core import fields
from mdm_jax.core.errors import UserError

# Only their product, the rows of an update, decides what is learned.
_FACTORS = "data.batch_size", "optimizer.accumulation"
# The last stage may go on for longer; what came before it is done.
_ENDS = "updates", "epochs"
_COUNT = "number of stages"
_HEADER = "field", "saved", "now"


@dataclasses.dataclass(frozen=True)
class Change:
  """A field with another value, by its name on the command line."""

  path: str
  before: Any
  after: Any


@dataclasses.dataclass(frozen=True)
class Changes:
  """All changes: those that would make it another run, and the others."""

  fatal: tuple[Change, ...]
  benign: tuple[Change, ...]


def compare(saved: Config, now: Config) -> Changes:
  """Returns what differs, each change in the order of the config's fields."""
  found = list(_changes(saved, now))
  kept = lambda change, fixed: fixed and not _allowed(change, saved, now)
  return Changes(
    tuple(change for change, fixed in found if kept(change, fixed)),
    tuple(change for change, fixed in found if not kept(change, fixed)),
  )


def check(saved: Config, now: Config) -> tuple[Change, ...]:
  """Returns the changes a run can go on with, to be told.

  Raises:
    UserError: a field that a run keeps has changed; a table says from what.
  """
  changes = compare(saved, now)
  if changes.fatal:
    raise UserError(
      "this run was started with other settings: give another --workdir, or"
      f" take the saved values back\n{table(changes.fatal)}"
    )
  return changes.benign


def table(changes: tuple[Change, ...]) -> str:
  """Returns one aligned line a change under a header, indented by two."""
  cells = [
    _HEADER,
    *((c.path, _text(c.before), _text(c.after)) for c in changes),
  ]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  lines = (
    "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True))
    for row in cells
  )
  return "\n".join(f"  {line.rstrip()}" for line in lines)


def _text(value: Any) -> str:
  """Writes a value as a flag takes it; quoted if it would not be seen."""
  plain = not isinstance(value, str) or (value and value.isprintable())
  return str(value) if plain else json.dumps(value)


def _changes(
  before: Any, after: Any, prefix: str = ""
) -> Iterator[tuple[Change, bool]]:
  """Yields every changed field under two sections, and whether it is fixed."""
  for field in dataclasses.fields(before):
    if not hasattr(after, field.name):
      continue  # of another objective; that is told by its name
    old, new = getattr(before, field.name), getattr(after, field.name)
    path = fields.path_of(prefix, field)
    if dataclasses.is_dataclass(old):
      yield from _changes(old, new, path)
    elif path == "stages":
      yield from _stage_changes(old, new)
    elif old != new:
      yield Change(path, old, new), field.metadata.get("fixed", False)


def _stage_changes(
  before: tuple[Any, ...], after: tuple[Any, ...]
) -> Iterator[tuple[Change, bool]]:
  if len(before) != len(after):
    yield Change(_COUNT, len(before), len(after)), True
  for i, (old, new) in enumerate(zip(before, after, strict=False)):
    yield from _changes(old, new, f"stages[{i}]")


def _allowed(change: Change, saved: Config, now: Config) -> bool:
  """Whether a fixed field may have changed, given the rest of the config."""
  if change.path in _FACTORS:
    return saved.rows_per_update == now.rows_per_update
  if len(saved.stages) != len(now.stages):
    return False
  last = f"stages[{len(saved.stages) - 1}]"
  return change.path in {f"{last}.{name}" for name in _ENDS}
