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


def generate(
  config: SampleConfig,
  denoiser: Denoiser,
  tokenizer: Tokenizer,
  params: Params,
  mesh: jax.sharding.Mesh,
  length: int,
  prompt: str = "",
) -> list[str]:
  """Returns `config.num_samples` texts that begin with the prompt.

  Args:
    config: how to draw.
    denoiser: the model.
    tokenizer: of the model.
    params: its parameters.
    mesh: where they live; it is the current mesh.
    length: tokens of a text, the prompt included.
    prompt: kept as it is.

  Raises:
    UserError: the prompt fills the whole length.
  """
  start = tokenizer.encode(prompt)
  if len(start) >= length:
    raise UserError(
      f"the prompt has {len(start)} tokens, a sample only {length}; shorten it"
      f" to at most {length - 1} or set sample.length"
    )
  # More rows than asked for where the mesh needs them; a row's text is its own.
  rows = -(-config.num_samples // data_shards(mesh)) * data_shards(mesh)
  vocab = tokenizer.vocab
  x = np.full((rows, length), vocab.mask, np.int32)
  x[:, : len(start)] = start
  place = lambda a: jax.device_put(a, batch_sharding(mesh, a.ndim))
  keys = rng.per_row(rng.stream(config.seed, "sample"), jnp.arange(rows))
  sampler = make_sampler(config, denoiser, vocab.mask)
  drawn = sampler(params, place(x), place(x == vocab.mask), place(keys))
  drawn = np.asarray(drawn)[: config.num_samples]
  return [tokenizer.decode(_until_end(row, vocab)) for row in drawn]


def _until_end(row: Int[np.ndarray, "L"], vocab: Vocabulary):
  """Cuts a text at its first end-of-text token."""
  ends = np.flatnonzero(row == vocab.eos)
  return row[: ends[0]] if len(ends) else row
