"""Decides how many tokens a hole has whose length is not told: [MASK:1-8].

A model that was trained with such holes is asked (`learned_lengths.py`). For
any other one, all lengths within the bounds are equally likely beforehand, so
by Bayes' rule

  p(length | given text) = p(given text | length) / sum over all lengths,

where the given text has a hole of that length, all of it masked. A masked model
is trained on such rows: the chain rule reveals one given token after the other,
and the hole is never revealed. Nothing is drawn, and no length is favoured
because its text has fewer tokens: what is scored is the same given text.

Tokens far from every such hole say little about its length, and each costs a
denoiser call: only the nearest ones are scored, and the others are visible.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from mdm_jax.core import distributed, rng
from mdm_jax.core.sharding import batch_sharding, put
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.sampling import learned_lengths
from mdm_jax.sampling.call import Canvas, Predictor
from mdm_jax.sampling.chain_rule import make_terms
from mdm_jax.sampling.config import SampleConfig
from mdm_jax.sampling.template import Candidates

# Given tokens that are scored on each side of a hole (docs/sampling.md).
NEAR = 8


class HoleLengths:
  """Says how likely each length of a hole is; compiles once."""

  def __init__(
    self,
    denoiser: Predictor,
    vocab: Vocabulary,
    mesh: jax.sharding.Mesh,
    rows: int,
    near: int = NEAR,
    untold: int | None = None,
  ):
    """Prepares the calls; nothing is compiled yet.

    Args:
      denoiser: computes hidden states and logits.
      vocab: the special ids.
      mesh: the devices; also to be the current mesh.
      rows: rows per call.
      near: given tokens that are scored on each side of a hole.
      untold: tokens of the longest hole whose length the model has learned to
        find (None: it hasn't).
    """
    self._vocab, self._untold = vocab, untold
    self._terms = make_terms(denoiser, vocab)
    self._mesh, self._rows, self._near = mesh, rows, near
    draw = lambda key, rows: jax.vmap(jax.random.uniform)(
      rng.per_row(key, rows)
    )
    self._uniform = jax.jit(draw, out_shardings=NamedSharding(mesh, P()))

  def describe(self, rule: str) -> str:
    """Returns how lengths are found with a value of `sample.hole_rule`."""
    if rule == "auto" and self._untold:
      return f"as learned from holes of up to {self._untold} tokens"
    return "by Bayes' rule"

  def __call__(
    self, params: Any, found: Candidates, rule: str = "auto"
  ) -> Float[np.ndarray, "B"]:
    """Returns log p(length | given text) of each candidate of each text.

    It is 0, without a call, for texts whose lengths are all told.

    Args:
      params: parameters of the denoiser.
      found: rows with every choice of lengths.
      rule: as `sample.hole_rule`.

    Raises:
      PromptError: a hole may be longer than those whose length was learned.
    """
    if (found.counts == 1).all():
      return np.zeros(len(found.untold))
    learned = rule == "auto" and self._untold
    logging.info("Lengths of holes are found %s.", self.describe(rule))
    nats = (self._learned if learned else self._bayes)(params, found)
    parts = np.split(-nats, np.cumsum(found.counts)[:-1])
    return np.concatenate([part - _log_sum(part) for part in parts])

  def _learned(self, params: Any, found: Candidates) -> Float[np.ndarray, "B"]:
    learned_lengths.check(found, self._untold)
    asked = learned_lengths.queries(found, self._untold, self._vocab)
    masked, at = [*asked.masked], asked.at.tolist()
    number = [*range(len(at))]
    nats = self._measured(params, asked.canvas, number, masked, at)
    return -learned_lengths.log_p(asked, nats, self._untold)

  def _bayes(self, params: Any, found: Candidates) -> Float[np.ndarray, "B"]:
    """Returns -log p(given text | length), up to a constant of each text."""
    several = np.repeat(found.counts > 1, found.counts)
    nats = np.zeros(len(several))
    row, masked, at = [], [], []
    for candidate in np.flatnonzero(several).tolist():
      for hidden, place in self._steps(found, candidate):
        row.append(candidate)
        masked.append(hidden)
        at.append(place)
    if row:
      np.add.at(
        nats, row, self._measured(params, found.canvas, row, masked, at)
      )
    return nats

  def choose(
    self,
    log_p: Float[np.ndarray, "B"],
    counts: Int[np.ndarray, "N"],
    text: Int[np.ndarray, "M"],
    number: Int[np.ndarray, "M"],
    config: SampleConfig,
  ) -> Int[np.ndarray, "M"]:
    """Returns the candidate that each of M samples is drawn into.

    Args:
      log_p: of each candidate, from a call.
      counts: candidates of each text.
      text: which text each sample is of.
      number: of each sample; its random number depends on this and the seed.
      config: whether lengths are drawn or the likeliest ones.
    """
    starts = np.cumsum(counts) - counts
    if counts.max(initial=1) == 1:
      return starts[text]
    parts = [np.exp(part) for part in np.split(log_p, starts[1:])]
    if config.hole_length == "likeliest":
      best = np.array([int(p.argmax()) for p in parts])
      return (starts + best)[text]
    stream = rng.stream(config.seed, "hole_lengths")
    uniform = distributed.fetch(self._uniform(stream, number.astype(np.int32)))
    chosen = []
    for i, share in zip(text, uniform, strict=True):
      at = np.searchsorted(parts[i].cumsum(), share, side="right")
      # The sum of all may be less than 1 by rounding.
      chosen.append(starts[i] + min(int(at), len(parts[i]) - 1))
    return np.array(chosen)

  def _steps(
    self, found: Candidates, row: int
  ) -> Iterator[tuple[Bool[np.ndarray, "L"], int]]:
    """Yields what is masked, and the given token that is revealed next."""
    canvas = found.canvas
    places = np.arange(canvas.tokens.shape[1])
    given = np.flatnonzero(~canvas.free[row] & (places < canvas.lengths[row]))
    holes = np.flatnonzero(found.untold[row])
    # A hole's nearest tokens are revealed first. The order is by distance, and
    # so the same for every length.
    distance = np.abs(given[:, None] - holes[None]).min(axis=1)
    order = np.argsort(distance, kind="stable")
    order = order[distance[order] <= self._near]
    masked = canvas.free[row].copy()
    masked[given[order]] = True
    for place in given[order]:
      yield masked.copy(), int(place)
      masked[place] = False

  def _measured(
    self,
    params: Any,
    canvas: Canvas,
    row: list[int],
    masked: list[Bool[np.ndarray, "L"]],
    at: list[int],
  ) -> Float[np.ndarray, "N"]:
    """Returns -log p of one token of each of N rows, in full calls."""
    nats, count = [], len(row)
    for start in range(0, count, self._rows):
      # The last call is filled up with its last row.
      number = np.minimum(np.arange(start, start + self._rows), count - 1)
      rows = np.array(row)[number]
      hidden = np.array([masked[n] for n in number])
      part = Canvas(
        *map(self._place, (canvas.tokens[rows], hidden, canvas.lengths[rows]))
      )
      place = np.array(at, np.int32)[number]
      found = self._terms(params, part, self._place(hidden), self._place(place))
      nats.append(distributed.fetch(found))
    return np.concatenate(nats)[:count].astype(np.float64)

  def _place(self, values: np.ndarray) -> Array:
    return put(values, batch_sharding(self._mesh, values.ndim))


def _log_sum(values: Float[np.ndarray, "K"]) -> float:
  most = values.max()
  return most + math.log(np.exp(values - most).sum())
