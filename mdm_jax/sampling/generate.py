"""From parameters and a prompt to text."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from mdm_jax.core import distributed, memory, rng
from mdm_jax.core.errors import UserError
from mdm_jax.core.sharding import (
  batch_sharding,
  data_shards,
  padded_rows,
  put,
)
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data.tokenizer import Tokenizer
from mdm_jax.model.denoiser import Denoiser, Params
from mdm_jax.objectives.measured import Curve
from mdm_jax.sampling import room, schedule, template, tokens
from mdm_jax.sampling.call import Canvas
from mdm_jax.sampling.config import SampleConfig
from mdm_jax.sampling.sampler import Drawn, Sampler, Watch, make_sampler

# Tokens and rows of a call that keep a device busy: more would make one text
# wait for others that nobody asked for. docs/sampling.md has what it costs.
_TOKENS_A_CALL = {"cpu": 512}
_TOKENS_A_CALL_ELSEWHERE = 8192
_MOST_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Samples:
  """Texts, and how they came about.

  Attributes:
    texts: decoded, up to their end-of-text token.
    path: token ids before each step, and after the last.
    step: the step, from 0, that revealed the token which stands there in the
      end; -1 where it was given or cut off.
    confidence: the probability that the denoiser gave this token when it was
      drawn, before temperature and filters; 0 where step is -1.
    entropy: of the distribution it was drawn from, in nats, before temperature
      and filters; 0 where step is -1.
    calls: denoiser calls of each text.
    put_back: tokens of each text that were masked again.
  """

  texts: list[str]
  path: Int[np.ndarray, "S B L"]
  step: Int[np.ndarray, "B L"]
  confidence: Float[np.ndarray, "B L"]
  entropy: Float[np.ndarray, "B L"]
  calls: Int[np.ndarray, "B"]
  put_back: Int[np.ndarray, "B"]


def join(parts: Sequence[Samples]) -> Samples:
  """Returns the texts of all parts, in their order, as one."""
  if len(parts) == 1:
    return parts[0]
  names = "step", "confidence", "entropy", "calls", "put_back"
  return Samples(
    [text for part in parts for text in part.texts],
    np.concatenate([part.path for part in parts], axis=1),
    *(np.concatenate([getattr(p, name) for p in parts]) for name in names),
  )


class TextSampler:
  """Draws texts of one length; compiles once for every way to draw.

  A way is what the program depends on: most settings, but not the seed,
  temperature, min-p, top-p and schedule, which may change at no cost.

  Attributes:
    length: tokens of a text, the prompt included.
    rows_a_call: texts that are drawn at once, however many are asked for.
  """

  def __init__(
    self,
    denoiser: Denoiser,
    tokenizer: Tokenizer,
    mesh: jax.sharding.Mesh,
    length: int,
    watch: Watch | None = None,
  ):
    self.length = length
    self._denoiser, self._tokenizer = denoiser, tokenizer
    self._mesh, self._watch = mesh, watch
    self._compiled: dict[SampleConfig, Sampler] = {}
    split = batch_sharding(mesh, rank=1)
    self._row_keys = jax.jit(rng.per_row, out_shardings=split)
    if watch is not None and distributed.count() > 1:
      raise UserError(
        "texts can't be watched while several processes draw them: leave out"
        " --trace, or draw in one process"
      )
    rows = rows_a_call(length, jax.default_backend())
    self.rows_a_call = padded_rows(rows, mesh)
    room.check_length(
      length,
      self.rows_a_call // data_shards(mesh),
      -(-denoiser.config.num_heads // mesh.shape["tensor"]),
      denoiser.attention(length, packed=False).name,
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

    The text of row b depends on `config.seed`, b and its prompt: on the same
    devices to the bit, however many are drawn with it.

    Args:
      params: of the denoiser.
      prompts: what is given of each text; see `template`.
      config: how to draw.
      curve: loss by masked share, for the optimal schedule.

    Raises:
      UserError: a prompt is no template or too long, there is no loss curve for
        the optimal schedule, or the memory is too small.
    """
    canvas = template.canvas(prompts, self._tokenizer, self.length)
    return self.draw(params, canvas, config, curve)

  def draw(
    self,
    params: Params,
    canvas: Canvas,
    config: SampleConfig,
    curve: Curve | None = None,
    repeat: int = 1,
  ) -> Samples:
    """Returns what `stream` yields as one; it has to fit the memory."""
    room.check_texts(len(canvas.tokens) * repeat, self.length, config.num_steps)
    parts = self.stream(params, canvas, config, curve, repeat)
    return join(list(parts))

  def stream(
    self,
    params: Params,
    canvas: Canvas,
    config: SampleConfig,
    curve: Curve | None = None,
    repeat: int = 1,
  ) -> Iterator[Samples]:
    """Yields texts of a canvas of `length` tokens a row, a call at a time.

    Args:
      params: as in a call of the sampler, and so are all others.
      canvas: what is given of each text.
      config: how to draw.
      curve: loss by masked share, for the optimal schedule.
      repeat: texts of each row of the canvas, one row after the other.
    """
    count, size = len(canvas.tokens) * repeat, self.rows_a_call
    pace = schedule.pace(config, self.length, curve)
    pace = put(pace, NamedSharding(self._mesh, P()))
    settings = tokens.effective_settings(config)
    stream = rng.stream(config.seed, "sample")
    sample, ahead = self._program(config), []
    for start in range(0, count, size):
      # A last call that is not full goes on with texts nobody asked for.
      rows = np.arange(start, start + size)
      row = lambda x: self._place(x[rows % count // repeat])  # noqa: B023
      part = Canvas(row(canvas.tokens), row(canvas.free), row(canvas.lengths))
      keys = self._row_keys(stream, rows.astype(np.int32))
      ahead.append(sample(params, part, pace, settings, keys))
      if len(ahead) == 2:  # the devices go on while a text is read
        yield self._samples(ahead.pop(0), size)
    yield self._samples(ahead.pop(), count - start)

  def _program(self, config: SampleConfig) -> Sampler:
    """Returns the compiled sampler of a way to draw."""
    way = dataclasses.replace(
      config,
      num_samples=1,
      length=None,
      schedule="linear",
      remasking_rate=1.0,
      seed=0,
      temperature=1.0,
      temperature_range=None,
      min_p=None if config.min_p is None else 1.0,
      top_p=None if config.top_p is None else 1.0,
    )
    if way not in self._compiled:
      self._compiled[way] = make_sampler(
        config, self._denoiser, self._tokenizer.vocab, self._watch
      )
    return self._compiled[way]

  def _samples(self, drawn: Drawn, count: int) -> Samples:
    """Returns the first texts of a call."""
    drawn = distributed.fetch(drawn)
    path, vocab = drawn.path[:, :count], self._tokenizer.vocab
    texts = [self._tokenizer.decode(_until_end(r, vocab)) for r in path[-1]]
    names = "step", "confidence", "entropy", "calls", "put_back"
    return Samples(
      texts, path, *(getattr(drawn, name)[:count] for name in names)
    )

  def _place(self, values):
    return put(values, batch_sharding(self._mesh, values.ndim))


def rows_a_call(length: int, backend: str) -> int:
  """Returns how many texts of a length are drawn at once, if shards allow it.

  Always so many, however many are asked for: with another number of rows it is
  another program, which in bfloat16 rounds otherwise and draws another text.

  Args:
    length: tokens of a text.
    backend: as JAX names it.
  """
  tokens = _TOKENS_A_CALL.get(backend, _TOKENS_A_CALL_ELSEWHERE)
  rows = min(tokens // length, _MOST_ROWS)
  return max(2 ** rows.bit_length() // 2, 1)


def effective(config: SampleConfig) -> dict[str, Any]:
  """Returns the settings that are in effect, to stand beside samples."""
  used = dataclasses.asdict(config) | {
    "temperature": tokens.effective_temperature(config)
  }
  unused = {"num_samples", "length", "temperature_range"}
  if config.remasking == "none":
    unused |= {"remasking", "remasking_rate"}
  if not config.guidance:
    unused.add("guidance")
  if {config.entropy_bound, config.threshold} != {None}:
    unused.add("schedule")
  return {k: v for k, v in used.items() if k not in unused and v is not None}


def _until_end(row: Int[np.ndarray, "L"], vocab: Vocabulary):
  """Cuts a text at its first end-of-text token, or at its padding."""
  ends = np.flatnonzero(vocab.is_end(row) | (row == vocab.pad))
  return row[: ends[0]] if len(ends) else row
