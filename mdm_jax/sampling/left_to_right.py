"""Draws texts from an autoregressive model, one token at a time.

One call reads all prompts and keeps their keys and values; then each step of a
loop reads one token per row, writes its keys and values into the same buffer,
and draws the next token (`model/cache.py`).

A row does not depend on the others. Rows with longer prompts wait in the loop
until their first free position; what the loop computes for them until then is
discarded, so that their keys and values stay those of the first call.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Key

from mdm_jax.core.sharding import RULES
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.model.context import Context, KVCache, row_context
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.objectives.base import Decoding
from mdm_jax.sampling import confidence, tokens
from mdm_jax.sampling.call import Canvas, padded
from mdm_jax.sampling.sampler import Sampler, Watch
from mdm_jax.sampling.samples import Drawn, Notes
from mdm_jax.sampling.schedule import Pace
from mdm_jax.sampling.tokens import Settings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _State(Notes):
  """The loop's state.

  Attributes:
    at: the position to draw, the same in all rows.
    x: current ids; MASK at positions still to be drawn.
    end: length of each row; ends behind a drawn end-of-text token.
    cache: keys and values of the positions before `at`.
  """

  at: Int[Array, ""]
  x: Int[Array, "B L"]
  end: Int[Array, "B"]
  cache: KVCache


def make_sampler(
  model: Denoiser,
  vocab: Vocabulary,
  decoding: Decoding,
  watch: Watch | None = None,
) -> Sampler:
  """Returns a jitted (params, canvas, pace, settings, row_keys) -> Drawn.

  As `sampler.make_sampler`, but `pace` is not read: every step draws a token.
  The free positions of a row must be its last ones.

  Args:
    model: computes hidden states, keys and values, and logits.
    vocab: the special ids.
    decoding: the begin id, and which positions attend to which.
    watch: see `sampler.make_sampler`.
  """
  see = lambda *args: watch and jax.debug.callback(watch, *args)

  @jax.jit
  def sample(
    params: Any,
    canvas: Canvas,
    pace: Pace,
    settings: Settings,
    row_keys: Key[Array, "B"],
  ) -> Drawn:
    del pace
    canvas = padded(canvas, vocab.need("pad"))
    steps = _Steps(model, vocab, decoding, params, canvas, settings, row_keys)
    start = steps.first.min()

    def step(state):
      state = steps.step(state)
      see(state.at - start, state.x)
      return state

    state = steps.start(start)
    see(jnp.int32(0), state.x)
    busy = lambda s: (s.at < s.end).any()
    state = jax.lax.while_loop(busy, step, state)
    names = (field.name for field in dataclasses.fields(Notes))
    notes = {name: getattr(state, name) for name in names}
    return Drawn(path=_path(state, canvas, vocab.need("mask")), **notes)

  return sample


@dataclasses.dataclass(frozen=True)
class _Steps:
  """The parts of a step, for the arguments of one sampler call."""

  model: Denoiser
  vocab: Vocabulary
  decoding: Decoding
  params: Any
  canvas: Canvas
  settings: Settings
  row_keys: Key[Array, "B"]

  @property
  def first(self) -> Int[Array, "B"]:
    """The first free position of each row: the length of its prompt."""
    return self.canvas.lengths - self.canvas.free.sum(axis=1)

  def start(self, at: Int[Array, ""]) -> _State:
    canvas = self.canvas
    nothing = jnp.zeros_like(canvas.tokens, jnp.float32)
    count = jnp.zeros_like(canvas.lengths)
    return _State(
      at=at,
      x=jnp.where(canvas.free, self.vocab.need("mask"), canvas.tokens),
      end=canvas.lengths,
      cache=self._prompts(),
      step=jnp.full_like(canvas.tokens, -1),
      confidence=nothing,
      entropy=nothing,
      # One call reads the prompt, if there is one.
      calls=(self.first > 0).astype(count.dtype),
      put_back=count,
    )

  def _prompts(self) -> KVCache:
    """Returns the keys and values of all rows, valid within their prompts."""
    x = self.canvas.tokens
    rows, length = x.shape
    ones = jnp.ones_like(x)
    context = row_context(
      ones, visibility=self.decoding.visibility, keep=True, most_segments=1
    )
    before = jnp.pad(x, ((0, 0), (1, 0)), constant_values=self._begin)[:, :-1]

    def read(before):
      _, cache = self.model.hidden(self.params, before, context)
      return cache.keys, cache.values

    def skip(before):
      cache = self.model.init_cache(rows, length)
      return cache.keys, cache.values

    # What is behind a prompt is overwritten before any position attends to it.
    given = (self.first > 0).any()
    keys, values = jax.lax.cond(given, read, skip, before)
    return KVCache(keys, values, context.side)

  @property
  def _begin(self) -> int:
    begin = self.decoding.begin
    return self.vocab.need("begin") if begin is None else begin

  def step(self, s: _State) -> _State:
    at, waiting = s.at, s.at < self.first
    active = ~waiting & (at < s.end)
    hidden, cache = self._read(s, waiting)
    logits = self._logits(hidden)
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(self.row_keys, at)
    drawn = tokens.draw(keys[:, None], logits, self.settings)

    def put(values, new):
      new = jnp.where(active[:, None], new, _column(values, at))
      return jax.lax.dynamic_update_slice_in_dim(values, new, at, axis=1)

    ends = active & self.vocab.is_end(drawn[:, 0])
    end = jnp.where(ends, at + 1, s.end)
    behind = jnp.arange(s.x.shape[1])[None] >= end[:, None]
    return _State(
      at=at + 1,
      x=jnp.where(behind, self.vocab.pad, put(s.x, drawn)),
      end=end,
      cache=cache,
      step=put(s.step, (at - self.first)[:, None]),
      confidence=put(s.confidence, confidence.probability(logits, drawn)),
      entropy=put(s.entropy, confidence.entropy(logits)),
      calls=s.calls + active.astype(s.calls.dtype),
      put_back=s.put_back,
    )

  def _logits(self, hidden: Float[Array, "B 1 D"]) -> Float[Array, "B 1 V"]:
    # Stated explicitly: the sharding of a reshaped one-row batch is ambiguous.
    split = RULES.spec("batch", None)
    rows, _, width = hidden.shape
    flat = jnp.reshape(hidden, (rows, width), out_sharding=split)
    flat = jax.reshard(self.model.logits(self.params, flat), split)
    shape = rows, 1, flat.shape[-1]
    return jnp.reshape(flat, shape, out_sharding=P(*split, None))

  def _read(
    self, s: _State, waiting: Bool[Array, "B"]
  ) -> tuple[Float[Array, "B 1 D"], KVCache]:
    """Reads the token before a position, and caches its keys and values."""
    at = s.at
    # At position 0 the slice starts at 0 too, and its token is not used.
    before = jnp.where(at == 0, self._begin, _column(s.x, at - 1))
    ones = jnp.ones_like(before)
    context = Context(
      *(ones, at * ones, self.decoding.visibility),
      cache=dataclasses.replace(s.cache, at=(at, ~waiting)),
      keep=True,
    )
    hidden, cache = self.model.hidden(self.params, before, context)
    # The loop's carry must keep its type: `at` and `side` as they were.
    return hidden, KVCache(cache.keys, cache.values, s.cache.side)


def _column(values: Array, at: Int[Array, ""]) -> Array:
  """Returns column `at` of [B, L] as [B, 1]."""
  column = jax.lax.dynamic_slice_in_dim(values, at, 1, axis=1)
  # Newer JAX versions lose the sharding of a one-row batch in this slice.
  return jax.reshard(column, jax.typeof(values).sharding)


def _path(s: _State, canvas: Canvas, mask: int) -> Int[Array, "S B L"]:
  """Returns the ids before each step and after the last, from the steps.

  What a drawn end cut off shows as MASK until the step that drew it.
  """
  last = s.step.max(axis=1, keepdims=True)
  shown = jnp.where(s.step >= 0, s.step, jnp.where(canvas.free, last, -1))
  steps = jnp.arange(s.x.shape[1] + 1)[:, None, None]
  return jnp.where(shown[None] >= steps, mask, s.x[None])
