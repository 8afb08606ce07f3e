"""Approximate caches: exact where they must be, and each row by itself."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from sampling_harness import LETTERS, PLAIN, blank, canvas, row_keys

from mdm_jax.core import rng
from mdm_jax.core.errors import UserError
from mdm_jax.core.sharding import batch_sharding
from mdm_jax.model.config import ModelConfig
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.objectives.base import Decoding
from mdm_jax.sampling import schedule, tokens
from mdm_jax.sampling.samplers import SAMPLERS

L = 12
SIZES = ModelConfig(num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2)
METHOD = SAMPLERS["any_order"]


@functools.cache
def _params(_mesh):
  denoiser = Denoiser(SIZES, LETTERS)
  params = jax.jit(denoiser.init)(rng.stream(0, "init"))
  return jax.tree.map(lambda p: 2 * p, params)


@functools.cache
def _sampler(config, shift, _mesh):
  model = Denoiser(dataclasses.replace(SIZES, shift_outputs=shift), LETTERS)
  return METHOD.make(config, model, LETTERS, Decoding("any_order"), None)


def draw(rows=range(8), shift=False, **fields):
  numbers = np.asarray(rows)
  fields = {"order": "spread", "num_steps": 9, "block_length": 5} | fields
  config = dataclasses.replace(PLAIN, **fields)
  config.check("sample")
  sample = _sampler(config, shift, jax.sharding.get_mesh())
  x = blank(len(numbers), L)
  # Rows with a prompt are in their second block first.
  x[numbers % 2 == 1, :6] = 1
  mesh = jax.sharding.get_mesh()
  place = lambda x: jax.device_put(x, batch_sharding(mesh, np.ndim(x)))
  drawn = sample(
    _params(mesh),
    jax.tree.map(place, canvas(x)),
    schedule.pace(config, L),
    tokens.effective_settings(config),
    place(row_keys(numbers)),
  )
  return jax.device_get(drawn)


def same(one, other, rtol=1e-4, rows=slice(None)):
  for name in ("step", "calls"):
    a, b = getattr(one, name), getattr(other, name)
    np.testing.assert_array_equal(a[rows], b[rows])
  np.testing.assert_array_equal(one.path[:, rows], other.path[:, rows])
  a, b = one.confidence[rows], other.confidence[rows]
  np.testing.assert_allclose(a, b, rtol=rtol)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_with_a_call_in_every_step_it_is_the_exact_sampler(mesh, cache):
  same(draw(cache=cache, cache_refresh=1), draw())


@pytest.mark.parametrize("shift", [False, True])
def test_what_is_read_again_is_exact(mesh, shift):
  """All of a row of one block; in the first block, all of it for prefix."""
  for cache in ("prefix", "dual"):
    one_block = {"block_length": L, "shift": shift}
    same(draw(cache=cache, **one_block), draw(**one_block))
  exact, prefix, dual = (
    draw(cache=cache, shift=shift) for cache in ("none", "prefix", "dual")
  )
  first = exact.confidence[::2, :5]
  np.testing.assert_allclose(prefix.confidence[::2, :5], first, rtol=1e-4)
  for one in (prefix.confidence, dual.confidence[:, :5]):
    whole = exact.confidence[:, : one.shape[1]]
    assert (np.abs(one - whole) > 1e-4).any()


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_row_does_not_depend_on_the_others(mesh, cache):
  """Neither on those in other blocks, nor on those that are read whole."""
  fields = dict(cache=cache, cache_refresh=3, threshold=0.4)
  whole = draw([0, 1, 2, 3, 4, 5, 6, 7], **fields)
  part = draw([0, 9, 2, 11, 4, 13, 6, 15], **fields)
  same(whole, part, 1e-5, rows=slice(0, 8, 2))
  odd = draw([8, 1, 10, 3, 12, 5, 14, 7], **fields)
  same(whole, odd, 1e-5, rows=slice(1, 8, 2))


@pytest.mark.parametrize(
  "fields, words",
  [
    ({"cache": "dual", "block_length": None}, "sample.cache=dual needs blocks"),
    ({"cache": "prefix", "guidance": 1.0}, "set sample.guidance=0.0"),
  ],
)
def test_settings_without_a_meaning_are_one_line(fields, words):
  with pytest.raises(UserError, match=words):
    draw(**fields)
  with pytest.raises(UserError, match="sample.cache='dual' has no effect"):
    SAMPLERS["blocks"].check(dataclasses.replace(PLAIN, cache="dual"))
