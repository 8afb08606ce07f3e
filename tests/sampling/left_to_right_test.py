"""Texts of an autoregressive model, against calls without a cache."""

import dataclasses
import functools
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
from mdm_jax.model.context import CAUSAL, row_context
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.objectives.base import Decoding
from mdm_jax.sampling import schedule, tokens
from mdm_jax.sampling.left_to_right import make_sampler
from mdm_jax.sampling.samplers import SAMPLERS
from mdm_jax.sampling.template import PromptError

L, B = 8, 8
DECODING = Decoding("left_to_right", CAUSAL, begin=EOS)
MODEL = Denoiser(
  ModelConfig(num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2), LETTERS
)
PACE = schedule.pace(PLAIN, L)  # not read
SAMPLE = make_sampler(MODEL, LETTERS, DECODING)


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


MIXED = prompts([], [1], [2, 0, 3], [], [4] * 7, [1, 1, 1, 1], [0, 2], [3])


def place(x):
  split = batch_sharding(jax.sharding.get_mesh(), np.ndim(x))
  return jax.device_put(x, split)


def draw(given, seed=0, rows=None, sample=None, settings=PLAIN):
  rows = np.arange(len(given.tokens)) if rows is None else rows
  keys = rng.per_row(rng.stream(seed, "sample"), jnp.asarray(rows))
  drawn = (sample or SAMPLE)(
    params(),
    jax.tree.map(place, given),
    PACE,
    tokens.effective_settings(settings),
    place(keys),
  )
  return types.SimpleNamespace(**jax.device_get(vars(drawn)))


@jax.jit
def log_probs(params, x):
  """Of every token, by one call without a cache."""
  read = jnp.pad(x, ((0, 0), (1, 0)), constant_values=EOS)[:, :-1]
  context = row_context(jnp.ones_like(x), visibility=CAUSAL)
  hidden = MODEL.hidden(params, read, context)
  logits = MODEL.logits(params, hidden.reshape(-1, hidden.shape[-1]))
  found = jax.nn.log_softmax(logits).reshape(*x.shape, -1)
  return found[..., :PAD]  # the others have no chance


def test_a_cached_draw_has_the_probability_of_an_uncached_call(mesh):
  drawn = draw(MIXED)
  x, new = drawn.path[-1], drawn.step >= 0
  log_p = np.asarray(log_probs(params(), jnp.asarray(x)))
  at = np.take_along_axis(log_p, np.minimum(x, PAD - 1)[..., None], axis=2)
  np.testing.assert_allclose(
    drawn.confidence[new], np.exp(at[..., 0][new]), rtol=1e-5
  )
  entropy = -(np.exp(log_p) * log_p).sum(axis=-1)
  # A sum of terms that were rounded: other processors round otherwise.
  np.testing.assert_allclose(
    drawn.entropy[new], entropy[new], rtol=1e-5, atol=1e-5
  )
  assert new.sum() > 20 and not drawn.confidence[~new].any()


def test_texts_have_the_probabilities_of_the_model(mesh):
  """All texts of 2 tokens, of which one is an end: a chi-square test."""
  drawn = draw(prompts(*[[]] * 2048, length=2))
  x = drawn.path[-1]
  ids = np.arange(PAD)
  first, second = (a.ravel() for a in np.meshgrid(ids, ids, indexing="ij"))
  texts = np.stack([first, second], axis=1).astype(np.int32)
  log_p = np.asarray(log_probs(params(), jnp.asarray(texts)))
  row = np.arange(len(texts))
  p = np.exp(log_p[row, 0, first] + log_p[row, 1, second])
  ended = first == EOS
  p = np.append(p[~ended], p[ended].sum())
  assert p.sum() == pytest.approx(1, rel=1e-5)
  assert (x[x[:, 0] == EOS, 1] == PAD).all()
  codes = np.where(x[:, 0] == EOS, -1, x[:, 0] * len(ids) + x[:, 1])
  wanted = np.append((first * len(ids) + second)[~ended], -1)
  counts = (codes[:, None] == wanted[None]).sum(axis=0)
  assert counts.sum() == len(x)
  assert abs(chi_square(counts, p)) < 4
  # The same counts are far from an even distribution.
  assert chi_square(counts, np.full(len(p), 1 / len(p))) > 20


def test_steps_path_and_calls_tell_how_a_text_came_about(mesh):
  drawn = draw(MIXED)
  final = drawn.path[-1]
  given = ~np.asarray(MIXED.free)
  firsts = given.sum(axis=1)
  for row, first in enumerate(firsts):
    end = np.flatnonzero(final[row] == EOS)
    end = end[end >= first]
    past = end[0] + 1 if len(end) else L
    assert (final[row, past:] == PAD).all()
    assert drawn.step[row].tolist() == (
      [-1] * first + list(range(past - first)) + [-1] * (L - past)
    )
    assert drawn.calls[row] == past - first + (first > 0)
    for i, x in enumerate(drawn.path[:, row]):
      at = min(first + i, past)
      np.testing.assert_array_equal(x[:at], final[row, :at])
      assert (x[at:] == (PAD if at == past else MASK)).all()
  np.testing.assert_array_equal(final[given], MIXED.tokens[given])
  assert (final == EOS).any() and not drawn.put_back.any()


def test_a_row_depends_on_its_seed_number_and_prompt_only(mesh):
  whole = draw(MIXED)
  # Row 2 in another place, with its own key, among rows with longer prompts:
  # it waits for none, where above it waited for rows without a prompt.
  long = [1, 4, 0, 2]
  others = prompts(*[long] * 5, [2, 0, 3], *[long] * 2)
  rows = np.array([9, 10, 11, 12, 13, 2, 14, 15])
  part = draw(others, rows=rows)
  for name in ("step", "confidence", "entropy", "calls"):
    a, b = getattr(whole, name)[2], getattr(part, name)[5]
    np.testing.assert_array_equal(a, b)
  np.testing.assert_array_equal(whole.path[:, 2], part.path[:, 5])
  assert (draw(MIXED, seed=1).path[-1] != whole.path[-1]).any()
  assert (draw(MIXED).path == whole.path).all()


def test_eight_devices_draw_what_one_draws(any_mesh):
  drawn = draw(MIXED)
  with jax.set_mesh(make_mesh("1x1")):
    alone = draw(MIXED)
  np.testing.assert_array_equal(drawn.path, alone.path)
  np.testing.assert_allclose(drawn.confidence, alone.confidence, rtol=1e-4)


def test_filters_and_short_templates_apply(mesh):
  greedy = draw(MIXED, settings=dataclasses.replace(PLAIN, top_k=1))
  x, new = greedy.path[-1], greedy.step >= 0
  best = np.asarray(log_probs(params(), jnp.asarray(x))).argmax(axis=-1)
  np.testing.assert_array_equal(x[new], best[new])
  short = dataclasses.replace(MIXED, lengths=np.full(B, 7, np.int32))
  short = dataclasses.replace(short, free=MIXED.free & (np.arange(L) < 7))
  drawn = draw(short)
  assert (drawn.path[:, :, 7] == PAD).all() and (drawn.step[:, 7] == -1).all()


def test_the_watch_sees_every_step(mesh):
  seen = {}
  see = lambda i, x: seen.setdefault(int(i), np.asarray(x))
  drawn = draw(MIXED, sample=make_sampler(MODEL, LETTERS, DECODING, see))
  jax.effects_barrier()
  assert sorted(seen) == list(range(len(seen))) and len(seen) <= L + 1
  np.testing.assert_array_equal(seen[0], drawn.path[0])
  np.testing.assert_array_equal(seen[max(seen)], drawn.path[-1])


def test_the_cache_is_written_in_place(mesh):
  """Temporaries are far from two copies of the cache."""
  length, layers = 128, 512
  config = dataclasses.replace(MODEL.config, num_layers=layers)
  model = Denoiser(config, LETTERS)
  sample = make_sampler(model, LETTERS, DECODING)
  weights = jax.eval_shape(model.init, jax.random.key(0))
  given = jax.tree.map(place, prompts([], length=length))
  keys = place(rng.per_row(rng.stream(0, "sample"), jnp.arange(1)))
  arguments = weights, given, PACE, tokens.effective_settings(PLAIN), keys
  program = sample.lower(*arguments).compile()
  cache = 2 * layers * length * 2 * 4 * 4  # two arrays, of two heads of 4
  assert program.memory_analysis().temp_size_in_bytes < 1.5 * cache


@pytest.mark.parametrize(
  "fields",
  [
    {"order": "confidence"},
    {"num_steps": 8},
    {"threshold": 0.5},
    {"guidance": 1.0},
    {"remasking": "cap"},
    {"schedule": "cosine"},
  ],
  ids=str,
)
def test_settings_without_effect_are_refused(fields):
  method = SAMPLERS["left_to_right"]
  plain = dataclasses.replace(PLAIN, order="left_to_right")
  method.check(plain)
  with pytest.raises(UserError, match="from left to right") as found:
    method.check(dataclasses.replace(plain, **fields))
  (name,) = fields
  assert f"sample.{name}=" in str(found.value) and "\n" not in str(found.value)


def test_text_behind_a_hole_is_refused():
  method = SAMPLERS["left_to_right"]
  method.check_canvas(MIXED, DECODING)
  x = np.array(MIXED.tokens)
  x[2, 6] = 1
  with pytest.raises(PromptError, match="prompt 3 of 8: there is text behind"):
    method.check_canvas(canvas(x), DECODING)
  SAMPLERS["any_order"].check_canvas(canvas(x), DECODING)
