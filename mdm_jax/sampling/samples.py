"""Samples: texts, and how each of their tokens was drawn."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from mdm_jax.core.vocabulary import Vocabulary


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Notes:
  """How each token was drawn.

  Attributes:
    step: last step, from 0, that revealed the token; -1 if given or cut off.
    confidence: probability of the token when it was drawn, before temperature
      and filters; 0 where step is -1.
    entropy: entropy of its distribution, in nats, before temperature and
      filters; 0 where step is -1.
    calls: denoiser calls until the row was finished.
    put_back: number of tokens of the row that were remasked.
  """

  step: Int[Array | np.ndarray, "B L"]
  confidence: Float[Array | np.ndarray, "B L"]
  entropy: Float[Array | np.ndarray, "B L"]
  calls: Int[Array | np.ndarray, "B"]
  put_back: Int[Array | np.ndarray, "B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn(Notes):
  """Samples as arrays.

  Attributes:
    path: ids before each of the S - 1 steps, and after the last; padding
      follows the first end-of-text token that was drawn.
  """

  path: Int[Array | np.ndarray, "S B L"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples(Drawn):
  """Samples as text, and how each token was drawn; arrays are NumPy's.

  Attributes:
    texts: decoded texts, up to the end-of-text token.
  """

  texts: list[str]


# The arrays of samples. All but `path` have the texts as their first axis.
ARRAYS = tuple(field.name for field in dataclasses.fields(Drawn))


def join(parts: Sequence[Samples]) -> Samples:
  """Concatenates samples of the same length and number of steps."""
  if len(parts) == 1:
    return parts[0]
  arrays = {
    name: np.concatenate(
      [getattr(part, name) for part in parts], axis=int(name == "path")
    )
    for name in ARRAYS
  }
  return Samples(texts=[text for p in parts for text in p.texts], **arrays)


def until_end(row: Int[np.ndarray, "L"], vocab: Vocabulary):
  """Returns a row up to its first end-of-text or padding token."""
  # A row without an end-of-text token may still be shorter: a template's.
  ends = np.flatnonzero(vocab.is_end(row) | (row == vocab.pad))
  return row[: ends[0]] if len(ends) else row
