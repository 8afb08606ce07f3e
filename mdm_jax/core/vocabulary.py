"""What each token id means, as data: no other code compares an id with a size.

The special ids may lie anywhere, and so may the ids that a model must never
predict: the mask, the padding, and the rows that only round the embedding up.
"""

import dataclasses
import functools
import operator

import jax
import numpy as np
from jaxtyping import Bool, Integer

from mdm_jax.core.errors import UserError

_NAMES = "end", "pad", "mask", "begin", "separator"
_ROUND = 128  # the embedding has a multiple of so many rows
Ids = jax.Array | np.ndarray | np.generic


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """The ids of a tokenizer and of the model that reads them.

  Hashable, so that a jitted function can take it as a static argument.

  Attributes:
    size: rows of the embedding; ids run from 0 to size - 1.
    end: ends a document.
    pad: fills a row up. Nothing sees it, so any unused id will do where a model
      has none of its own.
    mask: hides a token.
    begin: begins a document. It may stand in a text without being predicted.
    separator: stands between the two sentences of a pair.
    forbidden: half-open ranges (first, past) of the ids that are never
      predicted, in rising order. `pad` and `mask` are among them.

  Raises:
    ValueError: a range or a special id can't be.
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
    """Returns ids of text from 0, then the special ones, rounded up.

    Args:
      num_text: ids that stand for text. The next four are the end, the
        separator, the padding and the mask; the last two, and the rows that
        round the embedding up, are never predicted.
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
    """How many ids can be predicted."""
    return self.size - sum(past - first for first, past in self.forbidden)

  def is_predictable(self, ids: Ids) -> Ids:
    """Returns which ids can be predicted, as booleans of the same shape.

    Made of comparisons, so the ids may be a shard's part of the vocabulary
    (`core/sharding.py: vocab_ids`).
    """
    spans = (_within(ids, *span, self.size) for span in self._allowed())
    return functools.reduce(operator.or_, spans)

  def is_end(self, ids: Ids) -> Ids:
    """Returns which ids end a document; none if no id does."""
    return ids != ids if self.end is None else ids == self.end

  def may_be_text(
    self, ids: Integer[np.ndarray, "*N"]
  ) -> Bool[np.ndarray, "*N"]:
    """Returns which numbers may stand in a text; any number may be asked for.

    All that can be predicted, and `begin`, `end` and `separator`.
    """
    # For a few ranges faster than a table's look-up.
    spans = ((ids >= first) & (ids < past) for first, past in self._text)
    return functools.reduce(operator.or_, spans)

  def need(self, name: str) -> int:
    """Returns a special id by its name, for those who can't do without.

    Raises:
      UserError: there is none.
    """
    if (found := getattr(self, name)) is None:
      raise UserError(f"the tokenizer has no {name} id, which is needed here")
    return found

  @functools.cached_property
  def _text(self) -> list[tuple[int, int]]:
    """The ranges of what may stand in a text."""
    table = np.zeros(self.size + 2, bool)  # False on both sides
    for first, past in self._allowed():
      table[first + 1 : past + 1] = True
    beside = self.begin, self.end, self.separator
    table[[i + 1 for i in beside if i is not None]] = True
    edges = np.flatnonzero(table[1:] != table[:-1]).reshape(-1, 2)
    return [(first, past) for first, past in edges.tolist()]

  def _allowed(self) -> list[tuple[int, int]]:
    """Returns the ranges between the forbidden ones."""
    firsts = [0, *(past for _, past in self.forbidden)]
    pasts = [*(first for first, _ in self.forbidden), self.size]
    both = zip(firsts, pasts, strict=True)
    return [(first, past) for first, past in both if first < past]

  def _check_forbidden(self) -> None:
    before = 0
    for first, past in self.forbidden:
      if not before <= first < past <= self.size:
        raise ValueError(
          f"forbidden={self.forbidden}: ranges must rise, hold an id each and"
          f" lie in [0, {self.size}]"
        )
      before = past
    if not self.predictable:
      raise ValueError("no id can be predicted")

  def _check_special(self) -> None:
    given = {n: i for n in _NAMES if (i := getattr(self, n)) is not None}
    for name, i in given.items():
      if not 0 <= i < self.size:
        raise ValueError(f"{name}={i} is no id of {self.size}")
    for name in {"pad", "mask"} & given.keys():
      if any(first <= given[name] < past for first, past in self._allowed()):
        raise ValueError(f"{name}={given[name]} must be forbidden")
      if list(given.values()).count(given[name]) > 1:
        raise ValueError(f"{name}={given[name]} has another meaning too")


def _within(ids: Ids, first: int, past: int, size: int) -> Ids:
  """Returns which ids are in a range, by as few comparisons as can be."""
  if first == 0:
    return ids < past
  if past == size:
    return ids >= first
  return (ids >= first) & (ids < past)
