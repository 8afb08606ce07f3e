"""From parameters and a prompt to text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from mdm_jax.core import rng
from mdm_jax.core.config import SampleConfig
from mdm_jax.core.errors import UserError
from mdm_jax.core.sharding import batch_sharding, data_shards
from mdm_jax.data.tokenizer import Tokenizer, Vocabulary
from mdm_jax.model.denoiser import Denoiser, Params
from mdm_jax.sampling.sampler import make_sampler

_ROWS_A_CALL = 64


@dataclasses.dataclass(frozen=True)
class Samples:
  """Texts, and how they came about.

  Attributes:
    texts: decoded, up to their end-of-text token.
    path: token ids before each step, and after the last.
  """

  texts: list[str]
  path: Int[np.ndarray, "S B L"]


class TextSampler:
  """Draws texts with one set of settings; compiled once.

  Attributes:
    config: how to draw, and how many.
    length: tokens of a text, the prompt included.
  """

  def __init__(
    self,
    config: SampleConfig,
    denoiser: Denoiser,
    tokenizer: Tokenizer,
    mesh: jax.sharding.Mesh,
    length: int,
  ):
    self.config, self.length = config, length
    self._tokenizer, self._mesh = tokenizer, mesh
    self._sample = make_sampler(config, denoiser, tokenizer.vocab.mask)

  def __call__(self, params: Params, prompt: str = "") -> Samples:
    """Returns `config.num_samples` texts that begin with the prompt.

    Raises:
      UserError: the prompt fills the whole length.
    """
    vocab, count = self._tokenizer.vocab, self.config.num_samples
    canvas = self._canvas(prompt)
    size = self._rows_a_call()
    stream = rng.stream(self.config.seed, "sample")
    parts = []
    for start in range(0, count, size):
      # More rows than asked for where a call needs them: a row's text is its
      # own, whatever is drawn beside it.
      keys = rng.per_row(stream, jnp.arange(start, start + size))
      x = np.tile(canvas, (size, 1))
      inputs = x, x == vocab.mask, keys
      parts.append(self._sample(params, *map(self._place, inputs)))
    path = np.concatenate([np.asarray(p) for p in parts], axis=1)[:, :count]
    texts = [self._tokenizer.decode(_until_end(r, vocab)) for r in path[-1]]
    return Samples(texts, path)

  def _canvas(self, prompt: str) -> Int[np.ndarray, "L"]:
    start = self._tokenizer.encode(prompt)
    if len(start) >= self.length:
      raise UserError(
        f"the prompt has {len(start)} tokens, a sample only {self.length};"
        f" shorten it to at most {self.length - 1} or set sample.length"
      )
    canvas = np.full(self.length, self._tokenizer.vocab.mask, np.int32)
    canvas[: len(start)] = start
    return canvas

  def _rows_a_call(self) -> int:
    shards = data_shards(self._mesh)
    rows = min(self.config.num_samples, _ROWS_A_CALL)
    return -(-rows // shards) * shards

  def _place(self, values):
    return jax.device_put(values, batch_sharding(self._mesh, values.ndim))


def _until_end(row: Int[np.ndarray, "L"], vocab: Vocabulary):
  """Cuts a text at its first end-of-text token."""
  ends = np.flatnonzero(row == vocab.eos)
  return row[: ends[0]] if len(ends) else row
