"""Calls with cached keys and values equal one call over the whole row."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.core import rng
from mdm_jax.core.sharding import RULES
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.model.config import ModelConfig
from mdm_jax.model.context import CAUSAL, Context, Visibility, row_context
from mdm_jax.model.denoiser import Denoiser

MODEL = ModelConfig(num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2)
DENOISER = Denoiser(MODEL, Vocabulary(16))
L, B = 8, 8
BLOCKS = Visibility("blocks", 2)
# Texts that begin with a block, one alone, and padding.
SEGMENTS = np.tile([[1, 1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 0, 0]], (4, 1))

hidden = jax.jit(DENOISER.hidden)


def place(x):
  return jax.device_put(x, RULES.spec("batch", None))


def params():
  return _params(jax.sharding.get_mesh())


@functools.cache
def _params(_mesh):
  return jax.jit(DENOISER.init)(rng.stream(0, "init"))


def tokens(seed=0):
  return place(np.random.default_rng(seed).integers(0, 16, (B, L), np.int32))


def context(visibility, **more):
  return row_context(
    place(SEGMENTS.astype(np.int32)), visibility=visibility, **more
  )


def part(context: Context, first: int, past: int, **more) -> Context:
  """The context of some of a row's tokens."""
  cut = lambda x: place(np.asarray(x)[:, first:past])
  return dataclasses.replace(
    context,
    segments=cut(context.segments),
    positions=cut(context.positions),
    **more,
  )


def cut(x, first, past):
  return place(np.asarray(x)[:, first:past])


def assert_equal(got, want):
  scale = np.abs(want).max()
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize(
  "way, visibility, size",
  [
    ("written", CAUSAL, 1),
    ("written", CAUSAL, 3),
    ("written", BLOCKS, 2),
    ("behind", CAUSAL, 3),
    ("behind", BLOCKS, 4),
  ],
)
def test_calls_with_a_cache_give_what_one_call_gives(
  any_mesh, way, visibility, size
):
  weights, xt, whole = params(), tokens(), context(visibility)
  want = hidden(weights, xt, whole)
  cache = DENOISER.init_cache(B, L) if way == "written" else None
  for first in range(0, L, size):
    past = min(first + size, L)
    if way == "written":
      cache = dataclasses.replace(cache, at=jnp.int32(first))
    now = part(whole, first, past, cache=cache, keep=True)
    got, cache = hidden(weights, cut(xt, first, past), now)
    assert_equal(got, np.asarray(want)[:, first:past])
  split = RULES.spec(None, "batch", "heads", None, None)
  assert cache.keys.sharding.spec == cache.values.sharding.spec == split
  np.testing.assert_array_equal(cache.side.segments, SEGMENTS)


def test_a_block_may_be_written_over_until_its_tokens_are_final(mesh):
  weights, xt, whole = params(), tokens(), context(BLOCKS)
  want = np.asarray(hidden(weights, xt, whole))
  cache = DENOISER.init_cache(B, L)
  for first in range(0, L, 2):
    cache = dataclasses.replace(cache, at=jnp.int32(first))
    for draft in (tokens(1), tokens(2), xt):
      now = part(whole, first, first + 2, cache=cache, keep=True)
      got, cache = hidden(weights, cut(draft, first, first + 2), now)
      behind = np.concatenate([xt[:, :first], draft[:, first:]], axis=1)
      alone = np.asarray(hidden(weights, place(behind), whole))
      assert_equal(got, alone[:, first : first + 2])
  assert_equal(got, want[:, -2:])


def test_a_call_that_is_not_kept_changes_nothing(mesh):
  weights, xt, whole = params(), tokens(), context(CAUSAL)
  cache = DENOISER.init_cache(B, L)
  now = part(whole, 0, 4, cache=cache)
  got = hidden(weights, cut(xt, 0, 4), now)
  assert_equal(got, np.asarray(hidden(weights, xt, whole))[:, :4])
  assert not np.asarray(cache.keys).any()


def test_shifted_outputs_need_the_token_before_them(mesh):
  weights, xt, whole = params(), tokens(), context(CAUSAL, shift=True)
  want = np.asarray(hidden(weights, xt, whole))
  cache = DENOISER.init_cache(B, L)
  _, cache = hidden(
    weights, cut(xt, 0, 4), part(whole, 0, 4, cache=cache, keep=True)
  )
  cache = dataclasses.replace(cache, at=jnp.int32(3))
  got = hidden(weights, cut(xt, 3, 6), part(whole, 3, 6, cache=cache))
  assert_equal(np.asarray(got)[:, 1:], want[:, 4:6])


@pytest.mark.parametrize(
  "any_mesh, block",
  [("1x1", 1), ("1x1", 4), ("1x1", L), ("4x2", 4)],
  indirect=["any_mesh"],
)
def test_two_passes_are_the_row_of_noisy_and_clean_halves(any_mesh, block):
  """Loss and gradients, which flow back through the cache to the clean pass."""
  xt, x0, weights = tokens(1), tokens(0), params()
  clean = context(Visibility("blocks", block))
  noisy = dataclasses.replace(clean, visibility=Visibility("noisy", block))
  twice = lambda x: jnp.concatenate([x, x], axis=1)
  halves = np.broadcast_to(np.arange(2 * L)[None] < L, (B, 2 * L))
  dual = Context(
    twice(clean.segments),
    twice(clean.positions),
    Visibility("dual", block),
    noisy=place(halves),
  )

  def in_two(weights):
    _, cache = DENOISER.hidden(
      weights, x0, dataclasses.replace(clean, keep=True)
    )
    return DENOISER.hidden(weights, xt, dataclasses.replace(noisy, cache=cache))

  def in_one(weights):
    both = jnp.concatenate([xt, x0], axis=1)
    return DENOISER.hidden(weights, both, dual)[:, :L]

  loss = lambda run: lambda weights: jnp.sin(3 * run(weights)).mean()
  gradient = lambda run: jax.jit(jax.value_and_grad(loss(run)))(weights)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
    gradient(in_two),
    gradient(in_one),
  )


def test_a_fresh_cache_is_empty_and_sharded_as_keys_are(any_mesh):
  cache = DENOISER.init_cache(B, L)
  assert cache.keys.shape == cache.values.shape == (2, B, 2, L, 4)
  want = RULES.spec(None, "batch", "heads", None, None)
  assert cache.keys.sharding.spec == cache.values.sharding.spec == want
  assert (np.asarray(cache.side.segments) == -1).all() and cache.at == 0


def test_decoding_writes_the_buffers_in_place(mesh):
  """Temporaries of a loop of calls are far from a copy of the buffers."""
  length = 1024
  model = dataclasses.replace(MODEL, num_layers=32)
  denoiser = Denoiser(model, DENOISER.vocab)
  weights = jax.jit(denoiser.init)(rng.stream(0, "init"))
  cache = denoiser.init_cache(1, length)

  @functools.partial(jax.jit, donate_argnums=1)
  def decode(weights, cache):
    def step(i, carry):
      token, cache = carry
      cache = dataclasses.replace(cache, at=i)
      ones = jnp.ones((1, 1), jnp.int32)
      now = Context(ones, i * ones, CAUSAL, cache=cache, keep=True)
      x, cache = denoiser.hidden(weights, token, now)
      logits = denoiser.logits(weights, x[0])
      best = logits.argmax(axis=-1)[None].astype(jnp.int32)
      return jax.reshard(best, RULES.spec("batch", None)), cache

    start = place(jnp.ones((1, 1), jnp.int32)), cache
    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(length), step, start)

  program = decode.lower(weights, cache).compile()
  size = cache.keys.nbytes + cache.values.nbytes
  assert program.memory_analysis().temp_size_in_bytes < size / 8
