"""Generates docs/configuration.md from the config dataclasses.

python -m mdm_jax.config_reference > docs/configuration.md
"""

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

from mdm_jax.config import form
from mdm_jax.core import registry

_INTRO = """\
# Configuration

Every field of `--config`, with its type and default; a number outside its
bounds is refused (`[` and `]`: the end itself is allowed). A config file sets
them on what `mdm_jax.config.default_config()` returns; on the command line
each is a flag, as in `--config.data.batch_size=4` or
`'--config.stages[0].epochs=2'`. A field whose type allows `None` takes it
there too.

This file is made by
`python -m mdm_jax.config_reference > docs/configuration.md`.
"""


def reference() -> str:
  """Returns the whole configuration reference as Markdown."""
  parts = [_INTRO, *(_section(path, cls) for path, cls in sections())]
  return "\n".join(parts)


def sections(
  cls: type | None = None, path: str = ""
) -> Iterator[tuple[str, type]]:
  """Yields the dotted path and the class of a section and all within it.

  Args:
    cls: the section (None: the whole config).
    path: its dotted path, "" for the whole config.
  """
  cls = cls or form()
  yield path, cls
  prefix = f"{path}." if path else ""
  for field in dataclasses.fields(cls):
    inner, many = _inner(field.type)
    if inner is not None:
      name = f"{prefix}{field.name}{'[i]' if many else ''}"
      yield from sections(inner, name)


def _section(path: str, cls: type) -> str:
  # The first line of a section's docstring is part of the page.
  summary = cls.__doc__.strip().partition("\n")[0]
  lines = [f"## {f'`{path}`' if path else 'Top level'}", "", summary, ""]
  lines += ["| field | type | bounds | default | |"]
  lines += ["| --- | --- | --- | --- | --- |"]
  prefix = f"{path}." if path else ""
  for field in dataclasses.fields(cls):
    if _inner(field.type)[0] is None:
      cells = (
        f"`{prefix}{field.name}`",
        f"`{_type_name(field)}`",
        field.metadata["bounds"],
        f"`{field.metadata.get('default', field.default)!r}`",
        _doc(field).replace("<", "\\<"),
      )
      lines.append("| " + " | ".join(map(_cell, cells)) + " |")
  return "\n".join(lines) + "\n"


def _inner(hint: Any) -> tuple[type | None, bool]:
  """Returns a field's section class, if it has one, and if it is a tuple."""
  if dataclasses.is_dataclass(hint):
    return hint, False
  args = typing.get_args(hint)
  if typing.get_origin(hint) is tuple and dataclasses.is_dataclass(args[0]):
    return args[0], True
  return None, False


def _doc(field: dataclasses.Field[Any]) -> str:
  owners = ", ".join(field.metadata.get("of", ()))
  return (owners and f"{owners}: ") + field.metadata["doc"]


def _type_name(field: dataclasses.Field[Any]) -> str:
  hint = field.metadata.get("type", field.type)
  if "registry" in field.metadata:
    return " | ".join(map(repr, registry.resolve(field.metadata["registry"])))
  if typing.get_origin(hint) is typing.Literal:
    return " | ".join(map(repr, typing.get_args(hint)))
  if isinstance(hint, type) and not typing.get_args(hint):
    return hint.__name__
  return str(hint)


def _cell(text: str) -> str:
  return text.replace("|", "\\|")


if __name__ == "__main__":
  print(reference(), end="")
