"""Draws texts from a block diffusion model, one block after the other.

Within a block the loop is that of `sampler.py`, with every order, schedule,
budget and remasking method: `num_steps` is the number of steps of a block. What
is finished is read once: its keys and values stay in a buffer of fixed length,
to which a step of the current block adds its own (`model/cache.py`). Clean
blocks attend to clean blocks only, so this is exact: logits are those of a call
over the whole row.

One call reads all prompts. After that there is no call for clean text alone:
the first step of a block also reads the block before it, which is finished, and
overwrites the keys and values of its last step. Blocks are counted from a
text's start. Rows with longer prompts wait until the block of their first free
position, so that a row does not depend on the others.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from mdm_jax.core.errors import UserError
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.model.context import KVCache, row_context
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.objectives.base import Decoding
from mdm_jax.sampling import sampler
from mdm_jax.sampling.block_reader import Reader, put, window
from mdm_jax.sampling.call import Canvas, padded
from mdm_jax.sampling.config import SampleConfig
from mdm_jax.sampling.sampler import GPU_OPTIONS, Sampler, State, Steps, Watch
from mdm_jax.sampling.samples import Drawn, Notes
from mdm_jax.sampling.schedule import Pace
from mdm_jax.sampling.tokens import Settings

_NOTES = tuple(field.name for field in dataclasses.fields(Notes))


def steps_of_block(config: SampleConfig, block: int) -> int:
  """Returns the largest number of steps of a block."""
  # Every step reveals a token, unless some are masked again.
  some = config.remasking == "none"
  return min(config.num_steps, block) if some else config.num_steps


def most_steps(config: SampleConfig, length: int, decoding: Decoding) -> int:
  """Returns the largest number of steps of a text of `length` tokens."""
  if length <= decoding.block:
    return config.num_steps
  blocks = -(-length // decoding.block)
  return blocks * steps_of_block(config, decoding.block)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Row(Notes):
  """The state between two blocks.

  Attributes:
    at: number of the next block, the same in all rows.
    x: current ids; MASK at positions still to be drawn.
    end: length of each row; ends behind a drawn end-of-text token.
    cache: keys and values; clean ones of the blocks before the last.
    path: ids before the first step and after each.
    known: which entries of `path` were written.
  """

  at: Int[Array, ""]
  x: Int[Array, "B L"]
  end: Int[Array, "B"]
  cache: KVCache
  path: Int[Array, "P B L"]
  known: Bool[Array, "P"]


def make_sampler(
  config: SampleConfig,
  model: Denoiser,
  vocab: Vocabulary,
  decoding: Decoding,
  watch: Watch | None = None,
  reader: type[Reader] = Reader,
) -> Sampler:
  """Returns a (params, canvas, pace, settings, row_keys) -> Drawn.

  It is a jitted function of the whole generation; for rows of a single block,
  that of `sampler.make_sampler`.

  Args:
    config: static settings of the loop within a block.
    model: computes hidden states, keys and values, and logits.
    vocab: the special ids.
    decoding: the block length, and which positions attend to which.
    watch: see `sampler.make_sampler`.
    reader: calls the model for a block.

  Raises:
    UserError: `config.block_length` does not divide the model's blocks.
  """
  smaller = config.block_length or decoding.block
  if decoding.block % smaller and smaller < decoding.block:
    raise UserError(
      f"sample.block_length={smaller} does not divide the model's blocks of"
      f" {decoding.block} tokens (objective.block_length); nearest valid: None"
    )
  in_one_block = sampler.make_sampler(config, model, vocab, watch)
  options = GPU_OPTIONS if jax.default_backend() == "gpu" else None

  @jax.jit(compiler_options=options)
  def in_blocks(
    params: Any,
    canvas: Canvas,
    pace: Pace,
    settings: Settings,
    row_keys: Key[Array, "B"],
  ) -> Drawn:
    length = canvas.tokens.shape[1]
    cut = lambda x: x[:, :length] if x.ndim == 2 else x
    see = lambda i, x: watch and jax.debug.callback(watch, i, cut(x))
    canvas = padded(canvas, vocab.need("pad"))
    canvas = _whole_blocks(canvas, decoding.block, vocab)
    static = config, model, vocab, decoding, see, reader
    loop = _Loop(*static, params, canvas, pace, settings, row_keys)
    state = jax.lax.while_loop(loop.busy, loop.block, loop.start())
    notes = {name: cut(getattr(state, name)) for name in _NOTES}
    return Drawn(path=loop.path(state)[:, :, :length], **notes)

  def sample(params, canvas, *args):
    several = canvas.tokens.shape[1] > decoding.block
    return (in_blocks if several else in_one_block)(params, canvas, *args)

  return sample


def _whole_blocks(canvas: Canvas, block: int, vocab: Vocabulary) -> Canvas:
  """Returns the canvas with padding up to a multiple of the block length."""
  behind = (0, 0), (0, -canvas.tokens.shape[1] % block)
  return Canvas(
    jnp.pad(canvas.tokens, behind, constant_values=vocab.need("pad")),
    jnp.pad(canvas.free, behind),
    canvas.lengths,
  )


@dataclasses.dataclass(frozen=True)
class _Loop:
  """The parts of the loop over blocks, for the arguments of one call."""

  config: SampleConfig
  model: Denoiser
  vocab: Vocabulary
  decoding: Decoding
  see: Callable[..., Any]
  reader: type[Reader]
  params: Any
  canvas: Canvas
  pace: Pace
  settings: Settings
  row_keys: Key[Array, "B"]

  @property
  def size(self) -> int:
    return self.decoding.block

  @property
  def steps(self) -> int:
    return steps_of_block(self.config, self.size)

  @property
  def first(self) -> Int[Array, "B"]:
    """The first free position of each row; its length if there is none."""
    free = self.canvas.free
    places = jnp.arange(free.shape[1])[None]
    found = jnp.where(free, places, free.shape[1]).min(axis=1)
    return jnp.minimum(found, self.canvas.lengths)

  def start(self) -> _Row:
    canvas = self.canvas
    nothing = jnp.zeros_like(canvas.tokens, jnp.float32)
    count = jnp.zeros_like(canvas.lengths)
    x = jnp.where(canvas.free, self.vocab.need("mask"), canvas.tokens)
    self.see(jnp.int32(0), x)
    blocks = canvas.tokens.shape[1] // self.size
    path = jnp.broadcast_to(x, (blocks * self.steps + 1, *x.shape))
    return _Row(
      at=self.first.min() // self.size,
      x=x,
      end=canvas.lengths,
      cache=self._prompts(x),
      path=path,
      known=jnp.arange(len(path)) == 0,
      step=jnp.full_like(canvas.tokens, -1),
      confidence=nothing,
      entropy=nothing,
      # One call reads the prompt, if there is one.
      calls=(self.first > 0).astype(count.dtype),
      put_back=count,
    )

  def _prompts(self, x: Int[Array, "B L"]) -> KVCache:
    """Returns keys and values of all rows, valid in blocks that are given."""
    rows, length = x.shape
    inside = jnp.arange(length)[None] < self.canvas.lengths[:, None]
    context = row_context(
      inside.astype(jnp.int32),
      visibility=self.decoding.visibility,
      keep=True,
      most_segments=1,
    )

    def read(x):
      _, cache = self.model.hidden(self.params, x, context)
      return cache.keys, cache.values

    def skip(x):
      cache = self.model.init_cache(rows, length)
      return cache.keys, cache.values

    # What is behind a prompt is overwritten before any position attends to it.
    given = (self.first > 0).any()
    keys, values = jax.lax.cond(given, read, skip, x)
    return KVCache(keys, values, context.side)

  def busy(self, row: _Row) -> Bool[Array, ""]:
    """Returns whether any row has tokens to draw from the next block on."""
    places = jnp.arange(row.x.shape[1])[None]
    left = self.canvas.free & (places >= row.at * self.size)
    return (left & (places < row.end[:, None])).any()

  # MARK: a block

  def block(self, row: _Row) -> _Row:
    """Draws the free tokens of a block."""
    start = row.at * self.size
    steps = self._within(row, start)
    counted = {"calls": row.calls, "put_back": row.put_back}
    s = dataclasses.replace(steps.start(), **counted)
    # The first block has none before it: with it the second one is read.
    before = jnp.maximum(start - self.size, 0)
    reader = self._reader(row, start, before)
    s = dataclasses.replace(steps, denoiser=reader).step(jnp.int32(0), s)
    cache, first = reader.cache, reader.first
    path, known = self._shown(row, start, jnp.int32(0), s, row.path, row.known)

    def more(carry):
      i, s, *_ = carry
      return (i < self.steps) & s.masked.any()

    def step(carry):
      i, s, cache, path, known = carry
      reader = self._reader(row, start, cache=cache, first=first)
      s = dataclasses.replace(steps, denoiser=reader).step(i, s)
      path, known = self._shown(row, start, i, s, path, known)
      return i + 1, s, reader.cache, path, known

    carry = jnp.int32(1), s, cache, path, known
    if self.steps > 1:
      carry = jax.lax.while_loop(more, step, carry)
    return self._after(row, start, *carry[1:])

  def _reader(
    self, row: _Row, start: Int[Array, ""], before=None, **more: Any
  ) -> Reader:
    given = {
      "x": row.x,
      "end": row.end,
      # Rows that wait keep what the first call wrote.
      "writing": self.first < start + self.size,
      "cache": row.cache,
    }
    place = {"start": start, "before": before}
    return self.reader(self.model, self.decoding, **given | place | more)

  def _within(self, row: _Row, start: Int[Array, ""]) -> Steps:
    """Returns the steps of a block, which know nothing of the others."""
    ends = jnp.clip(row.end - start, 0, self.size)
    canvas = Canvas(
      window(row.x, start, self.size),
      window(self.canvas.free, start, self.size),
      ends,
    )
    # Of each block its own: no two draws of a row may share a key.
    fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
    canvas = padded(canvas, self.vocab.need("pad"))
    static = self.config, self.model, self.vocab, self.params
    keys = fold(self.row_keys, row.at)
    return Steps(*static, canvas, self.pace, self.settings, keys)

  def _joined(
    self, row: _Row, start: Int[Array, ""], s: State
  ) -> tuple[Int[Array, "B L"], Int[Array, "B"]]:
    """Returns the rows' ids and ends after a step of a block."""
    drawn_end = self.vocab.is_end(s.x) & (s.step >= 0)
    places = start + 1 + jnp.arange(self.size)[None]
    end = jnp.where(drawn_end, places, row.x.shape[1]).min(axis=1)
    end = jnp.minimum(row.end, end)
    behind = jnp.arange(row.x.shape[1])[None] >= end[:, None]
    return jnp.where(behind, self.vocab.pad, put(row.x, s.x, start)), end

  def _shown(self, row, start, i, s: State, path, known):
    """Writes the ids after a step to the path, and shows them."""
    began = self.first.min() // self.size
    number = (row.at - began) * self.steps + i + 1
    x, _ = self._joined(row, start, s)
    self.see(number, x)
    return path.at[number].set(x), known.at[number].set(True)

  def _after(self, row: _Row, start, s: State, cache, path, known) -> _Row:
    """Returns the state after a block."""
    number = (row.at - self.first // self.size) * self.steps
    step = jnp.where(s.step >= 0, s.step + number[:, None], -1)
    x, end = self._joined(row, start, s)
    return dataclasses.replace(
      row,
      at=row.at + 1,
      x=x,
      end=end,
      cache=cache,
      path=path,
      known=known,
      step=put(row.step, step, start),
      confidence=put(row.confidence, s.confidence, start),
      entropy=put(row.entropy, s.entropy, start),
      calls=s.calls,
      put_back=s.put_back,
    )

  def path(self, row: _Row) -> Int[Array, "P B L"]:
    # Steps that no row needed are those before them again. A row with a longer
    # prompt began later, but counts its steps from its own first block.
    number = jnp.arange(len(row.known))
    source = jax.lax.cummax(jnp.where(row.known, number, 0))
    waited = self.first // self.size - self.first.min() // self.size

    def of_row(path, waited):
      at = jnp.minimum(number + waited * self.steps, len(number) - 1)
      return path[at]

    path = row.path[source]
    return jax.vmap(of_row, in_axes=(1, 0), out_axes=1)(path, waited)
