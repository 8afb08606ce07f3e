"""The vocabulary: its size, its special token ids, and which are predictable.

Special ids may be anywhere, and so may ids that a model must never predict: the
mask, padding, and rows that only round up the size of the embedding. So other
code must ask this class and never compare an id with a size.
"""

import dataclasses
import functools
import operator

import jax
import numpy as np
from jaxtyping import Bool, Integer

from mdm_jax.core.errors import UserError

_NAMES = "end", "pad", "mask", "begin", "separator"
_ROUND = 128  # `after_text` rounds the embedding's rows up to a multiple
Ids = jax.Array | np.ndarray | np.generic


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """The token ids of a tokenizer and a model. A special id may be None.

  Hashable, so that a jitted function can take it as a static argument.

  Attributes:
    size: number of rows of the embedding; ids are 0 to size - 1.
    end: end of a document.
    pad: padding. No token attends to it, so if a model has no such id, any
      unused one will do.
    mask: the mask token.
    begin: begin of a document. It may occur in text without being predictable.
    separator: stands between the two sentences of a pair.
    forbidden: half-open ranges (first, past) of ids that are never predicted,
      in increasing order. Must include `pad` and `mask`.

  Raises:
    ValueError: a range or a special id is invalid.
  """

  size: int
  _: dataclasses.KW_ONLY
  end: int | None = None
  pad: int | None = None
  mask: int | None = None
  begin: int | None = None
  separator: int | None = None
  forbidden: tuple[tuple[int, int], ...] = ()

  def __post_init__(self):
    self._check_forbidden()
    self._check_special()

  @classmethod
  def after_text(cls, num_text: int) -> "Vocabulary":
    """Returns a vocabulary of text ids from 0, followed by special ids.

    The special ids are end, separator, pad and mask, in this order. The last
    two, and the ids that round the size up, are not predictable.

    Args:
      num_text: number of text ids.
    """
    size = -(-(num_text + 4) // _ROUND) * _ROUND
    end, separator, pad, mask = range(num_text, num_text + 4)
    return cls(
      size,
      end=end,
      separator=separator,
      pad=pad,
      mask=mask,
      forbidden=((pad, size),),
    )

  @property
  def predictable(self) -> int:
    """Number of ids that can be predicted."""
    return self.size - sum(past - first for first, past in self.forbidden)

  def is_predictable(self, ids: Ids) -> Ids:
    """Returns which ids can be predicted, as booleans of the same shape.

    By comparisons and not by a table, so that the ids may be one shard's part
    of the vocabulary (`core/sharding.py: vocab_ids`).
    """
    spans = (_within(ids, *span, self.size) for span in self._allowed())
    return functools.reduce(operator.or_, spans)

  def is_end(self, ids: Ids) -> Ids:
    """Returns which ids end a document; all False if there is no such id."""
    # `ids != ids` is False everywhere, with the type and sharding of `ids`.
    return ids != ids if self.end is None else ids == self.end

  def may_be_text(
    self, ids: Integer[np.ndarray, "*N"]
  ) -> Bool[np.ndarray, "*N"]:
    """Returns which ids may occur in text; ids may be out of range.

    These are all predictable ids, and `begin`, `end` and `separator`.
    """
    # For a few ranges this is faster than a table look-up.
    spans = ((ids >= first) & (ids < past) for first, past in self._text)
    return functools.reduce(operator.or_, spans)

  def need(self, name: str) -> int:
    """Returns a special id that must exist.

    Args:
      name: "end", "pad", "mask", "begin" or "separator".

    Raises:
      UserError: the id is None.
    """
    if (found := getattr(self, name)) is None:
      raise UserError(f"the tokenizer has no {name} id, which is needed here")
    return found

  @functools.cached_property
  def _text(self) -> list[tuple[int, int]]:
    """The ranges of ids that may occur in text."""
    # Cached, but no field: it is neither compared nor hashed.
    # Padded with False on both sides, so that every range has two edges.
    table = np.zeros(self.size + 2, bool)
    for first, past in self._allowed():
      table[first + 1 : past + 1] = True
    beside = self.begin, self.end, self.separator
    table[[i + 1 for i in beside if i is not None]] = True
    edges = np.flatnonzero(table[1:] != table[:-1]).reshape(-1, 2)
    return [(first, past) for first, past in edges.tolist()]

  def _allowed(self) -> list[tuple[int, int]]:
    """Returns the ranges of predictable ids, between the forbidden ones."""
    firsts = [0, *(past for _, past in self.forbidden)]
    pasts = [*(first for first, _ in self.forbidden), self.size]
    both = zip(firsts, pasts, strict=True)
    return [(first, past) for first, past in both if first < past]

  def _check_forbidden(self) -> None:
    before = 0
    for first, past in self.forbidden:
      if not before <= first < past <= self.size:
        raise ValueError(
          f"forbidden={self.forbidden}: ranges must be increasing, not empty"
          f" and within [0, {self.size}]"
        )
      before = past
    if not self.predictable:
      raise ValueError("no id can be predicted")

  def _check_special(self) -> None:
    given = {n: i for n in _NAMES if (i := getattr(self, n)) is not None}
    for name, i in given.items():
      if not 0 <= i < self.size:
        raise ValueError(f"{name}={i} is not in [0, {self.size})")
    for name in {"pad", "mask"} & given.keys():
      if any(first <= given[name] < past for first, past in self._allowed()):
        raise ValueError(f"{name}={given[name]} must be forbidden")
      if list(given.values()).count(given[name]) > 1:
        raise ValueError(f"{name}={given[name]} is also another special id")


def _within(ids: Ids, first: int, past: int, size: int) -> Ids:
  """Returns which ids are in a range, with one comparison if possible."""
  if first == 0:
    return ids < past
  if past == size:
    return ids >= first
  return (ids >= first) & (ids < past)
