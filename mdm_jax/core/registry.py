"""Pieces by name: what a config chooses from, open to a user's own pieces."""

import pkgutil
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar, overload

from mdm_jax.core.errors import UserError, nearest

Piece = TypeVar("Piece")


class Registry(Generic[Piece]):
  """The pieces that a field of the config chooses from, by name.

  It stands beside the code of its pieces:

    ORDERS = Registry("sampling order", "sample.order")

    @ORDERS.register("random")
    def random(...): ...

  and a user's module, anywhere, registers more in the same way. The field names
  it as `registry="mdm_jax.sampling.order:ORDERS"` (see `core/fields.py`); that
  module is imported only where a value is checked, so that a room's `config.py`
  imports none of the code it configures.
  """

  def __init__(self, kind: str, field: str):
    """Makes an empty registry.

    Args:
      kind: what a piece is, as messages call it.
      field: dotted path of the config's field that chooses one.
    """
    self.kind = kind
    self.field = field
    self._pieces: dict[str, Piece] = {}

  @overload
  def register(self, name: str, piece: Piece) -> Piece: ...

  @overload
  def register(self, name: str) -> Callable[[Piece], Piece]: ...

  def register(self, name: str, *piece: Any) -> Any:
    """Gives a piece its name; without a piece it is a decorator.

    A module that is run again may register its pieces again.

    Raises:
      UserError: another piece has the name.
    """
    if not piece:
      return lambda decorated: self.register(name, decorated)
    known = self._pieces.get(name, piece[0])
    if not _same(known, piece[0]):
      raise UserError(
        f"two pieces want to be the {self.kind} {name!r}: {_origin(known)} and"
        f" {_origin(piece[0])}; give one of them another name"
      )
    self._pieces[name] = piece[0]
    return piece[0]

  def check(self, name: str, field: str = "") -> None:
    """Raises UserError, with the nearest names, if nothing has this name.

    Args:
      name: the name that was asked for.
      field: where it was given, if not in the registry's own field.
    """
    if name not in self._pieces:
      raise UserError(
        f"{field or self.field}={name!r} is no {self.kind};"
        f" {nearest(name, self._pieces)}"
      )

  def __getitem__(self, name: str) -> Piece:
    """Returns a piece; an unknown name is a UserError, as in `check`."""
    self.check(name)
    return self._pieces[name]

  def __contains__(self, name: object) -> bool:
    return name in self._pieces

  def __iter__(self) -> Iterator[str]:
    """Yields the names in the order in which they were registered."""
    return iter(self._pieces)

  def __len__(self) -> int:
    return len(self._pieces)


def resolve(path: str) -> Registry[Any]:
  """Returns the registry at `package.module:NAME`, importing the module."""
  return pkgutil.resolve_name(path)


def _same(one: Any, other: Any) -> bool:
  """Whether two pieces are one, or one definition that was run twice."""
  named = all(
    hasattr(p, "__qualname__") or hasattr(p, "__wrapped__")
    for p in (one, other)
  )
  return one == other or (named and _origin(one) == _origin(other))


def _origin(piece: Any) -> str:
  """Returns where a piece, what it wraps, or its class was defined."""
  piece = getattr(piece, "__wrapped__", piece)
  named = piece if hasattr(piece, "__qualname__") else type(piece)
  return f"{named.__module__}.{named.__qualname__}"
