"""Draws with cached keys and values of a model that attends both ways.

Such a model has no exact cache: every drawn token changes the keys of all
others. These caches take them as they were at the last call over the whole row
(Wu et al. 2025, Fast-dLLM, arXiv 2505.22618):

prefix  a step reads the current block and what is behind it; what is before
        the block is cached
dual    a step reads the current block only

A row is read whole when its block changes, and after so many steps. With a call
in every step, texts are those of `sampler.py`. `mdm_jax.benchmarks.caches`
measures how far the others are from it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.model.context import Context, KVCache, Side
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.model.inference import pick
from mdm_jax.sampling.call import Canvas, padded
from mdm_jax.sampling.config import SampleConfig
from mdm_jax.sampling.sampler import Sampler, State, Steps, Watch
from mdm_jax.sampling.samples import Drawn, Notes
from mdm_jax.sampling.schedule import Pace
from mdm_jax.sampling.tokens import Settings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kept:
  """What is kept of each row's last call over the whole row.

  Attributes:
    hidden: its hidden states.
    keys: its keys [N, B, G, L, K].
    values: its values, likewise.
    block: number of the row's block then; -1 before the first call.
    age: steps since then.
  """

  hidden: Float[Array, "B L D"]
  keys: Any
  values: Any
  block: Int[Array, "B"]
  age: Int[Array, "B"]


def make_sampler(
  config: SampleConfig,
  denoiser: Denoiser,
  vocab: Vocabulary,
  watch: Watch | None = None,
) -> Sampler:
  """Returns a sampler with the cache that `config.cache` names.

  As `sampler.make_sampler`; a row does not depend on the others.
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
    canvas = padded(canvas, vocab.need("pad"))
    steps = Steps(
      config, denoiser, vocab, params, canvas, pace, settings, row_keys
    )

    def advance(i, carry):
      state, kept = carry
      reader = _reader(config, denoiser, state, kept)
      state = dataclasses.replace(steps, denoiser=reader).step(i, state)
      see(i + 1, state.x)
      return state, reader.kept

    def step(i, carry):
      *carry, path = carry
      busy = carry[0].masked.any()
      stay = lambda _, carry: carry
      state, kept = jax.lax.cond(busy, advance, stay, i, tuple(carry))
      return state, kept, path.at[i + 1].set(state.x)

    state = steps.start()
    see(jnp.int32(0), state.x)
    path = jnp.broadcast_to(state.x, (config.num_steps + 1, *state.x.shape))
    carry = state, _nothing(denoiser, params, state), path
    carry = jax.lax.fori_loop(0, config.num_steps, step, carry)
    state, _, path = carry
    names = (field.name for field in dataclasses.fields(Notes))
    return Drawn(path=path, **{name: getattr(state, name) for name in names})

  return sample


def _nothing(denoiser: Denoiser, params: Any, state: State) -> Kept:
  """Returns what is kept before the first call, with the types of one."""
  context = Context(state.x, state.x, condition=state.confidence[:, 0])
  whole = lambda: _whole(denoiser, params, state.x, context)
  zeros = lambda t: jnp.zeros(t.shape, t.dtype, out_sharding=t.sharding)
  hidden, keys, values = jax.tree.map(zeros, jax.eval_shape(whole))
  none = jnp.full_like(state.end, -1)
  return Kept(hidden, keys, values, none, none)


def _whole(denoiser, params, tokens, context: Context):
  context = dataclasses.replace(context, keep=True)
  hidden, cache = denoiser.hidden(params, tokens, context)
  return hidden, cache.keys, cache.values


def _reader(
  config: SampleConfig, denoiser: Denoiser, state: State, kept: Kept
) -> "_Reader":
  size, length = config.block_length, state.x.shape[1]
  block = jnp.argmax(state.masked, axis=1).astype(jnp.int32) // size
  due = (block != kept.block) | (kept.age >= (config.cache_refresh or length))
  due = due & state.masked.any(axis=1)
  kept = dataclasses.replace(
    kept,
    block=jnp.where(due, block, kept.block),
    age=jnp.where(due, 1, kept.age + 1),
  )
  return _Reader(denoiser, config.cache == "dual", min(size, length), due, kept)


@dataclasses.dataclass
class _Reader:
  """Calls the model for whole rows where that is due, else for a part of them.

  To a step it looks like a model (`call.Predictor`).

  Attributes:
    model: computes hidden states, keys and values.
    dual: whether what is behind the block is cached, too.
    size: tokens per block.
    due: which rows are read whole.
    kept: what was kept, and after the call what is.
  """

  model: Denoiser
  dual: bool
  size: int
  due: Bool[Array, "B"]
  kept: Kept

  def hidden(
    self, params: Any, tokens: Int[Array, "B L"], context: Context
  ) -> Float[Array, "B L D"]:
    """Returns hidden states; outside the part, those of the last whole call."""
    self.kept = self._refreshed(params, tokens, context)
    start = jnp.maximum(self.kept.block, 0) * self.size
    if self.dual:
      # The last block may be shorter; all are read as equally long.
      start = jnp.minimum(start, tokens.shape[1] - self.size)
      where = start[:, None] + jnp.arange(self.size)[None]
      read = self._part(params, tokens, context, start, where)
    else:
      read = self._from_block_on(params, tokens, context, start)
    return jnp.where(self.due[:, None, None], self.kept.hidden, read)

  def _refreshed(self, params, tokens, context: Context) -> Kept:
    """Returns what is kept, with a new call for rows where one is due."""
    kept = self.kept

    def read():
      new = _whole(self.model, params, tokens, context)
      rows = lambda x, axis: jnp.expand_dims(
        self.due, tuple(i for i in range(x.ndim) if i != axis)
      )
      old = kept.hidden, kept.keys, kept.values
      return tuple(
        jnp.where(rows(a, axis), a, b)
        for a, b, axis in zip(new, old, (0, 1, 1), strict=True)
      )

    keep = lambda: (kept.hidden, kept.keys, kept.values)
    hidden, keys, values = jax.lax.cond(self.due.any(), read, keep)
    return dataclasses.replace(kept, hidden=hidden, keys=keys, values=values)

  def _from_block_on(self, params, tokens, context, start):
    """Reads from the first block on that any row is in."""
    length = tokens.shape[1]

    def part(first: int):
      # Sharded as the rows are.
      where = jnp.arange(first, length)[None] + 0 * start[:, None]
      return self._part(params, tokens, context, start, where)

    # A program per block: the number of positions has to be static.
    branches = [lambda at=at: part(at) for at in range(0, length, self.size)]
    return jax.lax.switch(start.min() // self.size, branches)

  def _part(
    self,
    params: Any,
    tokens: Int[Array, "B L"],
    context: Context,
    start: Int[Array, "B"],
    where: Int[Array, "B W"],
  ) -> Float[Array, "B L D"]:
    """Reads some positions of each row, from its block on."""
    kept, length = self.kept, tokens.shape[1]
    mine = where >= start[:, None]  # others are another row's
    at = jnp.where(mine, where, length)
    put = lambda row, at, new: row.at[at].set(new, mode="drop")
    places = jnp.arange(length)[None]
    read = (places >= start[:, None]) & (places <= where[:, -1:])
    # No query sees segment -1: what is read again has new keys.
    segments = jnp.where(read, -1, context.segments)
    none = jnp.zeros_like(segments)  # of a row that is visible as a whole
    cache = KVCache(kept.keys, kept.values, Side(segments, none, none))
    now = Context(
      jnp.where(mine, pick(context.segments, where), 0),
      where,
      condition=context.condition,
      cache=cache,
    )
    hidden = self.model.hidden(params, pick(tokens, where), now)
    if self.model.config.shift_outputs:
      # The output before the block's first position is the last call's; that
      # of a row's first position is its own.
      before = (where == start[:, None]) & (where > 0)
      at = jnp.where(before, length, at)
    return jax.vmap(put)(kept.hidden, at, hidden)

  def logits(
    self, params: Any, hidden: Float[Array, "N D"]
  ) -> Float[Array, "N V"]:
    """Returns the model's logits."""
    return self.model.logits(params, hidden)
