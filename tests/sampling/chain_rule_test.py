"""The chain rule against enumeration, on a vocabulary of 3 and texts of 3."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mesh_harness import make_mesh

from mdm_jax.core import rng
from mdm_jax.core.sharding import batch_sharding, put
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.model.config import ModelConfig
from mdm_jax.model.context import row_context
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.sampling import schedule
from mdm_jax.sampling.call import Canvas
from mdm_jax.sampling.chain_calls import ChainCalls, Passage
from mdm_jax.sampling.chain_rule import bound_of_orders, make_chain_rule
from mdm_jax.sampling.config import SampleConfig
from mdm_jax.sampling.order import ORDERS
from mdm_jax.sampling.sampler import make_sampler
from mdm_jax.sampling.tokens import Settings

V, L, MASK = 3, 3, 5
TEXTS = list(itertools.product(range(V), repeat=L))
ORDERS_OF_3 = list(itertools.permutations(range(L)))
VOCAB = Vocabulary(8, mask=MASK, pad=6, forbidden=((V, 8),))
BY_POSITION = ("left_to_right", "spread", "random")


@pytest.fixture(scope="module")
def model():
  """A random denoiser, sharp enough that a wrong term shows."""
  config = ModelConfig(num_layers=1, embed_dim=8, num_heads=2)
  denoiser = Denoiser(config, VOCAB)
  with jax.set_mesh(make_mesh("1x1")):
    params = jax.jit(denoiser.init)(rng.stream(0, "init"))
    yield denoiser, jax.tree.map(lambda p: p * 3, params)


@pytest.fixture(scope="module")
def table(model):
  """log p(token at i | the visible others) for every pattern of masks."""
  denoiser, params = model
  patterns = list(itertools.product([*range(V), MASK], repeat=L))
  xt = jnp.array(patterns)
  hidden = jax.jit(denoiser.hidden)(params, xt, row_context(jnp.ones_like(xt)))
  logits = denoiser.logits(params, hidden.reshape(-1, hidden.shape[-1]))
  logp = np.asarray(jax.nn.log_softmax(logits)).reshape(len(patterns), L, -1)
  return {p: logp[i] for i, p in enumerate(patterns)}


def chain(table, text, order):
  """-log p of a text by the product of its conditionals in an order."""
  total, seen = 0.0, [MASK] * L
  for at in order:
    total -= table[tuple(seen)][at, text[at]]
    seen[at] = text[at]
  return total


def canvas(texts, free=None, lengths=None, length=L):
  tokens = np.full((len(texts), length), VOCAB.pad, np.int32)
  for row, text in zip(tokens, texts, strict=True):
    row[: len(text)] = text
  lengths = [len(t) for t in texts] if lengths is None else lengths
  every = np.arange(length) < np.array(lengths)[:, None]
  free = every if free is None else free
  return Canvas(*map(place, (tokens, free, np.array(lengths, np.int32))))


def place(values):
  return put(values, batch_sharding(jax.sharding.get_mesh(), values.ndim))


def row_keys(seeds):
  split = batch_sharding(jax.sharding.get_mesh(), 1)
  keys = jax.jit(rng.per_row, out_shardings=split)
  return keys(jax.random.key(1), np.array(seeds, np.int32))


def nats(model, order, *args, seeds=(0,), length=L, **kwargs):
  """-log p of some texts; a key for all, or one for each."""
  denoiser, params = model
  texts = canvas(*args, length=length, **kwargs)
  keys = row_keys(np.resize(np.array(seeds), len(texts.tokens)))
  rule = make_chain_rule(order, denoiser, VOCAB, length)
  return np.asarray(rule(params, texts, keys))


@pytest.mark.parametrize("order", list(ORDERS))
def test_every_order_gives_a_distribution(model, order):
  total = np.exp(-nats(model, order, TEXTS)).sum()
  assert total == pytest.approx(1, abs=1e-5)


def test_left_to_right_is_the_product_of_conditionals(model, table):
  expected = [chain(table, text, range(L)) for text in TEXTS]
  found = nats(model, "left_to_right", TEXTS)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_random_orders_are_uniform_and_their_mean_is_the_nelbo(model, table):
  count = 1200
  by_text = np.array(
    [[chain(table, text, order) for order in ORDERS_OF_3] for text in TEXTS]
  )
  # A text whose orders can be told apart.
  gaps = np.diff(np.sort(by_text, axis=1), axis=1).min(axis=1)
  text, values = TEXTS[gaps.argmax()], by_text[gaps.argmax()]
  assert gaps.max() > 1e-3
  found = nats(model, "random", [text] * count, seeds=range(count))
  which = np.abs(found[:, None] - values).argmin(axis=1)
  np.testing.assert_allclose(found, values[which], rtol=1e-5)
  shares = np.bincount(which, minlength=6) / count
  assert np.abs(shares - 1 / 6).max() < 4 * math.sqrt(5 / 36 / count)
  # The NELBO by its own definition: for each number of masks m, L / m times the
  # sum over masked positions, averaged over which are masked.
  bound = 0.0
  for m in range(1, L + 1):
    sets = list(itertools.combinations(range(L), m))
    for masked in sets:
      xt = tuple(MASK if i in masked else text[i] for i in range(L))
      cost = -sum(table[xt][i, text[i]] for i in masked)
      bound += cost / m / len(sets)
  assert values.mean() == pytest.approx(bound, rel=1e-5)


def test_several_orders_are_a_tighter_bound_by_jensen(table):
  by_order = np.array(
    [[chain(table, text, order) for text in TEXTS] for order in ORDERS_OF_3]
  )
  mixture = bound_of_orders(by_order)
  np.testing.assert_allclose(
    np.exp(-mixture), np.exp(-by_order).mean(axis=0), rtol=1e-6
  )
  assert np.exp(-mixture).sum() == pytest.approx(1, abs=1e-5)
  assert (mixture <= by_order.mean(axis=0) + 1e-9).all()
  np.testing.assert_array_equal(bound_of_orders(by_order[:1]), by_order[0])
  far = bound_of_orders(np.array([[1e4], [1e4 + 1]]))  # exp(-1e4) is 0
  assert far == pytest.approx(1e4 - math.log((1 + math.exp(-1)) / 2))


@pytest.mark.parametrize("order", BY_POSITION)
def test_given_tokens_are_a_condition(model, table, order):
  texts = [(t, 1, u) for t, u in itertools.product(range(V), repeat=2)]
  free = np.tile(np.array([True, False, True]), (len(texts), 1))
  found = nats(model, order, texts, free=free)
  assert np.exp(-found).sum() == pytest.approx(1, abs=1e-5)
  if order == "left_to_right":
    first, third = texts[4][0], texts[4][2]
    cost = table[MASK, 1, MASK][0, first] + table[first, 1, MASK][2, third]
    assert found[4] == pytest.approx(-cost, rel=1e-5)


def test_padding_changes_nothing(model):
  short = nats(model, "left_to_right", TEXTS[:4])
  padded = nats(model, "left_to_right", [*TEXTS[:4], (0,) * 8], length=8)
  np.testing.assert_allclose(padded[:4], short, rtol=1e-5)


@pytest.mark.parametrize("order", BY_POSITION)
def test_terms_that_are_computed_apart_add_up_to_the_same(model, order):
  denoiser, params = model
  free = np.array([True, True, False])
  texts = [(0, 1, 2), (2,), (1, 1), (), (2, 0, 1), (1, 2, 2)]
  some = [Passage(np.array(t, np.int32), np.ones(len(t), bool)) for t in texts]
  some[4] = Passage(some[4].ids, free)
  # 5 terms per call: a call ends within a text.
  calls = ChainCalls(
    *(order, denoiser, VOCAB, jax.sharding.get_mesh(), L), tokens_a_call=5 * L
  )
  numbers, found = np.array([3, 1, 4, 1, 5, 9]), np.full(len(texts), np.nan)
  for index, nats_of_some in calls(params, some, jax.random.key(1), numbers):
    assert np.isnan(found[index]).all()  # each once
    found[index] = nats_of_some
  frees = [[True] * L, *[[i < len(t) for i in range(L)] for t in texts[1:]]]
  frees[4] = free
  every = np.array(frees)
  expected = nats(model, order, texts, free=every, seeds=numbers)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_sampler_draws_with_that_probability(model):
  (denoiser, params), order = model, "confidence"
  config = SampleConfig(num_steps=L, order=order).untruncated()
  keys = row_keys(range(16))
  free = canvas([(0,) * L] * 16)
  pace = jax.tree.map(jnp.asarray, schedule.pace(config, L))
  sample = make_sampler(config, denoiser, VOCAB)
  drawn = sample(params, free, pace, Settings(), keys)
  found = nats(model, order, np.asarray(drawn.path[-1]), seeds=range(16))
  expected = -np.log(np.asarray(drawn.confidence)).sum(axis=1)
  np.testing.assert_allclose(found, expected, rtol=1e-4)
