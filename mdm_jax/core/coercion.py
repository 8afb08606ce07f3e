"""Plain values, as JSON has them, to a dataclass's types."""

import dataclasses
import types
import typing
from typing import Any, Literal

from mdm_jax.core.errors import UserError, nearest


def coerce(value: Any, hint: Any, path: str) -> Any:
  """Checks one value against a type hint, turning lists into tuples.

  Raises:
    UserError: a wrong name or type, with its dotted path.
  """
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if dataclasses.is_dataclass(hint):
    return _dataclass(value, hint, path)
  if origin in (types.UnionType, typing.Union):
    if value is None and type(None) in args:
      return None
    return coerce(value, args[0], path)
  if origin is Literal:
    if value not in args:
      raise UserError(f"{path}={value!r}: {nearest(value, args)}")
    return value
  if origin is tuple and isinstance(value, list | tuple):
    hints = args[:1] * len(value) if args[-1] is Ellipsis else args
    if len(hints) == len(value):
      return tuple(
        coerce(v, h, f"{path}[{i}]")
        for i, (v, h) in enumerate(zip(value, hints, strict=True))
      )
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if isinstance(hint, type) and type(value) is hint:
    return value
  name = hint.__name__ if isinstance(hint, type) and not args else str(hint)
  raise UserError(f"{path}={value!r} is not a {name}")


def _dataclass(value: Any, cls: type, path: str) -> Any:
  if not isinstance(value, dict):
    raise UserError(f"{path or 'config'}={value!r} is not a section")
  hints = {f.name: f.type for f in dataclasses.fields(cls)}
  prefix = f"{path}." if path else ""
  for key in value:
    if key not in hints:
      raise UserError(f"unknown field {prefix}{key}; {nearest(key, hints)}")
  return cls(
    **{k: coerce(v, hints[k], f"{prefix}{k}") for k, v in value.items()}
  )
