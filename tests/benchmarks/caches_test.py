"""The divergence of approximate caches from the exact sampler."""

import jax
import pytest

from mdm_jax.benchmarks import caches
from mdm_jax.config import Config
from mdm_jax.core import rng
from mdm_jax.core.errors import UserError
from mdm_jax.core.sharding import MeshConfig, make_mesh
from mdm_jax.data import tokenizer as tokenizers
from mdm_jax.data.config import StageConfig, TokenizerConfig
from mdm_jax.model.config import ModelConfig
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.objectives.config import BlockConfig
from mdm_jax.sample import Model
from mdm_jax.sampling.config import SampleConfig
from mdm_jax.trained_model import TrainedModel


def model(**fields):
  config = Config(
    tokenizer=TokenizerConfig(kind="byte"),
    model=ModelConfig(num_layers=2, embed_dim=16, num_heads=2),
    stages=(StageConfig(length=16),),
    sample=SampleConfig(order="random"),
    **fields,
  )
  tokenizer = tokenizers.build(config.tokenizer, [])
  denoiser = Denoiser(config.model, tokenizer.vocab)
  mesh = make_mesh(MeshConfig())
  with jax.set_mesh(mesh):
    params = jax.jit(denoiser.init)(rng.stream(0, "init"))
    params = jax.tree.map(lambda p: 3 * p, params)
  return Model(TrainedModel(config, tokenizer, denoiser, mesh, params, step=0))


def test_the_divergence_falls_with_each_refresh():
  sizes = dict(texts=24, block=8, repeats=1, num_steps=16)
  found = caches.measure(model(), refresh=(None, 1), **sizes)
  exact, prefix, again, dual, _ = found
  assert [f"{one.cache} {one.refresh}" for one in (prefix, dual)] == [
    "prefix None",
    "dual None",
  ]
  assert abs(exact.nats) < 1e-4 and abs(again.nats) < 1e-4
  assert exact.times_faster == 1 and prefix.seconds > 0
  # A mean of log ratios: its expectation is a divergence, which is positive.
  assert dual.nats > 3 * dual.error > 0
  with pytest.raises(UserError, match="has an exact cache; give a masked"):
    caches.measure(model(objective=BlockConfig(name="block")))
