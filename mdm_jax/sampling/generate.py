"""Generates text: prompts and parameters in, decoded samples out."""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int

from mdm_jax.core import distributed, memory, rng
from mdm_jax.core.errors import UserError
from mdm_jax.core.sharding import batch_sharding, data_shards, padded_rows, put
from mdm_jax.data.tokenizer import Tokenizer
from mdm_jax.model.denoiser import Denoiser, Params
from mdm_jax.objectives.base import Decoding
from mdm_jax.objectives.measured import Curve
from mdm_jax.sampling import room, schedule, template, tokens
from mdm_jax.sampling.call import Canvas
from mdm_jax.sampling.config import SampleConfig
from mdm_jax.sampling.hole_lengths import HoleLengths
from mdm_jax.sampling.sampler import Sampler, Watch
from mdm_jax.sampling.samplers import SAMPLERS
from mdm_jax.sampling.samples import (
  ARRAYS,
  Drawn,
  Samples,
  join,
  until_end,
)
from mdm_jax.sampling.template import Candidates

_ANY_ORDER = Decoding("any_order")
# Tokens and rows per call of the sampler. They are enough to keep a device
# busy; more would delay a single text by others that nobody asked for.
_TOKENS_A_CALL = {"cpu": 512}
_TOKENS_A_CALL_ELSEWHERE = 8192
_MOST_ROWS = 64


class TextSampler:
  """Draws texts of one length; compiles once per set of static settings.

  Seed, temperature, min-p, top-p, schedule and prompts can change without a
  recompilation; other settings cannot.

  Example:
    sampler = TextSampler(denoiser, tokenizer, mesh, length=128)
    sampler(params, ["The [MASK:3] of"], SampleConfig(seed=1)).texts

  Attributes:
    length: tokens per text, including the prompt.
    rows_a_call: rows per call of the sampler, however many texts are drawn.
    method: the sampler, and which settings it can follow.
    hole_lengths: how likely each length of a hole is.
  """

  def __init__(
    self,
    denoiser: Denoiser,
    tokenizer: Tokenizer,
    mesh: jax.sharding.Mesh,
    length: int,
    watch: Watch | None = None,
    decoding: Decoding = _ANY_ORDER,
    untold: int | None = None,
  ):
    """Checks that texts of this length fit; nothing is compiled yet.

    Args:
      denoiser: the model.
      tokenizer: text to ids and back.
      mesh: the devices.
      length: tokens per text, including the prompt.
      watch: see `sampler.make_sampler`.
      decoding: how the model can be sampled; its objective says so.
      untold: tokens of the longest hole whose length the model has learned to
        find (None: it hasn't).

    Raises:
      UserError: the length doesn't fit, no sampler draws in this order, or
        several processes would watch.
    """
    self.length = length
    self._decoding, self.method = decoding, SAMPLERS[decoding.order]
    self._denoiser, self._tokenizer = denoiser, tokenizer
    self._mesh, self._watch = mesh, watch
    self._compiled: dict[SampleConfig, Sampler] = {}
    split = batch_sharding(mesh, rank=1)
    self._row_keys = jax.jit(rng.per_row, out_shardings=split)
    if watch is not None and distributed.count() > 1:
      raise UserError(
        "--trace can't show texts while several processes draw them: leave it"
        " out, or use one process"
      )
    rows = rows_a_call(length, jax.default_backend())
    self.rows_a_call = padded_rows(rows, mesh)
    self.hole_lengths = HoleLengths(
      *(denoiser, tokenizer.vocab, mesh, self.rows_a_call), untold=untold
    )
    # Checked here, before anything is compiled.
    room.check_length(
      length,
      self.rows_a_call // data_shards(mesh),
      -(-denoiser.config.num_heads // mesh.shape["tensor"]),
      denoiser.attention(length, decoding.visibility, most_segments=1).name,
      memory.of_device(),
    )

  def __call__(
    self,
    params: Params,
    prompts: Sequence[str],
    config: SampleConfig,
    curve: Curve | None = None,
  ) -> Samples:
    """Returns one text for each prompt or infilling template.

    The text of row b depends only on `config.seed`, b and its prompt. On the
    same devices it is bit-identical however many texts are drawn with it.

    Args:
      params: parameters of the denoiser.
      prompts: prompts or templates; see `template`.
      config: how to sample.
      curve: loss by mask rate; only needed by the optimal schedule.

    Raises:
      UserError: a prompt is malformed or too long, the optimal schedule has no
        curve, or the result would not fit in memory.
    """
    found = template.candidates(prompts, self._tokenizer, self.length)
    return self.draw_prompted(params, found, config, curve)

  def draw_prompted(
    self,
    params: Params,
    found: Candidates,
    config: SampleConfig,
    curve: Curve | None = None,
    repeat: int = 1,
  ) -> Samples:
    """Returns everything that `prompted` yields as one `Samples`.

    Raises:
      UserError: as `prompted`, or it would not fit in memory.
    """
    self._check_room(len(found.counts) * repeat, config)
    return join(list(self.prompted(params, found, config, curve, repeat)))

  def prompted(
    self,
    params: Params,
    found: Candidates,
    config: SampleConfig,
    curve: Curve | None = None,
    repeat: int = 1,
  ) -> Iterator[Samples]:
    """Yields texts of templates, one sampler call at a time.

    The lengths of holes that are not told are decided first. For told ones this
    is `stream`.

    Args:
      params: parameters of the denoiser.
      found: the templates' rows.
      config: how to sample.
      curve: loss by mask rate; only needed by the optimal schedule.
      repeat: number of texts for each template, in the templates' order.

    Raises:
      UserError: lengths are not told, and the model doesn't draw in any order.
    """
    self.method.check_lengths(found)
    log_p = self.hole_lengths(params, found, config.hole_rule)
    count = len(found.counts)

    def row(numbers: Int[np.ndarray, "M"]) -> Int[np.ndarray, "M"]:
      texts = numbers // repeat
      return self.hole_lengths.choose(
        log_p, found.counts, texts, numbers, config
      )

    yield from self._stream(
      params, found.canvas, config, curve, count * repeat, row
    )

  def draw(
    self,
    params: Params,
    canvas: Canvas,
    config: SampleConfig,
    curve: Curve | None = None,
  ) -> Samples:
    """Returns everything that `stream` yields as one `Samples`.

    Raises:
      UserError: it would not fit in memory, or the schedule lacks its curve.
    """
    self._check_room(len(canvas.tokens), config)
    return join(list(self.stream(params, canvas, config, curve)))

  def _check_room(self, texts: int, config: SampleConfig) -> None:
    steps = self.method.steps(config, self.length, self._decoding)
    room.check_texts(texts, self.length, steps)

  def stream(
    self,
    params: Params,
    canvas: Canvas,
    config: SampleConfig,
    curve: Curve | None = None,
  ) -> Iterator[Samples]:
    """Yields a sample for each row of a canvas, one sampler call at a time.

    Args:
      params: parameters of the denoiser.
      canvas: given tokens and holes, in rows of `length` tokens.
      config: how to sample.
      curve: loss by mask rate; only needed by the optimal schedule.
    """
    count, row = len(canvas.tokens), lambda numbers: numbers
    yield from self._stream(params, canvas, config, curve, count, row)

  def _stream(
    self,
    params: Params,
    canvas: Canvas,
    config: SampleConfig,
    curve: Curve | None,
    count: int,
    row: Callable[[Int[np.ndarray, "M"]], Int[np.ndarray, "M"]],
  ) -> Iterator[Samples]:
    """Yields `count` samples; `row` says which row of the canvas each is of."""
    self.method.check(config)
    self.method.check_canvas(canvas, self._decoding)
    size = self.rows_a_call
    pace = schedule.pace(config, self.length, curve)
    pace = put(pace, NamedSharding(self._mesh, P()))
    settings = tokens.effective_settings(config)
    stream = rng.stream(config.seed, "sample")
    sample, ahead = self._program(config), []
    for start in range(0, count, size):
      # The last call is filled up with further texts, which are thrown away:
      # another number of rows would be another program (see `rows_a_call`).
      rows = np.arange(start, start + size)
      own = row(rows % count)
      part = Canvas(
        *(self._place(canvas.tokens[own]), self._place(canvas.free[own])),
        self._place(canvas.lengths[own]),
      )
      keys = self._row_keys(stream, rows.astype(np.int32))
      ahead.append(sample(params, part, pace, settings, keys))
      # Decode one call while the devices run the next.
      if len(ahead) == 2:
        yield self._samples(ahead.pop(0), size)
    yield self._samples(ahead.pop(), count - start)

  def _program(self, config: SampleConfig) -> Sampler:
    """Returns the compiled sampler for a config's static settings."""
    # Settings that are arguments of the program get placeholders in the key. Of
    # min-p and top-p only the values are arguments, not whether they are used.
    static = dataclasses.replace(
      config,
      num_samples=1,
      length=None,
      schedule="linear",
      remasking_rate=1.0,
      seed=0,
      hole_length="likeliest",
      hole_rule="auto",
      temperature=1.0,
      temperature_range=None,
      min_p=None if config.min_p is None else 1.0,
      top_p=None if config.top_p is None else 1.0,
    )
    if static not in self._compiled:
      self._compiled[static] = self.method.make(
        *(config, self._denoiser, self._tokenizer.vocab),
        *(self._decoding, self._watch),
      )
    return self._compiled[static]

  def _samples(self, drawn: Drawn, count: int) -> Samples:
    """Fetches a call's result, and returns its first `count` texts."""
    drawn = distributed.fetch(drawn)
    arrays = {name: getattr(drawn, name)[:count] for name in ARRAYS}
    arrays["path"] = path = drawn.path[:, :count]
    vocab, decode = self._tokenizer.vocab, self._tokenizer.decode
    texts = [decode(until_end(row, vocab)) for row in path[-1]]
    return Samples(texts=texts, **arrays)

  def _place(self, values):
    return put(values, batch_sharding(self._mesh, values.ndim))


def rows_a_call(length: int, backend: str) -> int:
  """Returns the number of rows per call, before rounding up to the shards.

  It does not depend on how many texts are requested: a program for another
  number of rows rounds differently, and in bfloat16 may draw another text.

  Args:
    length: tokens per text.
    backend: name of the JAX backend.

  Returns:
    A power of two.
  """
  tokens = _TOKENS_A_CALL.get(backend, _TOKENS_A_CALL_ELSEWHERE)
  rows = min(tokens // length, _MOST_ROWS)
  return max(2 ** rows.bit_length() // 2, 1)


def effective(
  config: SampleConfig, without: Collection[str] = ()
) -> dict[str, Any]:
  """Returns the settings that take effect, for display beside samples.

  Args:
    config: all settings.
    without: fields that have no effect with the model's sampler.
  """
  used = dataclasses.asdict(config) | {
    "temperature": tokens.effective_temperature(config)
  }
  unused = {"num_samples", "length", "temperature_range", *without}
  if config.remasking == "none":
    unused |= {"remasking", "remasking_rate"}
  unused |= {name for name in ("guidance", "end_last") if not used[name]}
  unused |= {"cache", "cache_refresh"} if config.cache == "none" else set()
  for name in ("hole_length", "hole_rule"):
    if used[name] == getattr(SampleConfig, name):
      unused.add(name)
  if {config.entropy_bound, config.threshold} != {None}:
    unused.add("schedule")
  return {k: v for k, v in used.items() if k not in unused and v is not None}
