"""What a field of the configuration says of itself: doc, bounds, registry.

Bounds are written as in mathematics: "[0, 1]" has both ends, "(0, 1)" none of
them, "-1 or [1, 64]" one number more. Of a field with several numbers they are
those of each. A registry is written as "package.module:NAME"; the field's value
is then the name of a piece in it. A section that is `flat` is written without a
name of its own: its fields stand beside it.

What the fields of a section must be together is in its method `check(path)`,
which is called once each of them can be right.
"""

import dataclasses
import functools
import os
import re
from typing import Any, NamedTuple

from mdm_jax.core import registry
from mdm_jax.core.errors import UserError

COUNT = "[0, 2147483647]"  # what is counted fits 32 bits
POSITIVE = "[1, 2147483647]"
MANY = "[1, 9007199254740991]"  # of what may be more
SIZE = "[1, 1048576]"  # of an axis
SHARE = "[0, 1]"

_INTERVAL = re.compile(r"([\[(])(\S+), (\S+)([\])])")


class _Interval(NamedTuple):
  low: int | float
  high: int | float
  has_low: bool
  has_high: bool

  def has(self, value: int | float) -> bool:
    above = value >= self.low if self.has_low else value > self.low
    below = value <= self.high if self.has_high else value < self.high
    return above and below


def field(default: Any, doc: str, bounds: str = "", **more: Any) -> Any:
  """A field.

  Args:
    default: its value if none is given.
    doc: one line.
    bounds: of a number, or of each of several.
    **more: `path=True`, a file or folder, which may begin with ~;
      `registry="package.module:NAME"`, where its possible values are listed;
      `flat=True`, a section whose fields stand beside it.
  """
  metadata = {"doc": doc, "bounds": bounds, **more}
  return dataclasses.field(default=default, metadata=metadata)


def fixed(default: Any, doc: str, bounds: str = "", **more: Any) -> Any:
  """A field whose value a run keeps: with another it is another run."""
  return field(default, doc, bounds, fixed=True, **more)


def at_home(path: str) -> str:
  """Returns a path as the file system takes it: ~ is the home folder."""
  return os.path.expanduser(path)


def check(value: Any, path: str = "") -> None:
  """Checks every field under a section, and what they are together.

  Raises:
    UserError: a number is out of bounds, a name isn't registered, or fields
      don't go together.
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
    raise UserError(f"{path}={value} must be {told(limits)}")
  elif pieces and value != at.default:  # a default needs no slow import
    registry.resolve(pieces).check(value, path)


def allows(bounds: str, value: int | float) -> bool:
  """Returns whether a number is within bounds; one that is NaN never is."""
  return any(interval.has(value) for interval in _parsed(bounds))


def told(bounds: str) -> str:
  """Returns bounds as they go on after "must be"."""
  return re.sub(r"(?<!\S)(?=[\[(])", "in ", bounds)


@functools.cache
def _parsed(bounds: str) -> tuple[_Interval, ...]:
  parts = []
  for part in bounds.split(" or "):
    found = _INTERVAL.fullmatch(part)
    if found:
      low, high = _number(found[2]), _number(found[3])
      parts.append(_Interval(low, high, found[1] == "[", found[4] == "]"))
    else:
      parts.append(_Interval(_number(part), _number(part), True, True))
  return tuple(parts)


def _number(text: str) -> int | float:
  return int(text) if re.fullmatch(r"-?[0-9]+", text) else float(text)
