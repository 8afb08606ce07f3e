"""The named fields of a row, listed once in `FIELDS`.

Everything that handles rows follows this list: packing, files and hashes, the
index of shards, the checks at the start, batches on devices, and reports of
failed updates. A further field is one more entry.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool

from mdm_jax.core.vocabulary import Vocabulary

# Values of all fields of some rows, by name.
Values = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Field:
  """One number for each position of a row.

  Attributes:
    name: also the name of its files and of its argument of `Rows`.
    stored: dtypes it may have on disk; it is written in the first one that can
      hold every id.
    device: dtype in a batch.
    pad: value in padding, or the name of a special id.
    wrong: returns which values are invalid, given all fields of the rows.
    why: returns why a value is invalid.
    optional: rows may lack it; then it is in no file and no batch.
  """

  name: str
  stored: tuple[type[np.generic], ...]
  device: type
  pad: int | str = 0
  wrong: Callable[[Values, Vocabulary], Bool[np.ndarray, "N L"]] | None = None
  why: Callable[[int, Vocabulary], str] = lambda value, _: f"{value} is invalid"
  optional: bool = False

  def dtype(self, vocab: Vocabulary) -> np.dtype:
    """Returns the dtype on disk: the smallest one that holds every id."""
    first, *wider = map(np.dtype, self.stored)
    for dtype in wider:
      if np.iinfo(first).max < vocab.size - 1:
        first = dtype
    return first

  def filler(self, vocab: Vocabulary) -> int:
    """Returns the value in padding."""
    return vocab.need(self.pad) if isinstance(self.pad, str) else self.pad


def _wrong_tokens(values: Values, vocab: Vocabulary) -> np.ndarray:
  """Which tokens are invalid: padding must hold the pad id, text must not."""
  tokens, segments = values["tokens"], values["segments"]
  in_text = vocab.may_be_text(tokens)
  neither = ~(in_text | (tokens == vocab.pad))
  return (in_text != (segments > 0)) | neither


def _why_token(token: int, vocab: Vocabulary) -> str:
  """Returns why a token is invalid; the pad id is so only inside a text."""
  if token == vocab.mask:
    return f"id {token} is the mask token, which can't be in text"
  if vocab.may_be_text(np.array([token])):
    return f"id {token} in padding, where the id must be {vocab.pad}"
  if token == vocab.pad:
    return f"id {token} is the padding id, but inside a text"
  return f"id {token} is not in the tokenizer's vocabulary"


def _wrong_answer(values: Values, _: Vocabulary) -> np.ndarray:
  answer, segments = values["answer"], values["segments"]
  return (answer > 1) | ((answer > 0) & (segments == 0))


def _why_answer(value: int, _: Vocabulary) -> str:
  if value == 1:
    return "padding is marked as an answer"
  return f"answer is {value}, not 0 or 1"


FIELDS = (
  # Token ids; the pad id in padding.
  Field(
    "tokens",
    (np.uint16, np.int32),
    np.int32,
    pad="pad",
    wrong=_wrong_tokens,
    why=_why_token,
  ),
  # 1, 2, ... for the texts of a row, in order; 0 in padding.
  Field("segments", (np.uint16,), np.int32),
  # 1 where a token may be masked and predicted, else 0. Without this field
  # every token of the text may be.
  Field(
    "answer",
    (np.uint8,),
    np.bool_,
    wrong=_wrong_answer,
    why=_why_answer,
    optional=True,
  ),
)


def field(name: str) -> Field:
  """Returns a field by its name."""
  return next(f for f in FIELDS if f.name == name)


def names() -> tuple[str, ...]:
  """Returns the names of all fields."""
  return tuple(f.name for f in FIELDS)


def required() -> tuple[str, ...]:
  """Returns the names of the fields that all rows have."""
  return tuple(f.name for f in FIELDS if not f.optional)


class Fields:
  """Values of fields by name, of rows on disk or of a batch.

  Attributes:
    fields: values by name, in the order of `FIELDS`; absent optional fields
      have no entry.
  """

  fields: dict[str, Any]

  def __init__(self, tokens: Any, segments: Any, **others: Any):
    given = {"tokens": tokens, "segments": segments} | others
    # `pop` leaves the arguments that are no fields in `given`.
    self.fields = {f.name: given.pop(f.name) for f in FIELDS if f.name in given}
    if given or not self.fields.keys() >= set(required()):
      raise TypeError(f"{[*self.fields, *given]}: rows have {names()}")

  @property
  def tokens(self) -> Any:
    """Token ids; the pad id in padding."""
    return self.fields["tokens"]

  @property
  def segments(self) -> Any:
    """1, 2, ... for the texts of a row; 0 in padding."""
    return self.fields["segments"]


class Rows(Fields):
  """Packed rows [N, L]: arrays, or `Shards` that read them from many files."""

  def __len__(self) -> int:
    return len(self.tokens)

  @property
  def length(self) -> int:
    """Tokens per row."""
    return self.tokens.shape[1]

  @property
  def answer(self) -> Bool[np.ndarray, "N L"]:
    """Which tokens may be masked and predicted; by default, all of the text."""
    return self.fields.get("answer", self.segments)[:] > 0

  def take(self, numbers: np.ndarray) -> "Rows":
    """Returns the rows of these numbers, in this order."""
    return Rows(**{name: v[numbers] for name, v in self.fields.items()})


def most_segments(counts: Mapping[str, Any], length: int) -> int:
  """Returns the largest number of texts in a row.

  Args:
    counts: the rows' counts in a manifest; older manifests lack this one.
    length: tokens per row, which is an upper bound.
  """
  return counts.get("most_segments", length)


def most_asked(counts: Mapping[str, Any], length: int) -> int:
  """Returns the most tokens of a row that may be masked and predicted."""
  return counts.get("most_asked", length)
