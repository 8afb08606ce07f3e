"""Applies the chain rule to many texts, in calls of equal size.

An order by position is known in advance: then every step of every text is a row
of its own, and each call of the program is full whatever the lengths of the
texts. An order by the denoiser's logits needs one call after the other, for
several texts at once; there are as many as the longest text has tokens.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from mdm_jax.core import distributed, rng
from mdm_jax.core.sharding import batch_sharding, padded_rows, put
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data.held_out import ROW, SEGMENT, HeldOut
from mdm_jax.objectives.measured import SEED
from mdm_jax.sampling import order as orders
from mdm_jax.sampling.call import Canvas, Predictor
from mdm_jax.sampling.chain_rule import (
  ChainRule,
  Ranks,
  make_chain_rule,
  make_ranks,
  make_terms,
)

_SHORTEST = 16  # tokens of the shortest rows; longer ones are powers of two


@dataclasses.dataclass(frozen=True)
class Passage:
  """A text whose likelihood is computed.

  Attributes:
    ids: its tokens.
    free: which of them are predicted; the others are given.
  """

  ids: Int[np.ndarray, "N"]
  free: Bool[np.ndarray, "N"]


def passages(held: HeldOut) -> list[Passage]:
  """Returns every text of held-out rows by itself, in the rows' order."""
  rows = held.rows
  found = []
  for row, segment in held.texts[:, [ROW, SEGMENT]].tolist():
    inside = np.asarray(rows.segments[row]) == segment
    ids = np.asarray(rows.tokens[row])[inside].astype(np.int32)
    found.append(Passage(ids, np.asarray(rows.answer[row])[inside]))
  return found


def row_length(tokens: int, longest: int) -> int:
  """Returns the length of a row for a text: few lengths, so few programs.

  Args:
    tokens: of the text.
    longest: of all rows.
  """
  return min(1 << (max(tokens, _SHORTEST) - 1).bit_length(), longest)


def key_of_orders(number: int) -> Key[Array, ""]:
  """Returns the key of the orders with this number, the same for all models."""
  return rng.stream(SEED, "chain_rule", number)


class ChainCalls:
  """Computes -log p of texts; compiles once per length of rows.

  A text's result depends only on its tokens and key, not on other texts: each
  is alone in its rows, and all calls for one length have the same shape.
  """

  def __init__(
    self,
    order: str,
    denoiser: Predictor,
    vocab: Vocabulary,
    mesh: jax.sharding.Mesh,
    longest: int,
    tokens_a_call: int,
    most_rows: int | None = None,
  ):
    """Prepares the calls; nothing is compiled yet.

    Args:
      order: name of a sampling order.
      denoiser: computes hidden states and logits.
      vocab: the special ids.
      mesh: the devices; also to be the current mesh when texts are passed.
      longest: tokens of the longest texts.
      tokens_a_call: tokens per call, padding included.
      most_rows: most rows per call of an order by logits (None: any number).
    """
    self._order, self._denoiser, self._vocab = order, denoiser, vocab
    self._mesh, self._longest = mesh, longest
    self._tokens, self._most_rows = tokens_a_call, most_rows
    self._in_advance = not orders.reads_logits(order)
    self._rules: dict[int, ChainRule] = {}
    self._ranks: Ranks = make_ranks(order, vocab)
    self._terms = make_terms(denoiser, vocab)
    self._keys = jax.jit(
      rng.per_row, out_shardings=batch_sharding(mesh, rank=1)
    )

  def __call__(
    self,
    params: Any,
    passages: Sequence[Passage],
    key: Key[Array, ""],
    numbers: Int[np.ndarray, "M"],
  ) -> Iterator[tuple[Int[np.ndarray, "N"], Float[np.ndarray, "N"]]]:
    """Yields some texts' indices and -log p in nats, after every call.

    Args:
      params: parameters of the denoiser.
      passages: the texts, in any order.
      key: for random orders.
      numbers: each text's number, which its own key is derived from.
    """
    by_length: dict[int, list[int]] = {}
    for i, passage in enumerate(passages):
      length = row_length(len(passage.ids), self._longest)
      by_length.setdefault(length, []).append(i)
    run = self._by_term if self._in_advance else self._by_text
    for length, found in sorted(by_length.items()):
      # Texts of similar lengths together: the longest decides how many calls an
      # order by logits makes.
      found.sort(key=lambda i: len(passages[i].ids))
      index, few = np.array(found), [passages[i] for i in found]
      canvas = self._canvas(few, length)
      for done, nats in run(params, canvas, key, numbers[index]):
        yield index[done], nats

  def _canvas(self, passages: Sequence[Passage], length: int) -> Canvas:
    shape = len(passages), length
    tokens = np.full(shape, self._vocab.need("pad"), np.int32)
    free = np.zeros(shape, bool)
    for row, passage in enumerate(passages):
      size = len(passage.ids)
      tokens[row, :size], free[row, :size] = passage.ids, passage.free
    lengths = np.array([len(passage.ids) for passage in passages], np.int32)
    return Canvas(tokens, free, lengths)

  def _rows(self, length: int) -> int:
    return padded_rows(max(self._tokens // length, 1), self._mesh)

  def _by_text(self, params, canvas: Canvas, key, numbers):
    """Yields results of an order by logits, one group of texts per call."""
    count, length = canvas.tokens.shape
    size = self._rows(length)
    if self._most_rows is not None:
      size = min(size, padded_rows(self._most_rows, self._mesh))
    if length not in self._rules:
      self._rules[length] = make_chain_rule(
        self._order, self._denoiser, self._vocab, length
      )
    for start in range(0, count, size):
      # The last text again fills up the last call.
      rows = np.minimum(np.arange(start, start + size), count - 1)
      keys = self._keys(key, numbers[rows].astype(np.int32))
      nats = self._rules[length](params, self._part(canvas, rows), keys)
      done = np.arange(start, min(start + size, count))
      yield done, distributed.fetch(nats)[: len(done)].astype(np.float64)

  def _by_term(self, params, canvas: Canvas, key, numbers):
    """Yields results of an order by position, in calls of independent terms."""
    count, length = canvas.tokens.shape
    size = self._rows(length)
    when = self._steps(canvas, key, numbers, size)
    sizes = canvas.free.sum(axis=1)
    ends = np.cumsum(sizes)
    # Given tokens and padding come last.
    places = np.argsort(np.where(canvas.free, when, length), kind="stable")
    row = np.repeat(np.arange(count), sizes)
    step = np.arange(len(row)) - np.repeat(ends - sizes, sizes)
    terms, done, ahead = np.zeros(len(row)), 0, []

    def finish(start: int, nats: Array):
      """Stores a call's terms; returns the texts that are complete now."""
      part = terms[start : start + size]
      part[:] = distributed.fetch(nats)[: len(part)]
      upto = np.searchsorted(ends, start + len(part), side="right")
      texts = np.arange(done, upto)
      nats = [terms[ends[t] - sizes[t] : ends[t]].sum() for t in texts]
      return texts, np.array(nats, np.float64)

    for start in range(0, len(row), size):
      # The last call is filled up with its last term.
      term = np.minimum(np.arange(start, start + size), len(row) - 1)
      rows, steps = row[term], step[term]
      masked = when[rows] >= steps[:, None]
      at = places[rows, steps].astype(np.int32)
      nats = self._terms(
        params, self._part(canvas, rows), self._place(masked), self._place(at)
      )
      ahead.append((start, nats))
      # Fetch one call while the devices run the next.
      if len(ahead) == 2:
        found = finish(*ahead.pop(0))
        done += len(found[0])
        yield found
    yield finish(*ahead.pop()) if ahead else (np.arange(count), np.zeros(count))

  def _steps(
    self, canvas: Canvas, key, numbers, size
  ) -> Int[np.ndarray, "M L"]:
    """Returns the step that reveals each token; -1 for given ones."""
    count, found = len(numbers), []
    for start in range(0, count, size):
      rows = np.minimum(np.arange(start, start + size), count - 1)
      keys = self._keys(key, numbers[rows].astype(np.int32))
      found.append(self._ranks(self._part(canvas, rows), keys))
    return np.concatenate(distributed.fetch(found))[:count]

  def _part(self, canvas: Canvas, rows: Int[np.ndarray, "B"]) -> Canvas:
    return Canvas(
      self._place(canvas.tokens[rows]),
      self._place(canvas.free[rows]),
      self._place(canvas.lengths[rows]),
    )

  def _place(self, values: np.ndarray) -> Array:
    return put(values, batch_sharding(self._mesh, values.ndim))
