"""Holes in test text, whose true content is known."""

import dataclasses

import numpy as np
from jaxtyping import Int

from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data.holes import Holes
from mdm_jax.sampling.call import Canvas
from mdm_jax.sampling.chain_calls import Passage
from mdm_jax.sampling.template import Candidates

LONGEST = 8  # tokens of a hole, unless a model learned other lengths
_SEED = 0  # of the holes, the same for all models with these texts


@dataclasses.dataclass(frozen=True)
class Hole:
  """A text with a hidden part.

  Attributes:
    text: its number among the texts.
    ids: of the text.
    start: index of the first hidden token.
    size: number of hidden tokens.
  """

  text: int
  ids: Int[np.ndarray, "N"]
  start: int
  size: int

  @property
  def hidden(self) -> Int[np.ndarray, "S"]:
    return self.ids[self.start : self.start + self.size]

  def passage(self) -> Passage:
    """Returns the text, of which the hidden part is scored."""
    free = np.zeros(len(self.ids), bool)
    free[self.start : self.start + self.size] = True
    return Passage(self.ids, free)

  def untold(self, longest: int, vocab: Vocabulary) -> Passage:
    """Returns the text with blanks in its hole, which are scored as well."""
    past = self.start + self.size
    filled, asked = Holes(length=longest).filled(self.hidden, vocab)
    ids = np.concatenate([self.ids[: self.start], filled, self.ids[past:]])
    free = np.zeros(len(ids), bool)
    free[self.start : self.start + len(filled)] = asked
    return Passage(ids.astype(np.int32), free)


def given_holes(
  texts: list[Passage], count: int, longest: int, vocab: Vocabulary
) -> list[Hole]:
  """Returns up to `count` texts with the holes that they have, without blanks.

  Args:
    texts: texts with one hole each.
    count: number of holes.
    longest: most tokens of a hole; longer ones are left out.
    vocab: the special ids.
  """
  found = []
  for number, text in enumerate(texts):
    real = text.ids != vocab.separator
    start, size = int(text.free.argmax()), int((text.free & real).sum())
    if size <= longest:
      found.append(Hole(number, text.ids[real], start, size))
  picked = np.linspace(0, len(found) - 1, min(count, len(found)))
  return [found[int(n)] for n in picked.round()]


def holes(
  texts: list[Passage], count: int, room: int, longest: int = LONGEST
) -> list[Hole]:
  """Returns `count` holes at random places of texts, in random order.

  A hole has tokens that may be predicted, and given ones on both sides.

  Args:
    texts: where they are made; texts without a place are left out.
    count: number of holes; a text may have several, each by itself.
    room: most tokens of a text, if its hole had the largest length.
    longest: most tokens of a hole.
  """
  draw, found = np.random.default_rng(_SEED), []
  fitting = [n for n, t in enumerate(texts) if len(t.ids) + longest - 1 <= room]
  order = draw.permutation(fitting).tolist()
  # Texts in turn; a few tries for each hole, as a text may have no place.
  for attempt in range(4 * count if order else 0):
    if len(found) == count:
      break
    number = order[attempt % len(order)]
    text = texts[number]
    size = int(draw.integers(1, longest + 1))
    inside = np.flatnonzero(text.free[1:-1]) + 1
    fits = inside[np.isin(inside + size - 1, inside)]
    # Without a gap of given tokens inside.
    fits = [at for at in fits if text.free[at : at + size].all()]
    if fits:
      found.append(Hole(number, text.ids, int(draw.choice(fits)), size))
  return found


def candidates(
  found: list[Hole], length: int, vocab: Vocabulary, longest: int = LONGEST
) -> tuple[Candidates, Int[np.ndarray, "N"]]:
  """Returns rows with each length of each hole, and which are the true ones."""
  shape = len(found) * longest, length
  tokens = np.full(shape, vocab.need("pad"), np.int32)
  free, lengths = np.zeros(shape, bool), np.zeros(shape[0], np.int32)
  for n, hole in enumerate(found):
    behind = hole.ids[hole.start + hole.size :]
    for size in range(1, longest + 1):
      row, past = n * longest + size - 1, hole.start + size
      tokens[row, : hole.start] = hole.ids[: hole.start]
      tokens[row, past : past + len(behind)] = behind
      free[row, hole.start : past] = True
      lengths[row] = past + len(behind)
  true = np.array([n * longest + h.size - 1 for n, h in enumerate(found)])
  counts = np.full(len(found), longest)
  untold = free.astype(np.int32)
  return Candidates(Canvas(tokens, free, lengths), untold, counts), true


def canvas_of(texts: list[Passage], length: int, vocab: Vocabulary) -> Canvas:
  """Returns rows with texts whose free tokens are to be drawn."""
  shape = len(texts), length
  tokens = np.full(shape, vocab.need("pad"), np.int32)
  free = np.zeros(shape, bool)
  for row, text in enumerate(texts):
    tokens[row, : len(text.ids)] = text.ids
    free[row, : len(text.ids)] = text.free
  lengths = np.array([len(text.ids) for text in texts], np.int32)
  return Canvas(tokens, free, lengths)
