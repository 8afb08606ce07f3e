"""Config fields with metadata: a description, bounds, a registry; and checks.

Bounds are written as intervals: "[0, 1]" includes both ends, "(0, 1)" neither,
"-1 or [1, 64]" also allows -1. They apply to each number of a tuple. A registry
is given as "package.module:NAME"; the field's value is then a name in it. The
fields of a `flat` section are written in its parent, without the section's
name.

A section's method `check(path)` validates combinations of fields. It is called
after each field has been checked by itself.
"""

import dataclasses
import functools
import re
from typing import Any

from mdm_jax.core import registry
from mdm_jax.core.errors import UserError

COUNT = "[0, 2147483647]"  # counters are int32
POSITIVE = "[1, 2147483647]"
MANY = "[1, 9007199254740991]"  # beyond int32, but still exact as a float
SIZE = "[1, 1048576]"  # of an array's axis
SHARE = "[0, 1]"

_INTERVAL = re.compile(r"([\[(])(\S+), (\S+)([\])])")


def field(default: Any, doc: str, bounds: str = "", **more: Any) -> Any:
  """Declares a config field that may change when a run is resumed.

  Args:
    default: the default value.
    doc: one line for help texts and docs/configuration.md.
    bounds: of the number, or of each number of a tuple.
    **more: `path=True` for a file or folder, which may begin with ~;
      `registry="package.module:NAME"` for a name in a registry; `flat=True` for
      a section whose fields are written in its parent.
  """
  metadata = {"doc": doc, "bounds": bounds, **more}
  return dataclasses.field(default=default, metadata=metadata)


def fixed(default: Any, doc: str, bounds: str = "", **more: Any) -> Any:
  """Declares a config field that may not change when a run is resumed."""
  return field(default, doc, bounds, fixed=True, **more)


def check(value: Any, path: str = "") -> None:
  """Checks all fields of a section and its subsections.

  Args:
    value: the section, a dataclass.
    path: its dotted path, "" for the whole config.

  Raises:
    UserError: a number is out of bounds, a name isn't registered, or fields
      contradict each other.
  """
  for at in dataclasses.fields(value):
    _check(getattr(value, at.name), path_of(path, at), at)
  if hasattr(value, "check"):
    value.check(path)


def path_of(parent: str, at: dataclasses.Field[Any]) -> str:
  """Returns the dotted path of a section's field."""
  if at.metadata.get("flat"):
    return parent
  return f"{parent}.{at.name}" if parent else at.name


def _check(value: Any, path: str, at: dataclasses.Field[Any]) -> None:
  limits, pieces = at.metadata.get("bounds"), at.metadata.get("registry")
  if dataclasses.is_dataclass(value):
    check(value, path)
  elif isinstance(value, tuple):
    for i, item in enumerate(value):
      _check(item, f"{path}[{i}]", at)
  elif limits and value is not None and not allows(limits, value):
    raise UserError(f"{path}={value} must be {in_words(limits)}")
  # Defaults are valid: skip importing the registry's module, which is slow.
  elif pieces and value != at.default:
    registry.resolve(pieces).check(value, path)


def allows(bounds: str, value: int | float) -> bool:
  """Returns whether a number is within bounds; NaN never is."""
  return any(
    (low <= value if left == "[" else low < value)
    and (value <= high if right == "]" else value < high)
    for left, low, high, right in _parsed(bounds)
  )


def in_words(bounds: str) -> str:
  """Returns bounds in words, to follow "must be"."""
  return re.sub(r"(?<!\S)(?=[\[(])", "in ", bounds)


@functools.cache
def _parsed(bounds: str) -> list[tuple[str, int | float, int | float, str]]:
  parts = []
  for part in bounds.split(" or "):
    found = _INTERVAL.fullmatch(part)
    left, low, high, right = found.groups() if found else ("[", part, part, "]")
    parts.append((left, _number(low), _number(high), right))
  return parts


def _number(text: str) -> int | float:
  return int(text) if re.fullmatch(r"-?[0-9]+", text) else float(text)
