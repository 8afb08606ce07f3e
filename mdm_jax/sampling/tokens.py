"""Draws tokens from logits, with temperature, top-k, min-p and top-p.

Temperature divides the logits; then top-k, min-p and top-p filter, each what
the one before has left. All three keep a prefix of the same total order: more
likely tokens first, ties by the lower id.

The vocabulary is never sorted. A token is drawn hierarchically: Gumbel noise
selects a block of the vocabulary, then a token of that block. This needs so few
Gumbels that JAX's mode="high" is affordable: it costs twice as much, but
reaches 32 instead of 16, as tokens of probability 1e-9 need. All is float32.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Key

from mdm_jax.sampling import confidence
from mdm_jax.sampling.config import SampleConfig

_FEW = 128  # up to this k, `lax.top_k` is as fast as bisection

_Number = Any  # a float, a scalar array, or the shape of one

# A logit and an id: a place in the total order, not necessarily of a token.
_Place = tuple[Float[Array, ""], Int[Array, ""]]


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["temperature", "min_p", "top_p"],
  meta_fields=["top_k"],
)
@dataclasses.dataclass(frozen=True)
class Settings:
  """Temperature and filters; a filter that is None keeps everything.

  All but `top_k` can change without a recompilation.

  Attributes:
    temperature: divides the logits; near 0 the most likely token is drawn.
    top_k: keep this many of the most likely tokens.
    min_p: drop tokens below this fraction of the highest probability.
    top_p: keep the fewest most likely tokens that hold this fraction of the
      remaining probability; the token that crosses it is kept.
  """

  temperature: _Number = 1.0
  top_k: int | None = None
  min_p: _Number | None = None
  top_p: _Number | None = None


def effective_settings(config: SampleConfig) -> Settings:
  """Returns a config's settings; warns if its temperature is clamped."""
  temperature = effective_temperature(config)
  return Settings(temperature, config.top_k, config.min_p, config.top_p)


def effective_temperature(config: SampleConfig) -> float:
  """Returns the temperature, clamped to its range with a warning."""
  if config.temperature_range is None:
    return config.temperature
  low, high = config.temperature_range
  clamped = min(max(config.temperature, low), high)
  if clamped != config.temperature:
    logging.warning(
      "sample.temperature=%g is clamped to %g by sample.temperature_range="
      "(%g, %g); None switches the clamp off",
      config.temperature,
      clamped,
      low,
      high,
    )
  return clamped


# MARK: drawing


def draw(
  keys: Key[Array, "*N"], logits: Float[Array, "*N V"], settings: Settings
) -> Int[Array, "*N"]:
  """Draws one token from each distribution, each with its own key.

  Args:
    keys: one key per distribution.
    logits: unnormalised; -inf is never drawn, and one has to be finite.
    settings: temperature and filters.

  Raises:
    AssertionError: the logits are not float32. A bfloat16 Gumbel has 128 values
      up to 4.8: the tail of the vocabulary would never be drawn.
  """
  assert logits.dtype == jnp.float32, logits.dtype
  if jax.sharding.get_abstract_mesh().empty:
    return _draw_all(settings, keys, logits)
  # Every shard draws its own rows: for a top-k XLA would gather them all.
  *split, _ = jax.typeof(logits).sharding.spec
  draw_own = jax.shard_map(
    _draw_all,
    in_specs=(P(), P(*split), P(*split, None)),
    out_specs=P(*split),
    check_vma=False,
  )
  settings = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), settings)
  return draw_own(settings, keys, logits)


def _draw_all(
  settings: Settings, keys: Key[Array, "*N"], logits: Float[Array, "*N V"]
) -> Int[Array, "*N"]:
  return confidence.over(functools.partial(_draw_one, settings), keys.ndim)(
    keys, logits
  )


def _draw_one(
  settings: Settings, key: Key[Array, ""], logits: Float[Array, "V"]
) -> Int[Array, ""]:
  k, few = settings.top_k, max(_FEW, logits.size // 32)
  if k is not None and k < logits.size and k <= few:
    return _draw_candidate(settings, key, *jax.lax.top_k(logits, k))
  return _draw_in_blocks(settings, key, _Blocks(logits, settings))


def _draw_candidate(
  settings: Settings,
  key: Key[Array, ""],
  logits: Float[Array, "K"],
  ids: Int[Array, "K"],
) -> Int[Array, ""]:
  """Draws from the candidates of a small top-k, in descending order."""
  peak = logits.max()  # logits[0] is the same, but XLA would sort for it
  scores = _scores(settings, logits, peak)
  if settings.min_p is not None:
    scores = jnp.where(logits >= _least(settings, peak), scores, -jnp.inf)
  if settings.top_p is not None:
    weights = jnp.exp(scores)
    before = jnp.cumsum(weights) - weights
    kept = before < _limit(settings, weights.sum())
    scores = jnp.where(kept, scores, -jnp.inf)
  return ids[_choose(key, scores)]


def _draw_in_blocks(
  settings: Settings, key: Key[Array, ""], blocks: "_Blocks"
) -> Int[Array, ""]:
  """Draws from the whole vocabulary; top-p is done by rejection.

  A token is rejected if those before it already hold the top-p mass. The next
  round draws from those: none of the others could be accepted, so the result
  has exactly the truncated distribution, and candidates get fewer. At top-p 0.9
  at most one position in ten needs a second round.
  """
  end = blocks.end()
  masses = blocks.masses(end)
  token = blocks.pick(jax.random.fold_in(key, 0), masses, end)
  if settings.top_p is None:
    return token[1]
  limit = _limit(settings, masses.sum())

  def refused(state):
    _, _, masses = state
    return masses.sum() >= limit

  def again(state):
    number, token, masses = state
    token = blocks.pick(jax.random.fold_in(key, number), masses, token)
    return number + 1, token, blocks.masses(token)

  state = jnp.ones_like(token[1]), token, blocks.masses(token)
  return jax.lax.while_loop(refused, again, state)[1][1]


class _Blocks:
  """Logits of one position, split into blocks of the vocabulary."""

  def __init__(self, logits: Float[Array, "V"], settings: Settings):
    self._settings, self._peak = settings, logits.max()
    self._logits = confidence.in_blocks(logits)
    shape = self._logits.shape
    self._ids = jnp.arange(self._logits.size, dtype=jnp.int32).reshape(shape)

  def end(self) -> _Place | None:
    """Returns the first place that top-k or min-p drops; None if neither."""
    places = []
    vocab, k = self._logits.size, self._settings.top_k
    if k is not None and k < vocab:
      places.append(self._end_of(k))
    if self._settings.min_p is not None:
      places.append((_least(self._settings, self._peak), jnp.int32(vocab)))
    return functools.reduce(_earlier, places) if places else None

  def masses(self, end: _Place | None) -> Float[Array, "M"]:
    """Returns each block's mass before a place; the top token has mass 1."""
    weights = jnp.exp(_scores(self._settings, self._logits, self._peak))
    return _keep(weights, self._logits, self._ids, end, 0.0).sum(axis=1)

  def pick(
    self, key: Key[Array, ""], masses: Float[Array, "M"], end: _Place | None
  ) -> _Place:
    """Draws a token before a place, given the blocks' masses before it."""
    block = _choose(jax.random.fold_in(key, 0), jnp.log(masses))
    logits = self._logits[block]
    ids = block * logits.size + jnp.arange(logits.size)
    scores = _scores(self._settings, logits, self._peak)
    scores = _keep(scores, logits, ids, end, -jnp.inf)
    choice = _choose(jax.random.fold_in(key, 1), scores)
    return logits[choice], ids[choice]

  def _end_of(self, k: int) -> _Place:
    """Returns the place behind the top k: bisects the logit, then the id."""
    best = -_ordinal(self._peak)
    worst = -_ordinal(jnp.full_like(self._peak, -jnp.inf))
    first, vocab = (jnp.full_like(best, n) for n in (0, self._logits.size))
    at = _bisect(lambda n: self._count((_float(-n), vocab)), k, best, worst)
    logit = _float(-at)
    number = lambda n: self._count((logit, n))
    return logit, _bisect(number, k, first, vocab)

  def _count(self, end: _Place) -> Int[Array, ""]:
    """Returns how many tokens are before a place."""
    before = _before(self._logits, self._ids, end)
    # A block's count fits a byte, and summing bytes is five times as fast.
    return before.sum(axis=1, dtype=jnp.uint8).sum(dtype=jnp.int32)


def _scores(
  settings: Settings, logits: Float[Array, "*N"], peak: Float[Array, ""]
) -> Float[Array, "*N"]:
  """Divides by the temperature; the maximum is 0, so nothing overflows."""
  return (logits - peak) / _temperature(settings)


def _least(settings: Settings, peak: Float[Array, ""]) -> Float[Array, ""]:
  """Returns the lowest logit that min-p keeps."""
  share = jnp.asarray(settings.min_p, jnp.float32)
  return peak + _temperature(settings) * jnp.log(share)


def _temperature(settings: Settings) -> Float[Array, ""]:
  # XLA may multiply by the reciprocal, so that has to be finite too.
  return jnp.clip(jnp.asarray(settings.temperature, jnp.float32), 1e-30, 1e30)


def _limit(settings: Settings, total: Float[Array, ""]) -> Float[Array, ""]:
  """Returns the mass before a token from which on top-p rejects it."""
  top_p = jnp.asarray(settings.top_p, jnp.float32)
  # At 1, rounding of the sums would drop the last tokens; at 0, the first.
  return jnp.where(top_p < 1, jnp.maximum(top_p, 1e-30) * total, jnp.inf)


def _choose(key: Key[Array, ""], scores: Float[Array, "C"]) -> Int[Array, ""]:
  return jax.random.categorical(key, scores, mode="high")


# MARK: places in the order


def _before(
  logits: Float[Array, "*N"], ids: Int[Array, "*N"], place: _Place
) -> Bool[Array, "*N"]:
  logit, token = place
  return (logits > logit) | ((logits == logit) & (ids < token))


def _keep(values, logits, ids, end: _Place | None, otherwise: float):
  if end is None:
    return values
  return jnp.where(_before(logits, ids, end), values, otherwise)


def _earlier(one: _Place, other: _Place) -> _Place:
  pick = functools.partial(jnp.where, _before(*one, other))
  return jax.tree.map(pick, one, other)


def _bisect(
  count: Callable[[Int[Array, ""]], Int[Array, ""]],
  enough: int,
  low: Int[Array, ""],
  high: Int[Array, ""],
) -> Int[Array, ""]:
  """Returns an n with count(n) == enough, or the smallest with more.

  Needs a count that rises with n, and count(high) >= enough.
  """

  def unsure(state):
    low, high, counted = state
    return (low < high) & (counted != enough)

  def halve(state):
    low, high, _ = state
    middle = (low & high) + ((low ^ high) >> 1)  # their sum could overflow
    counted = count(middle)
    found = counted >= enough
    low = jnp.where(found, low, middle + 1)
    return low, jnp.where(found, middle, high), counted

  return jax.lax.while_loop(unsure, halve, (low, high, count(high)))[1]


def _ordinal(value: Float[Array, ""]) -> Int[Array, ""]:
  """Maps a float32 to an int32, keeping the order of floats."""
  return _flip(jax.lax.bitcast_convert_type(value, jnp.int32))


def _float(ordinal: Int[Array, ""]) -> Float[Array, ""]:
  return jax.lax.bitcast_convert_type(_flip(ordinal), jnp.float32)


def _flip(bits: Int[Array, ""]) -> Int[Array, ""]:
  """Inverts the magnitude of negative floats: as ints they order backwards."""
  return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)
