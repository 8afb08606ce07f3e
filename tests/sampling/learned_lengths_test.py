"""Learned lengths of holes, by enumeration of all rows of a tiny joint."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mdm_jax.core import rng
from mdm_jax.core.errors import UserError
from mdm_jax.core.sharding import batch_sharding
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data import holes as holes_lib
from mdm_jax.data import tokenizer as tokenizers
from mdm_jax.data.config import TokenizerConfig
from mdm_jax.sampling import sampler, schedule, tokens
from mdm_jax.sampling.call import Canvas
from mdm_jax.sampling.chain_calls import ChainCalls, Passage, key_of_orders
from mdm_jax.sampling.config import SampleConfig
from mdm_jax.sampling.hole_lengths import HoleLengths
from mdm_jax.sampling.template import candidates

BYTES = tokenizers.build(TokenizerConfig(kind="byte"), [])
VOCAB = BYTES.vocab
BLANK = holes_lib.blank(VOCAB)
LONGEST, LENGTH = 3, 12
FILLS = [
  "".join(text)
  for size in range(1, LONGEST + 1)
  for text in itertools.product("ab", repeat=size)
]


def untold(fill):
  """The ids of an untold hole with a text in it."""
  ids = np.array([*fill.encode()], np.int32)
  return [int(i) for i in holes_lib.Holes(length=LONGEST).filled(ids, VOCAB)[0]]


@dataclasses.dataclass(frozen=True)
class Rows:
  """The exact conditionals of a joint over rows; params are their weights."""

  rows: tuple[tuple[int, ...], ...]

  def hidden(self, params, xt, context):
    length = xt.shape[1]
    ids = np.full((len(self.rows), length), VOCAB.pad)
    for row, own in zip(ids, self.rows, strict=True):
      row[: len(own)] = own
    ids = jnp.asarray(ids)[None]
    inside = (context.segments > 0)[:, None]
    fits = (xt[:, None] == ids) | ((xt[:, None] == VOCAB.mask) & inside)
    fits &= inside == (ids != VOCAB.pad)
    weight = jnp.where(fits.all(axis=2), params[None], 0.0)
    hot = jax.nn.one_hot(ids[0], BLANK + 1)
    return jnp.log(jnp.einsum("bt,tlv->blv", weight, hot))

  def logits(self, params, hidden):
    return hidden


ONE = Rows(tuple((ord("x"), *untold(fill), ord("y")) for fill in FILLS))
PAIRS = [*itertools.product(FILLS, repeat=2)]


def two(between):
  """All rows with an untold hole, or a told one, and a second untold one."""
  return Rows(
    tuple(
      (ord("x"), *first(one), *between, *untold(other), ord("z"))
      for first in (untold, str.encode)
      for one, other in PAIRS
    )
  )


def weights(count):
  found = np.random.default_rng(0).gamma(0.4, size=count) + 1e-2
  return (found / found.sum()).astype(np.float32)


def log_p(mesh, model, *texts, rule="auto"):
  find = HoleLengths(model, VOCAB, mesh, rows=4, untold=LONGEST)
  count = len(model.rows)
  fills = weights(len(PAIRS) if count > len(PAIRS) else count)
  params = jax.device_put(
    np.tile(fills, count // len(fills)), NamedSharding(mesh, PartitionSpec())
  )
  return find(params, candidates(texts, BYTES, LENGTH), rule)


def by_length(*lengths):
  """Sums the weights of the rows with these lengths of holes."""
  fills = [*itertools.product(FILLS, repeat=len(lengths))]
  fits = [[*map(len, fill)] == [*lengths] for fill in fills]
  return weights(len(fills))[fits].sum()


@pytest.mark.parametrize("least, most", [(1, 3), (1, 2), (2, 3)])
def test_a_length_has_its_probability_within_the_bounds(mesh, least, most):
  found = log_p(mesh, ONE, f"x[MASK:{least}-{most}]y")
  true = np.array([by_length(k) for k in range(least, most + 1)])
  np.testing.assert_allclose(np.exp(found), true / true.sum(), rtol=1e-4)


def test_a_second_length_depends_on_the_first(mesh):
  found = log_p(mesh, two(b"y"), "x[MASK:1-3]y[MASK:1-2]z")
  true = [by_length(i, j) for i in (1, 2, 3) for j in (1, 2)]
  np.testing.assert_allclose(np.exp(found), true / np.sum(true), rtol=1e-4)


def test_holes_side_by_side_are_two(mesh):
  found = log_p(mesh, two(b""), "x[MASK:1-3][MASK:1-3]z")
  true = [by_length(i, j) for i in (1, 2, 3) for j in (1, 2, 3)]
  np.testing.assert_allclose(np.exp(found), true / np.sum(true), rtol=1e-4)


def test_texts_are_asked_for_by_themselves(mesh):
  texts = "x[MASK:1-3]y", "xay", "x[MASK:2-3]y"
  together = log_p(mesh, ONE, *texts)
  alone = [log_p(mesh, ONE, text) for text in texts]
  np.testing.assert_array_equal(together, np.concatenate(alone))


def test_a_hole_longer_than_those_of_the_training_is_refused(mesh):
  with pytest.raises(UserError, match=r"prompt 2 of 2: .*\[MASK:1-3\], or"):
    log_p(mesh, ONE, "x[MASK:1-3]y", "x[MASK:2-4]y")


def test_the_rule_may_be_bayes(mesh):
  told = Rows(tuple((ord("x"), *f.encode(), ord("y")) for f in FILLS))
  # Such rows have p(x and y | length) = 1: it says nothing about the length.
  found = log_p(mesh, told, "x[MASK:1-3]y", rule="bayes")
  np.testing.assert_allclose(np.exp(found), 1 / 3, rtol=1e-4)


def test_text_drawn_with_blanks_has_its_distribution(mesh):
  """And decodes to what was drawn before the blanks."""
  config = SampleConfig(
    num_steps=LONGEST,
    order="random",
    temperature=1.0,
    temperature_range=None,
    top_k=None,
    top_p=None,
  )
  count, row = 4096, np.array(ONE.rows[0], np.int32)
  free = np.zeros(len(row), bool)
  free[1 : 1 + LONGEST] = True
  split = lambda a: jax.device_put(a, batch_sharding(mesh, np.ndim(a)))
  whole = NamedSharding(mesh, PartitionSpec())
  canvas = Canvas(
    split(np.tile(row, (count, 1))),
    split(np.tile(free, (count, 1))),
    split(np.full(count, len(row), np.int32)),
  )
  keys = rng.per_row(rng.stream(0, "sample"), jnp.arange(count))
  drawn = sampler.make_sampler(config, ONE, VOCAB)(
    jax.device_put(weights(len(FILLS)), whole),
    canvas,
    jax.device_put(schedule.pace(config, len(row)), whole),
    tokens.effective_settings(config),
    split(keys),
  )
  texts = [BYTES.decode(ids) for ids in np.asarray(drawn.path[-1])]
  shares = [texts.count(f"x{fill}y") / count for fill in FILLS]
  assert sum(shares) == 1
  true = weights(len(FILLS))
  error = np.sqrt(true * (1 - true) / count)
  assert (abs(shares - true) < 4.5 * error).all()


def test_length_and_text_cost_what_both_cost_together(mesh):
  """-log p(length) - log p(text | length) = -log p(text and blanks)."""
  params = jax.device_put(
    weights(len(FILLS)), NamedSharding(mesh, PartitionSpec())
  )
  nats = ChainCalls("left_to_right", ONE, VOCAB, mesh, 8, 64)
  free = np.zeros(len(ONE.rows[0]), bool)
  free[1 : 1 + LONGEST] = True
  passages = [Passage(np.array(row, np.int32), free) for row in ONE.rows]
  found = np.zeros(len(passages))
  numbers = np.arange(len(passages))
  for index, values in nats(params, passages, key_of_orders(0), numbers):
    found[index] = values
  np.testing.assert_allclose(np.exp(-found), weights(len(FILLS)), rtol=1e-4)
  lengths = log_p(mesh, ONE, "x[MASK:1-3]y")
  for size in range(1, LONGEST + 1):
    own = [len(fill) == size for fill in FILLS]
    np.testing.assert_allclose(
      np.exp(-found)[own].sum(), np.exp(lengths[size - 1]), rtol=1e-4
    )


@pytest.mark.parametrize(
  "vocab",
  [
    Vocabulary(8, end=6, pad=7, forbidden=((7, 8),)),
    Vocabulary(8, end=6, pad=7, separator=6, forbidden=((7, 8),)),
    Vocabulary(8, end=5, pad=7, separator=6, forbidden=((6, 8),)),
  ],
)
def test_a_tokenizer_needs_an_id_for_blanks(vocab):
  with pytest.raises(UserError, match="separator"):
    holes_lib.blank(vocab)
