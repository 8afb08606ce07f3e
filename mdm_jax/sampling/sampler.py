"""The sampling loop: reverse diffusion from MASK to text in `num_steps` steps.

Every step decides where before what:

  hidden states -> a ranking of the masked positions (`order`)
  -> how many of the first to reveal (`schedule`: a pace, or a budget)
  -> the logits of these positions only -> a token for each (`tokens`)
  -> which revealed tokens to mask again, if any (`remasking`).

A drawn token is kept: drawing at every position and keeping the most likely
tokens would lower the temperature implicitly (Hayakawa et al. 2025, arXiv
2510.04525). With one token per step, samples are exact under any order.

All shapes are static. Logits are computed in as many chunks of positions as a
step needs, so no array has shape [B, L, V].
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from mdm_jax.core.sharding import RULES
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.model import inference
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.sampling import confidence, order, remasking, schedule, tokens
from mdm_jax.sampling.call import Call, Canvas, Predictor, padded
from mdm_jax.sampling.config import SampleConfig
from mdm_jax.sampling.samples import Drawn, Notes
from mdm_jax.sampling.schedule import Pace
from mdm_jax.sampling.tokens import Settings

# What XLA is told of this program on a GPU. Without kernels of Triton for
# products, those of cuBLAS add the residual as they write, in place of a kernel
# that reads both again (docs/performance.md).
GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}
_DRAW, _PUT_BACK, _ORDER = range(3)  # separate random streams of a row's key


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class State(Notes):
  """The loop's state.

  Attributes:
    x: current ids xt.
    masked: positions still to be drawn. Not derived from x, since a given token
      may have the mask id.
    end: length of each row; ends behind a drawn end-of-text token.
  """

  x: Int[Array, "B L"]
  masked: Bool[Array, "B L"]
  end: Int[Array, "B"]


Sampler = Callable[[Any, Canvas, Pace, Settings, Key[Array, "B"]], Drawn]
Watch = Callable[[Int[Array, ""], Int[Array, "B L"]], None]


def make_sampler(
  config: SampleConfig,
  denoiser: Predictor,
  vocab: Vocabulary,
  watch: Watch | None = None,
) -> Sampler:
  """Returns a jitted (params, canvas, pace, settings, row_keys) -> Drawn.

  A row depends only on its own canvas and key, not on the rest of the batch.

  Args:
    config: static settings of the loop; temperature and filters are read from
      the sampler's `settings` argument instead.
    denoiser: computes hidden states and logits.
    vocab: the special ids.
    watch: called while the sampler runs, with 0 and the masked canvas, then
      with each step's number, from 1, and the ids after it. No calls are made
      for steps after all rows are finished.
  """
  see = lambda *args: watch and jax.debug.callback(watch, *args)

  options = GPU_OPTIONS if jax.default_backend() == "gpu" else None

  @functools.partial(jax.jit, compiler_options=options)
  def sample(
    params: Any,
    canvas: Canvas,
    pace: Pace,
    settings: Settings,
    row_keys: Key[Array, "B"],
  ) -> Drawn:
    canvas = padded(canvas, vocab.need("pad"))
    if isinstance(denoiser, Denoiser):
      # Once, not in every step.
      params = inference.ready(denoiser, params) or params
    steps = Steps(
      config, denoiser, vocab, params, canvas, pace, settings, row_keys
    )

    def advance(i, state):
      state = steps.step(i, state)
      see(i + 1, state.x)
      return state

    def step(i, carry):
      state, path = carry
      # Budgets and end-of-text tokens can finish all rows early.
      busy = state.masked.any()
      state = jax.lax.cond(busy, advance, lambda _, s: s, i, state)
      return state, path.at[i + 1].set(state.x)

    state = steps.start()
    see(jnp.int32(0), state.x)
    path = jnp.broadcast_to(state.x, (config.num_steps + 1, *state.x.shape))
    carry = jax.lax.fori_loop(0, config.num_steps, step, (state, path))
    state, path = carry
    names = (field.name for field in dataclasses.fields(Notes))
    return Drawn(path=path, **{name: getattr(state, name) for name in names})

  return sample


@dataclasses.dataclass(frozen=True)
class Steps:
  """The parts of a sampling step, for the arguments of one sampler call.

  `sampling/chain_rule.py` has a subclass that draws the tokens of a text.
  """

  config: SampleConfig
  denoiser: Predictor
  vocab: Vocabulary
  params: Any
  canvas: Canvas
  pace: Pace
  settings: Settings
  row_keys: Key[Array, "B"]

  def start(self) -> State:
    canvas = self.canvas
    nothing = jnp.zeros_like(canvas.tokens, jnp.float32)
    count = jnp.zeros_like(canvas.lengths)
    return State(
      x=jnp.where(canvas.free, self.vocab.need("mask"), canvas.tokens),
      masked=canvas.free,
      end=canvas.lengths,
      step=jnp.full_like(canvas.tokens, -1),
      confidence=nothing,
      entropy=nothing,
      calls=count,
      put_back=count,
    )

  def step(self, i: Int[Array, ""], s: State) -> State:
    left = s.masked.sum(axis=1)
    after, back = self._planned(i, s.end, left)
    call = Call(
      self.config,
      self.denoiser,
      self.vocab,
      self.params,
      self.canvas,
      s.x,
      s.masked,
      s.end,
      everywhere=bool(self._scoring),
    )
    where, safe = self._candidates(call, i, s)
    count = self._count(safe, left, left + back - after, i)
    s = self._reveal(call, where, count, i, s)
    if self.config.remasking != "none":
      # Planned anew, as this step may have drawn an end and shortened the row.
      after, back = self._planned(i, s.end, left)
      number = jnp.clip(after - s.masked.sum(axis=1), 0, back)
      s = self._put_back(number, i, s)
    each = 2 if self.config.guidance else 1
    calls = s.calls + jnp.where(left > 0, each, 0)
    return dataclasses.replace(s, calls=calls)

  def _planned(
    self, i: Int[Array, ""], end: Int[Array, "B"], left: Int[Array, "B"]
  ) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """Returns how many tokens a step leaves masked, and how many it remasks.

    Only tokens before a row's end count: its schedule is that of this length.
    Finished rows, of which none are left, remask nothing.
    """
    canvas, pace = self.canvas, self.pace
    inside = jnp.arange(canvas.free.shape[1])[None] < end[:, None]
    total = (canvas.free & inside).sum(axis=1)
    after = total - _look_up(pace.revealed[i + 1], total)
    back = _look_up(pace.put_back[i], total)
    return after, jnp.where(left > 0, back, 0)

  def _keys(self, stream: int) -> Key[Array, "B"]:
    return _fold(self.row_keys, stream)

  # MARK: where

  def _candidates(
    self, call: Call, i: Int[Array, ""], s: State
  ) -> tuple[Int[Array, "B L"], Bool[Array, "B L"]]:
    """Returns positions by rank, and which of these a budget lets reveal."""
    config, length = self.config, s.x.shape[1]
    size = config.block_length or length
    block = jnp.arange(length) // size
    scores = self._scores(call, size, s)
    keys = order_keys(self.row_keys)
    if config.order in scores:
      first = order.rounded(scores[config.order])
      # Ties, as on an empty canvas, fall back to the order `spread`.
      then = order.priority("spread", keys, i, length)
    else:
      first = order.priority(config.order, keys, i, length)
      then = jnp.zeros_like(s.confidence)
    if config.threshold is not None:
      safe = scores["confidence"] > config.threshold
      # `_count` reveals a prefix of the ranking: these have to come first.
      first = jnp.where(safe, jnp.inf, first)
    where = order.rank(s.masked, block, first, then)
    at = lambda values: jnp.take_along_axis(values, where, axis=1)
    if config.threshold is not None:
      safe = at(safe)
    elif config.entropy_bound is not None:
      entropies = -at(scores["entropy"])
      safe = schedule.within_entropy(entropies, config.entropy_bound)
    else:
      return where, jnp.zeros_like(s.masked)
    return where, safe & at(s.masked) & (where // size == where[:, :1] // size)

  @property
  def _scoring(self) -> set[str]:
    """Orders by logits that a step needs: the configured, and a budget's."""
    config = self.config
    names = {config.order} if order.reads_logits(config.order) else set()
    names |= {"confidence"} if config.threshold is not None else set()
    names |= {"entropy"} if config.entropy_bound is not None else set()
    return names

  def _scores(
    self, call: Call, block_length: int, s: State
  ) -> dict[str, Float[Array, "B L"]]:
    """Scores the masked positions of the current block; -inf elsewhere.

    By the orders whose scores the step needs: the configured one, if it reads
    logits, and that of a budget.
    """
    config, length = self.config, s.x.shape[1]
    names = self._scoring
    if not names:
      return {}
    nothing = jnp.zeros_like(s.confidence)
    where = order.rank(s.masked, jnp.zeros(length, jnp.int32), nothing, nothing)
    # Beyond the block too, by an even pace: a step may finish a block and
    # continue in the next.
    ahead = -(-length // config.num_steps)
    inside = where // block_length == where[:, :1] // block_length
    inside &= jnp.take_along_axis(s.masked, where, axis=1)
    count = jnp.minimum(inside.sum(axis=1) + ahead, s.masked.sum(axis=1))

    def body(slots, kept, scores):
      logits = call.logits(slots)
      found = {name: order.ORDERS[name](logits) for name in names}
      if config.end_last:
        found = order.ends_last(found, logits, self.vocab)
      return {n: _put(scores[n], slots, kept, x) for n, x in found.items()}

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
    """Returns how many tokens to reveal; in the last step, all of them."""
    if (self.config.entropy_bound, self.config.threshold) != (None, None):
      # An even pace over the remaining steps, so that num_steps suffice.
      pace = -(-left // (self.config.num_steps - i))
      count = jnp.maximum(safe.sum(axis=1), pace)
    else:
      count = due
    # With remasking, a schedule may have steps that reveal nothing.
    least = jnp.minimum(left, 1) if self.config.remasking == "none" else 0
    return jnp.clip(count, least, left)

  # MARK: what

  def _reveal(
    self,
    call: Call,
    where: Int[Array, "B L"],
    count: Int[Array, "B"],
    i: Int[Array, ""],
    s: State,
  ) -> State:
    """Draws tokens at the first `count` positions, and cuts rows at an end."""
    keys = _fold(self._keys(_DRAW), i)

    def body(slots, kept, s):
      logits = call.logits(slots)
      drawn = self.draw(keys, slots, logits)
      put = lambda values, new: _put(values, slots, kept, new)
      return dataclasses.replace(
        s,
        x=put(s.x, drawn),
        masked=put(s.masked, jnp.zeros_like(kept)),
        step=put(s.step, jnp.full_like(slots, i)),
        confidence=put(s.confidence, self.confidence(logits, drawn)),
        entropy=put(s.entropy, confidence.entropy(logits)),
      )

    most = -(-s.x.shape[1] // self.config.num_steps)
    return self._cut(call.in_chunks(where, count, most, body, s), i)

  def draw(
    self,
    keys: Key[Array, "B"],
    slots: Int[Array, "B N"],
    logits: Float[Array, "B N V"],
  ) -> Int[Array, "B N"]:
    """Returns a token for each of some positions."""
    # A key per position: a draw doesn't depend on chunks or other positions.
    at = jax.vmap(lambda key, where: jax.vmap(_fold_in, (None, 0))(key, where))
    return tokens.draw(at(keys, slots), logits, self.settings)

  def confidence(
    self, logits: Float[Array, "B N V"], drawn: Int[Array, "B N"]
  ) -> Float[Array, "B N"]:
    """Returns what is stored as the confidence of drawn tokens."""
    return confidence.probability(logits, drawn)

  def _cut(self, s: State, i: Int[Array, ""]) -> State:
    """Ends rows behind an end-of-text token that was drawn in step i."""
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
    self, number: Int[Array, "B"], i: Int[Array, ""], s: State
  ) -> State:
    """Remasks tokens that earlier steps drew, except end-of-text tokens."""
    old = (s.step >= 0) & (s.step < i) & ~s.masked
    eligible = old & self.canvas.free & ~self.vocab.is_end(s.x)
    keys = _fold(self._keys(_PUT_BACK), i)
    chosen = remasking.chosen(
      self.config.remasking, keys, eligible, s.confidence, number
    )
    return dataclasses.replace(
      s,
      x=jnp.where(chosen, self.vocab.mask, s.x),
      masked=s.masked | chosen,
      put_back=s.put_back + chosen.sum(axis=1),
    )


def order_keys(row_keys: Key[Array, "B"]) -> Key[Array, "B"]:
  """Returns the keys of the priorities of orders by position."""
  return _fold(row_keys, _ORDER)


def _put(
  values: Array, where: Int[Array, "B N"], kept: Bool[Array, "B N"], new: Array
) -> Array:
  """Writes new values at the kept positions of each row."""
  # Others are sent out of range, where mode="drop" ignores them.
  where = jnp.where(kept, where, values.shape[1])
  write = lambda row, at, new: row.at[at].set(new, mode="drop")
  return jax.vmap(write)(values, where, new)


def _look_up(values: Int[Array, "N"], index: Int[Array, "B"]):
  return values.at[index].get(out_sharding=RULES.spec("batch"))


_fold_in = jax.random.fold_in


def _fold(keys: Key[Array, "B"], number: int | Int[Array, ""]):
  return jax.vmap(_fold_in, in_axes=(0, None))(keys, number)
