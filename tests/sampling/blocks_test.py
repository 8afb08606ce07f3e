"""Texts of a block diffusion model, against calls without a cache."""

import dataclasses
import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mesh_harness import make_mesh
from sampling_harness import EOS, LETTERS, MASK, PAD, PLAIN, canvas, chi_square

from mdm_jax.core import rng
from mdm_jax.core.errors import UserError
from mdm_jax.core.sharding import batch_sharding
from mdm_jax.model.config import ModelConfig
from mdm_jax.model.context import Visibility, row_context
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.objectives.base import Decoding
from mdm_jax.sampling import blocks, sampler, schedule, tokens
from mdm_jax.sampling.block_reader import Reader, WholeRows
from mdm_jax.sampling.samplers import SAMPLERS
from mdm_jax.sampling.template import PromptError

L, B = 10, 8
MODEL = Denoiser(
  ModelConfig(num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2), LETTERS
)


def decoding(block):
  return Decoding("blocks", Visibility("blocks", block), block=block)


def settings(**fields):
  return dataclasses.replace(PLAIN, num_steps=2, **fields)


def params():
  return _params(jax.sharding.get_mesh())


@functools.cache
def _params(_mesh):
  params = jax.jit(MODEL.init)(rng.stream(0, "init"))
  return jax.tree.map(lambda p: 2 * p, params)


def prompts(*given, length=L):
  """A canvas of rows that begin with these ids."""
  x = np.full((len(given), length), MASK, np.int32)
  for row, ids in zip(x, given, strict=True):
    row[: len(ids)] = ids
  return canvas(x)


MIXED = prompts([], [1], [2, 0, 3], [], [4] * 9, [1, 1, 1, 1], [0, 2], [3] * 6)


def place(x):
  split = batch_sharding(jax.sharding.get_mesh(), np.ndim(x))
  return jax.device_put(x, split)


@functools.cache
def _sampler(config, block, way, model=MODEL):
  """A sampler: with the cache, or one that reads whole rows in each step."""
  reader = {"cached": Reader, "whole": WholeRows}[way]
  sizes = config, model, LETTERS, decoding(block)
  return blocks.make_sampler(*sizes, reader=reader)


def draw(given, config, block=4, seed=0, rows=None, way=(), sample=None):
  rows = np.arange(len(given.tokens)) if rows is None else rows
  keys = rng.per_row(rng.stream(seed, "sample"), jnp.asarray(rows))
  pace = schedule.pace(config, given.tokens.shape[1])
  sample = sample or _sampler(config, block, *(way or ["cached"]))
  drawn = sample(
    params(),
    jax.tree.map(place, given),
    pace,
    tokens.effective_settings(config),
    place(keys),
  )
  return types.SimpleNamespace(**jax.device_get(vars(drawn)))


@functools.partial(jax.jit, static_argnums=2)
def log_probs(params, x, block):
  """Of every token, by one call without a cache."""
  context = row_context(
    (x != PAD).astype(jnp.int32), visibility=Visibility("blocks", block)
  )
  hidden = MODEL.hidden(params, x, context)
  logits = MODEL.logits(params, hidden.reshape(-1, hidden.shape[-1]))
  return jax.nn.log_softmax(logits).reshape(*x.shape, -1)[..., :PAD]


SPREAD = settings(order="spread")


def test_a_cached_draw_has_the_probability_of_an_uncached_call(mesh):
  drawn = draw(MIXED, SPREAD)
  x, new = drawn.path[-1], drawn.step >= 0
  for i, before in enumerate(drawn.path[:-1]):
    now = drawn.step == i
    log_p = np.asarray(log_probs(params(), jnp.asarray(before), 4))
    at = np.take_along_axis(log_p, np.minimum(x, PAD - 1)[..., None], axis=2)
    np.testing.assert_allclose(
      drawn.confidence[now], np.exp(at[..., 0][now]), rtol=1e-5
    )
    entropy = -(np.exp(log_p) * log_p).sum(axis=-1)
    np.testing.assert_allclose(
      drawn.entropy[now], entropy[now], rtol=1e-5, atol=1e-5
    )
  assert new.sum() > 20 and (drawn.step[:, 8:] >= 4).any()


@pytest.mark.parametrize(
  "block, fields, shift",
  [
    (4, {"order": "confidence"}, False),
    (4, {"order": "confidence"}, True),
    (4, {"order": "random", "remasking": "cap", "remasking_rate": 0.5}, False),
    (4, {"order": "spread", "threshold": 0.3, "top_k": 3}, False),
    (4, {"order": "entropy", "entropy_bound": 0.5, "block_length": 2}, False),
    (1, {"order": "left_to_right"}, False),
  ],
  ids=str,
)
def test_texts_are_those_of_calls_without_a_cache(mesh, block, fields, shift):
  """To the token; with blocks of one token, those of causal attention."""
  config = settings(**fields)
  if fields.get("remasking"):
    config = dataclasses.replace(config, num_steps=5)
  sizes = dataclasses.replace(MODEL.config, shift_outputs=shift)
  model = dataclasses.replace(MODEL, config=sizes)
  seed = 2 * shift  # some rows end early
  cached = draw(MIXED, config, block, seed, way=("cached", model))
  whole = draw(MIXED, config, block, seed, way=("whole", model))
  for name in ("path", "step", "calls", "put_back"):
    np.testing.assert_array_equal(getattr(cached, name), getattr(whole, name))
  np.testing.assert_allclose(cached.confidence, whole.confidence, rtol=1e-4)
  assert (cached.put_back > 0).any() == ("remasking" in fields)
  final = cached.path[-1]
  assert not (final == MASK).any() and (final == EOS).any()
  given = ~np.asarray(MIXED.free)
  np.testing.assert_array_equal(final[given], MIXED.tokens[given])
  ended = np.cumsum(final == EOS, axis=1) - (final == EOS) > 0
  np.testing.assert_array_equal(final == PAD, ended)
  assert (ended.sum(axis=1) >= block).any()  # a block behind an end


def test_one_block_is_the_masked_sampler(mesh):
  of_masked = sampler.make_sampler(SPREAD, MODEL, LETTERS)
  ours = draw(MIXED, SPREAD, block=L)
  theirs = draw(MIXED, SPREAD, sample=of_masked)
  for name in vars(ours):
    a, b = getattr(ours, name), getattr(theirs, name)
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("block", [1, 2])
def test_texts_have_the_probabilities_of_the_model(mesh, block):
  """All texts of three tokens: a chi-square test."""
  given = prompts(*[[]] * 4096, length=3)
  drawn = draw(given, settings(order="random"), block)
  ids = np.arange(PAD)
  texts = np.array(list(itertools.product(ids, repeat=3)), np.int32)
  row = np.arange(len(texts))

  def log_p(order):
    """Of the tokens drawn in this order, each before its block is clean."""
    total, left = 0, {0, 1, 2}
    for i in order:
      x = np.where(np.isin(np.arange(3), list(left)), MASK, texts)
      found = np.asarray(log_probs(params(), jnp.asarray(x), block))
      total = total + found[row, i, texts[:, i]].astype(np.float64)
      left.remove(i)
    return total

  orders = [(0, 1, 2)] if block == 1 else [(0, 1, 2), (1, 0, 2)]
  p = np.mean([np.exp(log_p(order)) for order in orders], axis=0)
  # Of texts without an end, which all have three tokens.
  whole = (texts != EOS).all(axis=1)
  x = drawn.path[-1]
  kept = ~(x == EOS).any(axis=1)
  assert kept.sum() > 500
  codes = x[kept] @ (PAD ** np.arange(3)[::-1])
  counts = np.bincount(codes, minlength=PAD**3)[whole]
  assert counts.sum() == kept.sum()
  assert abs(chi_square(counts, p[whole])) < 4
  assert chi_square(counts, np.ones(whole.sum())) > 20


def test_a_row_depends_on_its_seed_number_and_prompt_only(mesh):
  whole = draw(MIXED, SPREAD)
  # Row 2 in another place, among rows with longer prompts: it waits for none.
  long = [1, 4, 0, 2, 2, 2]
  others = prompts(*[long] * 5, [2, 0, 3], *[long] * 2)
  part = draw(others, SPREAD, rows=np.array([9, 10, 11, 12, 13, 2, 14, 15]))
  # And a row with a long prompt, which waits above and not among its like.
  alone = draw(
    prompts(*[[3] * 6] * 8), SPREAD, rows=np.array([7, *range(20, 27)])
  )
  # Three blocks are given: what others draw meanwhile leaves its cache alone.
  late = draw(prompts(*[[4] * 9] * 8), SPREAD, rows=np.array([4, *range(7)]))
  for name in ("step", "confidence", "entropy", "calls"):
    a = getattr(whole, name)
    np.testing.assert_array_equal(a[2], getattr(part, name)[5])
    np.testing.assert_array_equal(a[7], getattr(alone, name)[0])
    np.testing.assert_array_equal(a[4], getattr(late, name)[0])
  np.testing.assert_array_equal(whole.path[:, 2], part.path[:, 5])
  np.testing.assert_array_equal(whole.path[:, 7], alone.path[:, 0])
  assert (draw(MIXED, SPREAD, seed=1).path[-1] != whole.path[-1]).any()


def test_eight_devices_draw_what_one_draws(any_mesh):
  drawn = draw(MIXED, SPREAD)
  with jax.set_mesh(make_mesh("1x1")):
    alone = draw(MIXED, SPREAD)
  np.testing.assert_array_equal(drawn.path, alone.path)
  np.testing.assert_allclose(drawn.confidence, alone.confidence, rtol=1e-4)


def test_the_watch_sees_every_step_of_every_block(mesh):
  seen = {}
  see = lambda i, x: seen.setdefault(int(i), np.asarray(x))
  watched = blocks.make_sampler(SPREAD, MODEL, LETTERS, decoding(4), see)
  drawn = draw(MIXED, SPREAD, sample=watched)
  jax.effects_barrier()
  most = blocks.most_steps(SPREAD, L, decoding(4))
  assert most == 6 and len(drawn.path) == most + 1 and max(seen) <= most
  np.testing.assert_array_equal(seen[0], drawn.path[0])
  np.testing.assert_array_equal(seen[max(seen)], drawn.path[-1])
  # One call reads the prompts; that of a block's first step, the one before.
  steps = drawn.step.max(axis=1) + 1
  began = np.array([0, 1, 1, 0, 1, 1, 1, 1])
  assert (drawn.calls <= steps + began).all()
  # A row without a prompt or an end: two steps of each block.
  ended = (drawn.path[-1] == EOS).any(axis=1)
  np.testing.assert_array_equal(drawn.calls[~ended & (began == 0)], most)


def test_what_a_block_cannot_see_is_refused():
  method, four = SAMPLERS["blocks"], decoding(4)
  x = np.array(MIXED.tokens)
  x[0, 3] = 1  # in the block of the holes before it
  method.check_canvas(canvas(x), four)
  x[0, 4] = 1
  with pytest.raises(PromptError, match="prompt 1 of 8: there is text behind"):
    method.check_canvas(canvas(x), four)
  with pytest.raises(UserError, match="sample.guidance=1.0 has no effect"):
    method.check(settings(guidance=1.0))
  with pytest.raises(UserError, match="block_length=3 does not divide"):
    _sampler(settings(block_length=3), 4, "cached")
