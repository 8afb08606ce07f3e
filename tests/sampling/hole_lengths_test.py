"""Lengths of holes that are not told, by enumeration of a tiny joint."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mdm_jax.core.errors import UserError
from mdm_jax.data import tokenizer as tokenizers
from mdm_jax.data.config import TokenizerConfig
from mdm_jax.sampling.config import SampleConfig
from mdm_jax.sampling.hole_lengths import HoleLengths
from mdm_jax.sampling.samplers import SAMPLERS
from mdm_jax.sampling.template import candidates

BYTES = tokenizers.build(TokenizerConfig(kind="byte"), [])
VOCAB = BYTES.vocab
LETTERS, LENGTH = "ab", 6
TEXTS = [
  "".join(text)
  for length in range(1, LENGTH + 1)
  for text in itertools.product(LETTERS, repeat=length)
]


@dataclasses.dataclass(frozen=True)
class Joint:
  """The exact conditionals of a joint over the texts of each length."""

  def hidden(self, params, xt, context):
    ids = np.full((len(TEXTS), LENGTH), VOCAB.pad)
    for row, text in zip(ids, TEXTS, strict=True):
      row[: len(text)] = [*text.encode()]
    ids = jnp.asarray(ids)[None]
    inside = (context.segments > 0)[:, None]
    fits = (xt[:, None] == ids) | ((xt[:, None] == VOCAB.mask) & inside)
    fits &= inside == (ids != VOCAB.pad)
    weight = jnp.where(fits.all(axis=2), params[None], 0.0)
    hot = jax.nn.one_hot(ids[0], ord(LETTERS[-1]) + 1)
    return jnp.log(jnp.einsum("bt,tlv->blv", weight, hot))

  def logits(self, params, hidden):
    return hidden


@pytest.fixture(scope="module")
def weights():
  """p(text | its length), for all texts of all lengths."""
  found = np.random.default_rng(0).gamma(0.5, size=len(TEXTS)) + 1e-2
  sizes = np.array([*map(len, TEXTS)])
  for length in range(1, LENGTH + 1):
    found[sizes == length] /= found[sizes == length].sum()
  return found.astype(np.float32)


def enumerated(weights, parts, bounds):
  """p(lengths | given) by Bayes' rule, over all texts.

  Args:
    weights: of all texts.
    parts: given text before, between and behind the holes.
    bounds: fewest and most tokens of each hole.
  """
  found = []
  for sizes in itertools.product(*(range(a, b + 1) for a, b in bounds)):
    shown = parts[0] + "".join(
      "?" * size + part for size, part in zip(sizes, parts[1:], strict=True)
    )
    fits = [
      len(text) == len(shown)
      and all(s in ("?", t) for s, t in zip(shown, text, strict=True))
      for text in TEXTS
    ]
    found.append(weights[fits].sum())
  return np.array(found) / np.sum(found)


def log_p(mesh, weights, *texts, near=LENGTH, rows=4):
  find = HoleLengths(Joint(), VOCAB, mesh, rows, near)
  params = jax.device_put(weights, NamedSharding(mesh, PartitionSpec()))
  found = candidates(texts, BYTES, LENGTH)
  return find(params, found), found.counts


@pytest.mark.parametrize(
  "text, parts, bounds",
  [
    ("a[MASK:1-4]b", ("a", "b"), [(1, 4)]),
    ("[MASK:2-5]b", ("", "b"), [(2, 5)]),
    ("ab[MASK:1-4]", ("ab", ""), [(1, 4)]),
    ("ab[MASK:1-2]a[MASK]", ("ab", "a", ""), [(1, 2), (1, 1)]),
    ("a[MASK:1-2]b[MASK:1-2]", ("a", "b", ""), [(1, 2), (1, 2)]),
  ],
)
def test_lengths_have_their_probability_given_the_text(
  mesh, weights, text, parts, bounds
):
  found, _ = log_p(mesh, weights, text)
  np.testing.assert_allclose(
    np.exp(found), enumerated(weights, parts, bounds), atol=2e-5
  )


def test_a_text_has_the_same_lengths_among_others(mesh, weights):
  texts = "a[MASK:1-4]b", "ab", "[MASK:1-3]a", "[MASK:2]a"
  together, counts = log_p(mesh, weights, *texts)
  assert counts.tolist() == [4, 1, 3, 1]
  alone = [log_p(mesh, weights, text)[0] for text in texts]
  np.testing.assert_array_equal(together, np.concatenate(alone))
  # What is told costs nothing and is certain.
  assert (together[[4, 8]] == 0).all()


def test_near_tokens_are_scored_given_the_far_ones(mesh, weights):
  found, _ = log_p(mesh, weights, "ab[MASK:1-3]a", near=1)
  both = enumerated(weights, ("ab", "a"), [(1, 3)])
  # p(b, a | first a, length) is p(ab_a | length) / p(a____ | length).
  first = [
    sum(w for w, t in zip(weights, TEXTS, strict=True) if fits(t, n))
    for n in (4, 5, 6)
  ]
  expected = both / np.array(first)
  np.testing.assert_allclose(
    np.exp(found), expected / expected.sum(), atol=2e-5
  )


def fits(text, length):
  return len(text) == length and text[0] == "a"


def chosen(mesh, way, seed=0, number=20_000):
  log = np.log([1.0, 0.2, 0.5, 0.3, 1.0])
  counts, config = np.array([1, 3, 1]), SampleConfig(hole_length=way, seed=seed)
  texts, find = np.arange(number) % 3, HoleLengths(Joint(), VOCAB, mesh, 4)
  return texts, find.choose(log, counts, texts, np.arange(number), config)


def test_the_likeliest_length_is_taken(mesh):
  texts, rows = chosen(mesh, "likeliest")
  np.testing.assert_array_equal(rows, np.array([0, 2, 4])[texts])


def test_drawn_lengths_have_their_shares_and_follow_the_seed(mesh):
  texts, rows = chosen(mesh, "drawn")
  assert (rows[texts == 0] == 0).all() and (rows[texts == 2] == 4).all()
  shares = np.bincount(rows[texts == 1], minlength=4)[1:4] / (texts == 1).sum()
  np.testing.assert_allclose(shares, [0.2, 0.5, 0.3], atol=0.03)
  assert (chosen(mesh, "drawn", 0, 99)[1] == rows[:99]).all()
  assert (chosen(mesh, "drawn", 1)[1] != rows).any()


@pytest.mark.parametrize("order", ["left_to_right", "blocks"])
def test_models_with_an_order_of_their_own_refuse_untold_lengths(order):
  found = candidates(["ab", "[MASK:1-2]"], BYTES, LENGTH)
  with pytest.raises(UserError, match="prompt 2 of 2: .* write"):
    SAMPLERS[order].check_lengths(found)
  SAMPLERS["any_order"].check_lengths(found)
