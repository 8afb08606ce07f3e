"""Conversion between config dataclasses and plain values (JSON, ConfigDict)."""

import dataclasses
import os
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from ml_collections import config_dict

from mdm_jax.core.errors import UserError, nearest


def coerce(value: Any, hint: Any, path: str) -> Any:
  """Converts a plain value to a type: lists to tuples, dicts to dataclasses.

  Args:
    value: as read from JSON or set in a `ConfigDict`.
    hint: a dataclass, scalar type, tuple, `Literal`, or one of these | None.
    path: dotted path of the value, for messages.

  Raises:
    UserError: an unknown field or a wrong type.
  """
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if dataclasses.is_dataclass(hint):
    return _dataclass(value, hint, path)
  if origin in (types.UnionType, typing.Union):
    if value is None and type(None) in args:
      return None
    return coerce(value, args[0], path)  # no union but `T | None` occurs
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
  # Accept 1 for 1.0, but not True: bool is a subclass of int.
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    try:
      return float(value)
    except OverflowError:
      digits = len(str(abs(value)))
      raise UserError(
        f"{path}: a number of {digits} digits is too large"
      ) from None
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
  # A path may begin with ~.
  return cls(
    **found | {k: os.path.expanduser(found[k]) for k in paths & found.keys()}
  )


def to_config_dict(value: Any) -> config_dict.ConfigDict:
  """Returns a dataclass as a locked `ConfigDict` that checks types."""
  result = config_dict.ConfigDict()
  for field in dataclasses.fields(value):
    item = getattr(value, field.name)
    if dataclasses.is_dataclass(item):
      item = to_config_dict(item)
    elif isinstance(item, tuple) and item and dataclasses.is_dataclass(item[0]):
      item = tuple(to_config_dict(part) for part in item)
    options = [t for t in typing.get_args(field.type) if t is not type(None)]
    if type(None) in typing.get_args(field.type):
      # A ConfigDict infers a field's type from its value, and None has none. A
      # placeholder has a type and can be set on the command line, also to None.
      holder = config_dict.placeholder(_plain_type(options[0]))
      if item is not None:
        holder.set(item)
      item = holder
    result[field.name] = item
  return result.lock()


def _plain_type(hint: Any) -> type:
  # A placeholder takes str for a Literal of strings, and tuple for tuple[...].
  origin = typing.get_origin(hint)
  return type(typing.get_args(hint)[0]) if origin is Literal else origin or hint


def union(base: type, parts: Mapping[str, type]) -> type:
  """Returns a dataclass with the fields of `base` and of all parts.

  Fields of parts become optional: None if not given. Their metadata has the
  names of the parts that they are `of`, and the part's own `default`.

  Args:
    base: a config section, with the fields that all parts share.
    parts: sections by name, such as those of the registered objectives. Of a
      subclass of `base`, only the additional fields are used.

  Raises:
    UserError: two parts have fields of one name with different types.
  """
  own = dataclasses.fields(base)
  found = {
    f.name: (f.type, _copy(f)) for f in own if not f.metadata.get("flat")
  }
  for name, part in parts.items():
    inherited = [f.name for f in own] if issubclass(part, base) else []
    for at in dataclasses.fields(part):
      if at.name in inherited:
        continue
      hint, metadata = at.type | None, dict(at.metadata)
      known = found.setdefault(at.name, (hint, None))
      if known[0] != hint:
        raise UserError(
          f"{part.__name__}.{at.name} is a {at.type}, elsewhere a {known[0]};"
          " rename one of them"
        )
      of = known[1].metadata["of"] if known[1] else ()
      metadata |= {"of": (*of, name), "default": at.default, "type": at.type}
      made = dataclasses.field(default=None, metadata=metadata)
      found[at.name] = hint, made
  return _made(base, found)


def with_types(cls: type, types: Mapping[str, tuple[Any, Any]]) -> type:
  """Returns a dataclass with the (type, default) of some fields replaced."""
  found = {f.name: (f.type, _copy(f)) for f in dataclasses.fields(cls)}
  for name, (hint, default) in types.items():
    found[name] = hint, dataclasses.field(default=default)
  return _made(cls, found)


def _made(cls: type, fields: Mapping[str, tuple[Any, Any]]) -> type:
  items = [(name, hint, made) for name, (hint, made) in fields.items()]
  return dataclasses.make_dataclass(
    cls.__name__,
    items,
    namespace={"__doc__": cls.__doc__},
    frozen=True,
    kw_only=True,
  )


def _copy(at: dataclasses.Field[Any]) -> Any:
  return dataclasses.field(default=at.default, metadata=at.metadata)


def check_field(path: str, cls: type) -> None:
  """Raises UserError, with the nearest name, if a dotted path has no field."""
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
