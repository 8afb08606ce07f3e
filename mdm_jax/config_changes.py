"""Compares the config of a resumed run with the one it was started with.

Fields that shape the parameters, the rows or the order of the updates are
declared with `core.fields.fixed`: with another value, a resumed run would be
neither the old one nor a new one. All other fields may change at any resume.
"""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from mdm_jax.config import Config
from mdm_jax.core import fields
from mdm_jax.core.errors import UserError

# Only their product, the rows per update, affects what is learned.
_FACTORS = "data.batch_size", "optimizer.accumulation"
# The last stage may be made longer; the stages before it are over.
_ENDS = "updates", "epochs"
_COUNT = "number of stages"
_HEADER = "field", "saved", "now"


@dataclasses.dataclass(frozen=True)
class Change:
  """A changed field, under its name on the command line."""

  path: str
  before: Any
  after: Any


@dataclasses.dataclass(frozen=True)
class Changes:
  """All changed fields.

  Attributes:
    fatal: changes that would make it another run.
    benign: changes that a run can be resumed with.
  """

  fatal: tuple[Change, ...]
  benign: tuple[Change, ...]


def compare(saved: Config, now: Config) -> Changes:
  """Returns the fields that differ, in the config's own order."""
  found = list(_changes(saved, now))
  kept = lambda change, fixed: fixed and not _allowed(change, saved, now)
  return Changes(
    tuple(change for change, fixed in found if kept(change, fixed)),
    tuple(change for change, fixed in found if not kept(change, fixed)),
  )


def check(saved: Config, now: Config) -> tuple[Change, ...]:
  """Returns the changes that a run can be resumed with, for the log.

  Raises:
    UserError: a fixed field has changed; the message lists both values.
  """
  changes = compare(saved, now)
  if changes.fatal:
    raise UserError(
      "this run was started with other settings: give another --workdir, or"
      f" take the saved values back\n{table(changes.fatal)}"
    )
  return changes.benign


def table(changes: tuple[Change, ...]) -> str:
  """Returns an aligned table of changes, indented by two spaces."""
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
  """Formats a value as a flag takes it; quotes what would be invisible."""
  plain = not isinstance(value, str) or (value and value.isprintable())
  return str(value) if plain else json.dumps(value)


def _changes(
  before: Any, after: Any, prefix: str = ""
) -> Iterator[tuple[Change, bool]]:
  """Yields the fields that differ, and whether each is fixed."""
  for field in dataclasses.fields(before):
    if not hasattr(after, field.name):
      continue  # another objective's: its name is among the changes
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
    # Fatal; the stages that both configs have are compared as well.
    yield Change(_COUNT, len(before), len(after)), True
  for i, (old, new) in enumerate(zip(before, after, strict=False)):
    yield from _changes(old, new, f"stages[{i}]")


def _allowed(change: Change, saved: Config, now: Config) -> bool:
  """Returns whether a fixed field may change, given the whole config."""
  if change.path in _FACTORS:
    return saved.rows_per_update == now.rows_per_update
  # Only a stage that is the last one in both may become longer.
  if len(saved.stages) != len(now.stages):
    return False
  last = f"stages[{len(saved.stages) - 1}]"
  return change.path in {f"{last}.{name}" for name in _ENDS}
