"""Judges: a slow Kneser-Ney, and sums to one."""

import collections
import math

import numpy as np
import pytest
from absl import logging
from hypothesis import given, settings
from hypothesis import strategies as st

from mdm_jax.data import corpora, splits
from mdm_jax.evaluation import judge as judges
from mdm_jax.evaluation.judge import (
  NgramJudge,
  make_judge,
  nll_per_byte,
)

DOCS = [d.text for d in corpora.load("python_docs")]
TOY = ["abracadabra", "a cab", "", "b", "abra", "bar na\u00efve", "\0\0a\0"]
PROSE = [text[:700] for text in DOCS[:3]]
ORDERS = range(1, 9)


# MARK: Kneser-Ney


class Slow:
  """Interpolated modified Kneser-Ney on dicts, one byte at a time."""

  def __init__(self, texts, order):
    self.order, self.counts = order, {}
    for n in range(1, order + 1):
      before = collections.defaultdict(list)
      for text in texts:
        for i in range(len(text) - n + 1):
          before[text[i : i + n]].append(text[i - 1] if i else None)
      if before:
        size = len if n == order else lambda found: len(set(found))
        self.counts[n] = {gram: size(found) for gram, found in before.items()}

  def discount(self, n, count):
    c = [sum(v == k for v in self.counts[n].values()) for k in range(5)]
    if not all(c[1:]):
      return [0, 0.5, 1, 1.5][min(count, 3)]
    y = c[1] / (c[1] + 2 * c[2])
    found = [0, *(k - (k + 1) * y * c[k + 1] / c[k] for k in (1, 2, 3))]
    return (found if min(found[1:]) > 0 else [0, 0.5, 1, 1.5])[min(count, 3)]

  def __call__(self, context, byte):
    context = context[max(len(context) - self.order + 1, 0) :]
    shorter = self(context[1:], byte) if context else 1 / 256
    n = len(context) + 1
    after = {
      g: c for g, c in self.counts.get(n, {}).items() if g[:-1] == context
    }
    if not after:
      return shorter
    taken = {g: self.discount(n, c) for g, c in after.items()}
    gram = context + bytes([byte])
    own = after.get(gram, 0) - taken.get(gram, 0)
    return (own + sum(taken.values()) * shorter) / sum(after.values())


@pytest.mark.parametrize("order", ORDERS)
def test_probabilities_are_as_defined_on_a_toy_text(order):
  raw = [text.encode() for text in TOY]
  slow, fast = Slow(raw, order), NgramJudge(TOY, order)
  for text in [*raw, b"abrabra", b"zz", b"cab\xff\0abracad", b"a\0\0"]:
    expected = [slow(text[:i], text[i]) for i in range(len(text))]
    np.testing.assert_allclose(fast.probabilities(text), expected, rtol=1e-12)


@pytest.mark.parametrize("order", [2, 4, 8])
def test_probabilities_are_as_defined_on_prose(order):
  slow = Slow([text.encode() for text in PROSE], order)
  text = DOCS[5][:40].encode()
  expected = [slow(text[:i], text[i]) for i in range(len(text))]
  found = NgramJudge(PROSE, order).probabilities(text)
  np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_discounts_by_hand():
  counts = np.repeat([1, 2, 3, 4, 9], [10, 5, 3, 2, 7])
  # The base is 10 / (10 + 2 * 5).
  expected = 1 - 2 * 0.5 * 5 / 10, 2 - 3 * 0.5 * 3 / 5, 3 - 4 * 0.5 * 2 / 3
  np.testing.assert_allclose(judges._discounts(counts), expected)


@pytest.mark.parametrize(
  "times", [[10, 5, 3, 0], [0, 5, 3, 2], [10, 0, 3, 2], [10, 5, 3, 30], [0] * 4]
)
def test_discounts_where_the_counts_give_none(times):
  counts = np.repeat([1, 2, 3, 4], times)
  assert judges._discounts(counts) == (0.5, 1.0, 1.5)


def _distribution(judge, context):
  return [judge.probabilities(context + bytes([b]))[-1] for b in range(256)]


@pytest.mark.parametrize("order", [1, 3, 8])
@pytest.mark.parametrize(
  "context",
  [b"", b"t", b"the stat", b"\xff\xfe", b"the \xff", b"\xffthe", b"\0"],
)
def test_the_next_byte_has_probability_one(order, context):
  found = _distribution(NgramJudge(PROSE, order), context)
  assert min(found) > 0
  np.testing.assert_allclose(sum(found), 1, rtol=1e-12)


@given(st.lists(st.binary(max_size=12), max_size=4), st.binary(max_size=9))
@settings(deadline=None, max_examples=10)
def test_the_next_byte_has_probability_one_whatever_the_text(texts, context):
  texts = [text.decode("latin-1") for text in texts]
  found = _distribution(NgramJudge(texts, 4), context)
  np.testing.assert_allclose(sum(found), 1, rtol=1e-12)


@given(st.text(max_size=50), st.integers(0, 50))
@settings(deadline=None, max_examples=50)
def test_later_bytes_change_nothing(text, cut):
  judge, data = NgramJudge(PROSE), text.encode()
  np.testing.assert_array_equal(
    judge.probabilities(data)[:cut], judge.probabilities(data[:cut])
  )


@pytest.fixture(scope="module")
def trained():
  return NgramJudge(DOCS)


@given(st.text())
@settings(deadline=None)
def test_any_text_has_a_finite_likelihood(trained, text):
  nats = trained.nats(text)
  assert math.isfinite(nats) and (nats > 0 if text else nats == 0)
  per_byte = -np.log(trained.probabilities(text.encode()))
  np.testing.assert_allclose(nats, per_byte.sum())


def test_the_training_text_is_likelier_than_its_letters_or_words(trained):
  random = np.random.default_rng(0)
  text = DOCS[3][:2000]
  words, letters = text.split(" "), list(text)
  random.shuffle(words)
  random.shuffle(letters)
  by_words = trained.nats(" ".join(words))
  assert 2 * trained.nats(text) < by_words
  assert 2 * by_words < trained.nats("".join(letters))


def test_longer_contexts_judge_held_out_text_better():
  documents = corpora.load("python_docs")
  train = [d for d in documents if splits.place(d.text) >= 0.05]
  held_out = [d for d in documents if splits.place(d.text) < 0.05]
  bits = [
    nll_per_byte(
      NgramJudge([d.text for d in train], order), [d.text for d in held_out]
    ).value
    / math.log(2)
    for order in (2, 4, 6, 8)
  ]
  assert bits == sorted(bits, reverse=True)
  assert bits[-1] < 1.3  # 1.12 on Python 3.11's pages, 1.25 on 3.13's


def test_no_gram_crosses_two_texts():
  together, apart = NgramJudge(["abcd"], 2), NgramJudge(["ab", "cd"], 2)
  after = lambda judge: judge.probabilities(b"bc")[1]
  assert after(apart) < after(together)
  # Nothing comes after b: the shorter context alone decides.
  assert after(apart) == NgramJudge(["ab", "cd"], 1).probabilities(b"c")[0]


@pytest.mark.parametrize("texts", [[], [""]])
def test_without_a_text_every_byte_is_as_likely(texts):
  assert NgramJudge(texts).nats("any") == pytest.approx(3 * math.log(256))


@pytest.mark.parametrize("order", [0, 9])
def test_orders_end_at_eight_bytes(order):
  with pytest.raises(ValueError, match=f"order {order}"):
    NgramJudge(TOY, order)


def test_only_the_first_bytes_are_counted_and_it_says_so(monkeypatch):
  said = []
  monkeypatch.setattr(
    logging, "warning", lambda text, *args: said.append(text % args)
  )
  monkeypatch.setattr(judges, "_MAX_BYTES", 9)
  cut = NgramJudge(["abcde", "fghij", "klm"])
  assert len(said) == 1 and "first 9 of 13 bytes" in said[0]
  whole = NgramJudge(["abcde", "fghi"])
  assert cut.nats("abcfghijklm") == whole.nats("abcfghijklm")
  assert len(said) == 1


# MARK: per byte


class Fixed:
  """A judge of known answers."""

  name = "fixed"

  def __init__(self, **nats):
    self.nats_of = lambda texts: [nats[text] for text in texts]


def test_nll_per_byte_by_hand():
  # 2 and 4 bytes; 8 nats in 6 bytes leave -2/3 and 2/3 of the texts' own.
  got = nll_per_byte(Fixed(**{"\u00e9": 2.0, "four": 6.0}), ["\u00e9", "four"])
  assert got.value == pytest.approx(8 / 6)
  assert got.stderr == pytest.approx(2 / 3 / 3)
  assert got.n == 2


def test_nll_per_byte_of_one_and_of_empty_texts():
  judge = Fixed(**{"": 0.0, "ab": 3.0})
  one = nll_per_byte(judge, ["ab"])
  assert one.value == 1.5 and math.isnan(one.stderr) and one.n == 1
  assert nll_per_byte(judge, ["ab", ""]).value == 1.5
  for texts in ([], ["", ""]):
    got = nll_per_byte(judge, texts)
    assert math.isnan(got.value) and math.isnan(got.stderr)
    assert got.n == len(texts)


def test_no_folder_means_the_ngram_judge():
  judge = make_judge("", TOY)
  assert isinstance(judge, NgramJudge) and "8" in judge.name
  assert judge.nats_of(["abra"]) == [NgramJudge(TOY, 8).nats("abra")]
