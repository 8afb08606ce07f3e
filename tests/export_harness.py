"""Random models of this library, and what they compute."""

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.config import Config
from mdm_jax.data import tokenizer as tokenizers
from mdm_jax.data.config import StageConfig, TokenizerConfig
from mdm_jax.huggingface.sizes import differences
from mdm_jax.model.config import ModelConfig
from mdm_jax.model.context import row_context
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.trained_model import TrainedModel

TINY = ModelConfig(num_layers=2, embed_dim=16, num_heads=4, mlp_dim=24)


def model_of(sizes=TINY, tokenizer=None, kind="byte", scale=0.0, **fields):
  """A random model of this library, on the current mesh."""
  config = Config(model=sizes, stages=(StageConfig(length=12),), **fields)
  if tokenizer is None:
    tokenizer = tokenizers.build(TokenizerConfig(kind=kind), ["the cat"])
  denoiser = Denoiser(sizes, tokenizer.vocab)
  params = denoiser.init(jax.random.key(0))
  draw = np.random.default_rng(1)

  def noisy(path, leaf):
    # Norms and biases start at 1 and 0, which would hide an exchange.
    plain = "norm" not in str(path) and "bias" not in str(path)
    noise = (scale if plain else 0.3) * draw.normal(size=leaf.shape)
    return leaf + jax.device_put(jnp.asarray(noise, leaf.dtype), leaf.sharding)

  params = jax.tree_util.tree_map_with_path(noisy, params)
  mesh = jax.sharding.get_mesh()
  return TrainedModel(config, tokenizer, denoiser, mesh, params, step=7)


def check_same(one, other):
  assert not list(differences(one.config.model, other.config.model))
  jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
  assert type(one.config.objective) is type(other.config.objective)


def logits(model, ids, visibility):
  """Ours [B, L, V]; -inf at ids that must not be predicted."""
  tokens = jnp.asarray(ids, jnp.int32)
  context = row_context(jnp.ones_like(tokens), visibility=visibility)
  hidden = jax.jit(model.denoiser.hidden)(model.params, tokens, context)
  flat = hidden.reshape(-1, hidden.shape[-1])
  found = jax.jit(model.denoiser.logits)(model.params, flat)
  return np.asarray(found).reshape(*np.shape(ids), -1)
