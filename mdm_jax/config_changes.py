"""Compares the config of a resumed run with the one it was started with.

Fields that shape the parameters, the rows or the order of the updates are
declared with `core.fields.fixed`: with another value, a resumed run would be
neither the old one nor a new one. All other fields may change at any resume.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
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
  """A changed field, under its name on the command line.

  Attributes:
    path: the field.
    before: its value in the saved config.
    after: its value now.
    fatal: whether the change would make it another run.
  """

  path: str
  before: Any
  after: Any
  fatal: bool = False


def compare(saved: Config, now: Config) -> tuple[Change, ...]:
  """Returns the fields that differ, in the config's own order."""
  before, after = dict(_values(saved)), dict(_values(now))
  # Fields of another objective, or of a stage that only one config has, are
  # not compared: the objective's name and the number of stages are.
  return tuple(
    Change(path, old, after[path][0], fixed and not _allowed(path, saved, now))
    for path, (old, fixed) in before.items()
    if path in after and old != after[path][0]
  )


def check(saved: Config, now: Config) -> tuple[Change, ...]:
  """Returns the changes that a run can be resumed with, for the log.

  Raises:
    UserError: a fixed field has changed; the message lists both values.
  """
  changes = compare(saved, now)
  fatal = [change for change in changes if change.fatal]
  if fatal:
    raise UserError(
      "this run was started with other settings: use another --workdir, or"
      f" restore the saved values\n{table(fatal)}"
    )
  return changes


def table(changes: Sequence[Change]) -> str:
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


def _values(
  section: Any, path: str = ""
) -> Iterator[tuple[str, tuple[Any, bool]]]:
  """Yields the path of every field, its value and whether it is fixed."""
  for field in dataclasses.fields(section):
    value, name = getattr(section, field.name), fields.path_of(path, field)
    if dataclasses.is_dataclass(value):
      yield from _values(value, name)
    elif name == "stages":
      yield _COUNT, (len(value), True)
      for i, stage in enumerate(value):
        yield from _values(stage, f"stages[{i}]")
    else:
      yield name, (value, field.metadata.get("fixed", False))


def _allowed(path: str, saved: Config, now: Config) -> bool:
  """Returns whether a fixed field may change, given the whole config."""
  if path in _FACTORS:
    return saved.rows_per_update == now.rows_per_update
  # Only a stage that is the last one in both may become longer.
  last = f"stages[{len(saved.stages) - 1}]"
  return len(saved.stages) == len(now.stages) and path in {
    f"{last}.{name}" for name in _ENDS
  }
