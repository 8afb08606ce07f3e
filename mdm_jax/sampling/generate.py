"""From parameters and a prompt to text."""

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

  def __call__(self, params: Params, prompt: str = "") -> list[str]:
    """Returns `config.num_samples` texts that begin with the prompt.

    Raises:
      UserError: the prompt fills the whole length.
    """
    start = self._tokenizer.encode(prompt)
    if len(start) >= self.length:
      raise UserError(
        f"the prompt has {len(start)} tokens, a sample only {self.length};"
        f" shorten it to at most {self.length - 1} or set sample.length"
      )
    vocab = self._tokenizer.vocab
    x = np.full((self._rows(), self.length), vocab.mask, np.int32)
    x[:, : len(start)] = start
    stream = rng.stream(self.config.seed, "sample")
    keys = rng.per_row(stream, jnp.arange(len(x)))
    inputs = x, x == vocab.mask, keys
    drawn = np.asarray(self._sample(params, *map(self._place, inputs)))
    return [
      self._tokenizer.decode(_until_end(row, vocab))
      for row in drawn[: self.config.num_samples]
    ]

  def _rows(self) -> int:
    """More than asked for where the mesh needs it; a row's text is its own."""
    shards = data_shards(self._mesh)
    return -(-self.config.num_samples // shards) * shards

  def _place(self, values):
    return jax.device_put(values, batch_sharding(self._mesh, values.ndim))


def _until_end(row: Int[np.ndarray, "L"], vocab: Vocabulary):
  """Cuts a text at its first end-of-text token."""
  ends = np.flatnonzero(row == vocab.eos)
  return row[: ends[0]] if len(ends) else row
