"""The reverse process: from masks to text in so many denoiser calls.

Every step decides where before what:

  hidden states -> a rank of the masked positions (`order`)
  -> how many of the first to reveal (`schedule`: a pace, or a budget)
  -> their logits, and no others' -> a token for each (`tokens`)
  -> which revealed tokens to mask again (`remasking`), if any.

A token that is drawn is kept: drawing everywhere and keeping the likeliest is
an undeclared temperature (Hayakawa et al. 2025, arXiv 2510.04525). One token a
step is an exact sample of the model's any-order distribution, under any order.

All shapes are fixed. Logits exist for some positions at a time, in chunks whose
number depends on how many are needed: a step that reveals six tokens projects
six positions, and no array has a vocabulary for every position.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from mdm_jax.core.sharding import RULES
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.sampling import order, remasking, schedule, tokens
from mdm_jax.sampling.call import Call, Canvas, Predictor, padded
from mdm_jax.sampling.config import SampleConfig
from mdm_jax.sampling.schedule import Pace
from mdm_jax.sampling.tokens import Settings

_DRAW, _PUT_BACK, _ORDER = range(3)  # what a row's keys are for


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
  """Texts, and how they came about.

  Attributes:
    path: token ids before each step, and after the last. Behind the first
      end-of-text token that was drawn is padding.
    step: the step that revealed a token last; -1 where it was given or cut.
    confidence: the probability of the token that was drawn.
    entropy: of the distribution there, in nats.
    calls: denoiser calls until a row was finished.
    put_back: tokens of a row that were masked again.
  """

  path: Int[Array | np.ndarray, "S B L"]
  step: Int[Array | np.ndarray, "B L"]
  confidence: Float[Array | np.ndarray, "B L"]
  entropy: Float[Array | np.ndarray, "B L"]
  calls: Int[Array | np.ndarray, "B"]
  put_back: Int[Array | np.ndarray, "B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
  """What a step changes.

  Attributes:
    x: the texts so far.
    masked: what is still to be drawn; never told from x.
    end: tokens of each row, less where an end-of-text token was drawn.
  """

  x: Int[Array, "B L"]
  masked: Bool[Array, "B L"]
  end: Int[Array, "B"]
  step: Int[Array, "B L"]
  confidence: Float[Array, "B L"]
  entropy: Float[Array, "B L"]
  calls: Int[Array, "B"]
  put_back: Int[Array, "B"]


Sampler = Callable[[Any, Canvas, Pace, Settings, Key[Array, "B"]], Drawn]
Watch = Callable[[Int[Array, ""], Int[Array, "B L"]], None]


def make_sampler(
  config: SampleConfig,
  denoiser: Predictor,
  vocab: Vocabulary,
  watch: Watch | None = None,
) -> Sampler:
  """Returns the sampler: (params, canvas, pace, settings, row_keys) -> drawn.

  It is jitted. A row depends on its own canvas and key only, not on the batch
  around it.

  Args:
    config: the loop; temperature and filters are the settings that are given.
    denoiser: what is asked.
    vocab: what the special ids are.
    watch: called with each step's number, from 1, and the texts after it, while
      the sampler runs; 0 is for the canvas. When all is drawn it is done.
  """
  steps = _Steps(config, denoiser, vocab)
  see = lambda *args: watch and jax.debug.callback(watch, *args)

  @jax.jit
  def sample(
    params: Any,
    canvas: Canvas,
    pace: Pace,
    settings: Settings,
    row_keys: Key[Array, "B"],
  ) -> Drawn:
    def advance(i, state):
      state = steps.step(params, canvas, pace, settings, row_keys, i, state)
      see(i + 1, state.x)
      return state

    def step(i, carry):
      state, path = carry
      busy = state.masked.any()
      state = jax.lax.cond(busy, advance, lambda _, s: s, i, state)
      return state, path.at[i + 1].set(state.x)

    canvas = padded(canvas, vocab.need("pad"))
    state = steps.start(canvas)
    see(jnp.int32(0), state.x)
    path = jnp.broadcast_to(state.x, (config.num_steps + 1, *state.x.shape))
    carry = jax.lax.fori_loop(0, config.num_steps, step, (state, path))
    state, path = carry
    return Drawn(
      path,
      state.step,
      state.confidence,
      state.entropy,
      state.calls,
      state.put_back,
    )

  return sample


@dataclasses.dataclass(frozen=True)
class _Steps:
  """The parts of a step, with one set of settings."""

  config: SampleConfig
  denoiser: Predictor
  vocab: Vocabulary

  def start(self, canvas: Canvas) -> _State:
    none = jnp.full_like(canvas.tokens, -1)
    nothing = jnp.zeros_like(canvas.tokens, jnp.float32)
    count = jnp.zeros_like(canvas.lengths)
    return _State(
      x=jnp.where(canvas.free, self.vocab.need("mask"), canvas.tokens),
      masked=canvas.free,
      end=canvas.lengths,
      step=none,
      confidence=nothing,
      entropy=nothing,
      calls=count,
      put_back=count,
    )

  def step(
    self,
    params: Any,
    canvas: Canvas,
    pace: Pace,
    settings: Settings,
    row_keys: Key[Array, "B"],
    i: Int[Array, ""],
    state: _State,
  ) -> _State:
    left = state.masked.sum(axis=1)
    after, back = self._planned(pace, canvas, i, state.end)
    back = jnp.where(left > 0, back, 0)
    call = Call(
      self.config,
      self.denoiser,
      self.vocab,
      params,
      canvas,
      state.x,
      state.masked,
      state.end,
    )
    where, safe = self._candidates(call, row_keys, i, state)
    count = self._count(safe, left, left + back - after, i)
    keys = _fold(_fold(row_keys, _DRAW), i)
    revealed = self._reveal(call, settings, keys, where, count, i, state)
    if self.config.remasking != "none":
      after, back = self._planned(pace, canvas, i, revealed.end)
      back = jnp.where(left > 0, back, 0)
      number = jnp.clip(after - revealed.masked.sum(axis=1), 0, back)
      keys = _fold(_fold(row_keys, _PUT_BACK), i)
      revealed = self._put_back(keys, canvas, number, i, revealed)
    each = 2 if self.config.guidance else 1
    calls = state.calls + jnp.where(left > 0, each, 0)
    return dataclasses.replace(revealed, calls=calls)

  def _planned(
    self, pace: Pace, canvas: Canvas, i: Int[Array, ""], end: Int[Array, "B"]
  ) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """Returns how many are masked after a step, and how many it puts back.

    By the schedule of what is before the end of a row.
    """
    inside = jnp.arange(canvas.free.shape[1])[None] < end[:, None]
    total = (canvas.free & inside).sum(axis=1)
    after = total - _look_up(pace.revealed[i + 1], total)
    return after, _look_up(pace.put_back[i], total)

  # MARK: where

  def _candidates(
    self, call: Call, row_keys: Key[Array, "B"], i: Int[Array, ""], s: _State
  ) -> tuple[Int[Array, "B L"], Bool[Array, "B L"]]:
    """Returns positions in order, and which of them a budget allows."""
    config, length = self.config, s.x.shape[1]
    size = config.block_length or length
    block = jnp.arange(length) // size
    if order.asks(config.order) or self._has_budget():
      scores = self._scores(call, size, s)
    keys = _fold(row_keys, _ORDER)
    if order.asks(config.order):
      first = order.rounded(scores[config.order])
      then = order.priority("spread", keys, i, length)
    else:
      first = order.priority(config.order, keys, i, length)
      then = jnp.zeros_like(s.confidence)
    if config.threshold is not None:
      sure = scores["confidence"] > config.threshold
      first = jnp.where(sure, jnp.inf, first)
    where = order.rank(s.masked, block, first, then)
    if not self._has_budget():
      return where, jnp.zeros_like(s.masked)
    at = lambda values: jnp.take_along_axis(values, where, axis=1)
    if config.threshold is not None:
      safe = at(sure)
    else:
      safe = schedule.within_entropy(
        -at(scores["entropy"]), config.entropy_bound
      )
    return where, safe & at(s.masked) & (where // size == where[:, :1] // size)

  def _has_budget(self) -> bool:
    given = self.config.entropy_bound, self.config.threshold
    return given != (None, None)

  def _scores(
    self, call: Call, block_length: int, s: _State
  ) -> dict[str, Float[Array, "B L"]]:
    """Asks how sure the denoiser is of the next positions, left to right."""
    names = {self.config.order} if order.asks(self.config.order) else set()
    if self._has_budget():
      names |= {"entropy" if self.config.threshold is None else "confidence"}
    nothing = jnp.zeros_like(s.confidence)
    block = jnp.zeros(s.x.shape[1], jnp.int32)
    where = order.rank(s.masked, block, nothing, nothing)
    # A step may end a block and go on in the next one.
    ahead = -(-s.x.shape[1] // self.config.num_steps)
    inside = where // block_length == where[:, :1] // block_length
    inside &= jnp.take_along_axis(s.masked, where, axis=1)
    count = jnp.minimum(inside.sum(axis=1) + ahead, s.masked.sum(axis=1))

    def body(slots, kept, scores):
      logits = call.logits(slots)
      return {
        name: _put(scores[name], slots, kept, order.score(name, logits))
        for name in names
      }

    start = {name: nothing - jnp.inf for name in names}
    return call.in_chunks(where, count, block_length, body, start)

  # MARK: how many

  def _count(
    self,
    safe: Bool[Array, "B L"],
    left: Int[Array, "B"],
    due: Int[Array, "B"],
    i: Int[Array, ""],
  ) -> Int[Array, "B"]:
    """Returns how many tokens to reveal: at least one, all in the last step."""
    if self._has_budget():
      pace = -(-left // (self.config.num_steps - i))
      count = jnp.maximum(safe.sum(axis=1), pace)
    else:
      count = due
    least = jnp.minimum(left, 1) if self.config.remasking == "none" else 0
    return jnp.clip(count, least, left)

  # MARK: what

  def _reveal(
    self,
    call: Call,
    settings: Settings,
    keys: Key[Array, "B"],
    where: Int[Array, "B L"],
    count: Int[Array, "B"],
    i: Int[Array, ""],
    s: _State,
  ) -> _State:
    """Draws the first tokens of a rank, and cuts what is behind an end."""

    def body(slots, kept, s):
      logits = call.logits(slots)
      at = jax.vmap(
        lambda key, where: jax.vmap(_fold_in, (None, 0))(key, where)
      )
      drawn = tokens.draw(at(keys, slots), logits, settings)
      put = lambda values, new: _put(values, slots, kept, new)
      return dataclasses.replace(
        s,
        x=put(s.x, drawn),
        masked=put(s.masked, jnp.zeros_like(kept)),
        step=put(s.step, jnp.full_like(slots, i)),
        confidence=put(s.confidence, tokens.probability(logits, drawn)),
        entropy=put(s.entropy, tokens.entropy(logits)),
      )

    most = -(-s.x.shape[1] // self.config.num_steps)
    return self._cut(call.in_chunks(where, count, most, body, s), i)

  def _cut(self, s: _State, i: Int[Array, ""]) -> _State:
    """Ends rows behind an end-of-text token that this step has drawn."""
    positions = jnp.arange(s.x.shape[1])[None]
    ends = self.vocab.is_end(s.x) & (s.step == i)
    end = jnp.where(ends, positions + 1, s.x.shape[1]).min(axis=1)
    end = jnp.minimum(s.end, end)
    behind = positions >= end[:, None]
    return dataclasses.replace(
      s,
      x=jnp.where(behind, self.vocab.pad, s.x),
      masked=s.masked & ~behind,
      end=end,
      step=jnp.where(behind, -1, s.step),
      confidence=jnp.where(behind, 0.0, s.confidence),
      entropy=jnp.where(behind, 0.0, s.entropy),
    )

  def _put_back(
    self,
    keys: Key[Array, "B"],
    canvas: Canvas,
    number: Int[Array, "B"],
    i: Int[Array, ""],
    s: _State,
  ) -> _State:
    """Masks some tokens again: no given one, none of this step, no end."""
    old = (s.step >= 0) & (s.step < i) & ~s.masked
    eligible = old & canvas.free & ~self.vocab.is_end(s.x)
    chosen = remasking.chosen(
      self.config.remasking, keys, eligible, s.confidence, number
    )
    return dataclasses.replace(
      s,
      x=jnp.where(chosen, self.vocab.mask, s.x),
      masked=s.masked | chosen,
      put_back=s.put_back + chosen.sum(axis=1),
    )


def _put(
  values: Array,
  where: Int[Array, "B N"],
  kept: Bool[Array, "B N"],
  new: Array,
) -> Array:
  """Writes new values at the kept positions of each row."""
  where = jnp.where(kept, where, values.shape[1])
  write = lambda row, at, new: row.at[at].set(new, mode="drop")
  return jax.vmap(write)(values, where, new)


def _look_up(values: Int[Array, "N"], index: Int[Array, "B"]):
  return values.at[index].get(out_sharding=RULES.spec("batch"))


_fold_in = jax.random.fold_in


def _fold(keys: Key[Array, "B"], number: int | Int[Array, ""]):
  return jax.vmap(_fold_in, in_axes=(0, None))(keys, number)
