"""Between plain values, as JSON has them, and a dataclass's types."""

import dataclasses
import types
import typing
from typing import Any, Literal

from ml_collections import config_dict

from mdm_jax.core.errors import UserError, nearest
from mdm_jax.core.fields import at_home


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
      raise UserError(f"{path}={value!r}: {nearest(str(value), args)}")
    return value
  if origin is tuple and isinstance(value, list | tuple):
    hints = args[:1] * len(value) if args[-1] is Ellipsis else args
    if len(hints) == len(value):
      return tuple(
        coerce(v, h, f"{path}[{i}]")
        for i, (v, h) in enumerate(zip(value, hints, strict=True))
      )
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    try:
      return float(value)
    except OverflowError:
      digits = len(str(abs(value)))
      raise UserError(f"{path}: {digits} digits are too many") from None
  if isinstance(hint, type) and type(value) is hint:
    return value
  name = hint.__name__ if isinstance(hint, type) and not args else str(hint)
  raise UserError(f"{path}={value!r} is not a {name}")


def _dataclass(value: Any, cls: type, path: str) -> Any:
  if not isinstance(value, dict):
    raise UserError(f"{path or 'config'}={value!r} is not a section")
  hints = {f.name: f.type for f in dataclasses.fields(cls)}
  paths = {f.name for f in dataclasses.fields(cls) if f.metadata.get("path")}
  prefix = f"{path}." if path else ""
  for key in value:
    if key not in hints:
      raise UserError(f"unknown field {prefix}{key}; {nearest(key, hints)}")
  found = {k: coerce(v, hints[k], f"{prefix}{k}") for k, v in value.items()}
  return cls(**{k: at_home(v) if k in paths else v for k, v in found.items()})


def to_config_dict(value: Any) -> config_dict.ConfigDict:
  """Returns a dataclass's fields, locked, each with the type it may have."""
  result = config_dict.ConfigDict()
  for field in dataclasses.fields(value):
    item = getattr(value, field.name)
    if dataclasses.is_dataclass(item):
      item = to_config_dict(item)
    elif isinstance(item, tuple) and item and dataclasses.is_dataclass(item[0]):
      item = tuple(to_config_dict(part) for part in item)
    options = [t for t in typing.get_args(field.type) if t is not type(None)]
    if type(None) in typing.get_args(field.type):
      # A typed placeholder can be set from the command line, None included.
      kind = typing.get_origin(options[0]) or options[0]
      holder = config_dict.placeholder(kind)
      if item is not None:
        holder.set(item)
      item = holder
    result[field.name] = item
  return result.lock()


def check_field(path: str, cls: type) -> None:
  """Raises UserError, naming the nearest, if no field is at a dotted path."""
  hint: Any = cls
  for done, part in enumerate(path.split(".")):
    name, _, index = part.partition("[")
    fields = dataclasses.fields(hint) if dataclasses.is_dataclass(hint) else ()
    hints = {f.name: f.type for f in fields}
    if name not in hints:
      parents = ".".join(path.split(".")[:done])
      hint = nearest(name, hints) if hints else f"{parents} has no fields"
      where = f"{parents}.{name}" if parents else name
      raise UserError(f"unknown field {where}; {hint}")
    hint = typing.get_args(hints[name])[0] if index else hints[name]
