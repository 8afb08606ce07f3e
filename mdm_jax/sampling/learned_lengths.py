"""Asks a model for the length of a hole, if it was trained with untold ones.

Such a hole has N places, of which a blank fills up the last ones, and a visible
blank behind them (`data/holes.py`). So a hole has k tokens if place k - 1 is no
blank and all later ones are. By the chain rule, from the last place on,

  p(k) = p(place k - 1 is no blank | blanks behind)
         x product over places j >= k of p(place j is a blank | blanks behind),

where all places before are masked. These are N predictions of one token, in
rows like those of the training. Their product is a distribution over the
lengths, whatever the model predicts; no text is drawn or summed over.

Of several holes, the first one's length is asked for first. The next one's
depends on it, so there the first hole is a told one.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int

from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data import holes
from mdm_jax.sampling.call import Canvas
from mdm_jax.sampling.template import Candidates, PromptError

_ROUND = 128  # rows that have to be longer than the others' are a multiple
_LEAST = 1e-12  # nats, so that no length has a probability of exactly 0


@dataclasses.dataclass(frozen=True)
class Queries:
  """Predictions of a blank, each in a row of its own.

  Attributes:
    canvas: the rows; a blank is at every place of a hole.
    masked: which tokens are masked [Q, L].
    at: the place that is predicted [Q].
    of: for each candidate, of each of its holes in turn, the tokens of the hole
      and the number of the prediction of its first place.
  """

  canvas: Canvas
  masked: Bool[np.ndarray, "Q L"]
  at: Int[np.ndarray, "Q"]
  of: list[list[tuple[int, int]]]


def check(found: Candidates, longest: int) -> None:
  """Raises PromptError if a hole may be longer than those of the training."""
  ends = np.cumsum(found.counts)
  for text in np.flatnonzero(found.counts > 1):
    row = found.untold[ends[text] - 1]  # all holes have their largest length
    most = int(np.bincount(row)[1:].max())
    if most > longest:
      raise PromptError(
        int(text) + 1,
        len(ends),
        f"a hole may have {most} tokens, but this model learned the lengths of"
        f" holes of at most {longest} (data.hole_length); write"
        f" [MASK:1-{longest}], or tell it, as in [MASK:{most}]",
      )


def queries(found: Candidates, longest: int, vocab: Vocabulary) -> Queries:
  """Returns the predictions that the candidates' probabilities consist of.

  Args:
    found: rows with every choice of lengths; `check` has passed.
    longest: places of an untold hole.
    vocab: the special ids.
  """
  blank = holes.blank(vocab)
  text = np.repeat(np.arange(len(found.counts)), found.counts)
  rows, at, of, known = [], [], [], {}
  for candidate in range(len(text)):
    length = int(found.canvas.lengths[candidate])
    untold = found.untold[candidate, :length]
    sizes = np.bincount(untold)[1:].tolist()
    of.append([])
    for hole, size in enumerate(sizes):
      key = text[candidate], *sizes[:hole], -1
      if key not in known:
        known[key] = len(rows)
        ids, masked, start = _filled(
          *(found.canvas.tokens[candidate, :length], untold),
          *(found.canvas.free[candidate, :length], hole, longest, blank),
        )
        for place in range(start, start + longest):
          behind = masked.copy()
          behind[place + 1 : start + longest] = False
          rows.append((ids, behind))
          at.append(place)
      of[-1].append((size, known[key]))
  width = found.canvas.tokens.shape[1]
  if (most := max(len(ids) for ids, _ in rows)) > width:
    width = -(-most // _ROUND) * _ROUND
  tokens = np.full((len(rows), width), vocab.need("pad"), np.int32)
  masked = np.zeros((len(rows), width), bool)
  for i, (ids, hidden) in enumerate(rows):
    tokens[i, : len(ids)], masked[i, : len(ids)] = ids, hidden
  lengths = np.array([len(ids) for ids, _ in rows], np.int32)
  return Queries(
    Canvas(tokens, masked, lengths), masked, np.array(at, np.int32), of
  )


def _filled(
  tokens: Int[np.ndarray, "L"],
  untold: Int[np.ndarray, "L"],
  free: Bool[np.ndarray, "L"],
  hole: int,
  longest: int,
  blank: int,
) -> tuple[Int[np.ndarray, "N"], Bool[np.ndarray, "N"], int]:
  """Returns a row in which a hole has `longest` places and a blank.

  Returns:
    The ids, which of them are masked, and where the hole begins. Holes before
    it have their own length, later ones are untold, too.
  """
  ids, masked, done, start = [], [], 0, 0
  for number in range(int(untold.max())):
    inside = np.flatnonzero(untold == number + 1)
    first, size = inside[0], len(inside) if number < hole else longest
    ids.append(tokens[done:first])
    masked.append(free[done:first])
    if number == hole:
      start = sum(map(len, ids))
    behind = int(number >= hole)
    ids.append(np.full(size + behind, blank, np.int32))
    masked.append(np.arange(size + behind) < size)
    done = inside[-1] + 1
  ids.append(tokens[done:])
  masked.append(free[done:])
  return np.concatenate(ids), np.concatenate(masked), start


def log_p(
  asked: Queries, nats: Float[np.ndarray, "Q"], longest: int
) -> Float[np.ndarray, "B"]:
  """Returns log p(lengths) of each candidate, before any bounds are known.

  Args:
    asked: the predictions.
    nats: -log p of a blank, of each of them.
    longest: places of an untold hole.
  """
  other = np.log(-np.expm1(-np.maximum(nats, _LEAST)))
  found = np.zeros(len(asked.of))
  for candidate, holes_of in enumerate(asked.of):
    for size, first in holes_of:
      blanks = nats[first + size : first + longest].sum()
      found[candidate] += other[first + size - 1] - blanks
  return found
