"""Registries: names that a config field can take, and what each stands for."""

import pkgutil
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from mdm_jax.core.errors import UserError, nearest

Piece = TypeVar("Piece")


class Registry(Generic[Piece]):
  """The choices of a config field, by name: functions, classes or values.

  It is defined in the module of its choices, and a user's own module registers
  more in the same way.

  Example:

    ORDERS = Registry("sampling order", "sample.order")

    @ORDERS.register("random")
    def random(...): ...

  The config field refers to it by `registry="mdm_jax.sampling.order:ORDERS"`
  (see `core/fields.py`). The module is imported only when a value is checked,
  so a `config.py` does not import the code that it configures.
  """

  def __init__(self, kind: str, field: str):
    """Creates an empty registry.

    Args:
      kind: what the choices are, for messages.
      field: dotted path of the config field that chooses one.
    """
    self.kind = kind
    self.field = field
    self._pieces: dict[str, Piece] = {}

  def register(self, name: str, piece: Piece | None = None) -> Any:
    """Registers a choice; without `piece` it returns a decorator.

    The same definition may be registered again, as when a module is reloaded.

    Raises:
      UserError: something else has the name.
    """
    if piece is None:
      return lambda decorated: self.register(name, decorated)
    known = self._pieces.get(name, piece)
    if not _same(known, piece):
      raise UserError(
        f"two definitions of the {self.kind} {name!r}: {_origin(known)} and"
        f" {_origin(piece)}; rename one of them"
      )
    self._pieces[name] = piece
    return piece

  def check(self, name: str, field: str = "") -> None:
    """Raises UserError, with the nearest name, if a name isn't registered.

    Args:
      name: the name.
      field: the config field with the name, if not the registry's own.
    """
    if name not in self._pieces:
      raise UserError(
        f"{field or self.field}={name!r}: unknown {self.kind};"
        f" {nearest(name, self._pieces)}"
      )

  def __getitem__(self, name: str) -> Piece:
    """Returns the choice with a name; raises UserError if there is none."""
    self.check(name)
    return self._pieces[name]

  def __contains__(self, name: object) -> bool:
    return name in self._pieces

  def __iter__(self) -> Iterator[str]:
    """Yields the names in order of registration."""
    return iter(self._pieces)

  def __len__(self) -> int:
    return len(self._pieces)


def resolve(path: str) -> Registry[Any]:
  """Returns the registry at `package.module:NAME`, importing the module."""
  return pkgutil.resolve_name(path)


def _same(one: Any, other: Any) -> bool:
  """Returns whether two pieces are equal, or one definition executed twice."""
  named = all(
    hasattr(p, "__qualname__") or hasattr(p, "__wrapped__")
    for p in (one, other)
  )
  return one == other or (named and _origin(one) == _origin(other))


def _origin(piece: Any) -> str:
  """Returns the qualified name of a piece, of what it wraps, or its class."""
  piece = getattr(piece, "__wrapped__", piece)
  named = piece if hasattr(piece, "__qualname__") else type(piece)
  return f"{named.__module__}.{named.__qualname__}"
