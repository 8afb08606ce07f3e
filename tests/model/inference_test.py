"""Many calls without gradients: what they compute is what single calls do."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.core import rng
from mdm_jax.core.sharding import RULES
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.model import inference
from mdm_jax.model.config import ModelConfig
from mdm_jax.model.context import CAUSAL, row_context
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.model.kernels import KERNELS, Reference

VOCAB = Vocabulary.after_text(28)
ROWS, LENGTH = 8, 16
MODEL = ModelConfig(
  num_layers=2, embed_dim=32, num_heads=2, layer_loop="unrolled"
)


@functools.cache
def _build(config, _mesh):
  denoiser = Denoiser(config, VOCAB)
  params = jax.jit(denoiser.init)(rng.stream(0, "init"))
  # A block that starts as the identity, or weighs nothing, shows nothing.
  noise = lambda p: p + 0.1 * jnp.sin(jnp.arange(p.size)).reshape(p.shape)
  noisy = jax.jit(lambda params: jax.tree.map(noise, params))
  return denoiser, noisy(params)


def build(**fields):
  config = dataclasses.replace(MODEL, **fields)
  return _build(config, jax.sharding.get_mesh())


def inputs(**more):
  """Rows of different lengths, and five positions of each."""
  place = lambda x: jax.device_put(x, RULES.spec("batch"))
  draw = np.random.default_rng(0)
  tokens = place(draw.integers(0, 28, (ROWS, LENGTH)).astype(np.int32))
  lengths = LENGTH - np.arange(ROWS) % 4
  inside = np.arange(LENGTH) < lengths[:, None]
  rate = place(np.linspace(0, 1, ROWS, dtype=np.float32))
  where = np.argsort(draw.random((ROWS, LENGTH)), axis=1)[:, :5]
  context = row_context(
    place(inside.astype(np.int32)), condition=rate, most_segments=1, **more
  )
  return tokens, context, place(where.astype(np.int32))


@pytest.mark.parametrize("block", ["swiglu", "gelu"])
def test_some_positions_get_the_states_that_a_whole_call_gives(any_mesh, block):
  fields = {"num_heads": 4, "num_kv_heads": 2, "qkv_bias": True}
  denoiser, params = build(block=block, time_conditioning=True, **fields)
  tokens, context, where = inputs(visibility=CAUSAL)

  @jax.jit
  def both(params, tokens, context, where):
    hidden = inference.ready(denoiser, params).run(tokens, context)
    return hidden(where), hidden(None)

  whole = jax.jit(denoiser.hidden)(params, tokens, context)
  some, every = both(params, tokens, context, where)
  np.testing.assert_allclose(every, whole, rtol=1e-4, atol=1e-5)
  want = np.take_along_axis(np.asarray(whole), where[..., None], axis=1)
  np.testing.assert_allclose(some, want, rtol=1e-4, atol=1e-5)


def test_parameters_are_cast_once_except_the_scales_of_norms(mesh):
  denoiser, params = build(dtype="bfloat16")
  ready = inference.ready(denoiser, params)
  assert len(ready.blocks) == MODEL.num_layers
  for path, p in jax.tree.leaves_with_path((ready.params, ready.blocks)):
    scale = path[-1].key == "scale"
    assert p.dtype == (jnp.float32 if scale else jnp.bfloat16), path


def test_a_loop_over_layers_and_your_own_kernel_are_left_alone(mesh):
  assert inference.ready(*build(layer_loop="scan")) is None
  KERNELS.register("of_this_test")(type("Mine", (Reference,), {}))
  assert inference.ready(*build(attention="of_this_test")) is None
