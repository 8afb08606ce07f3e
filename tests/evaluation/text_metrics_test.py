"""Text metrics: hand-computed values, boundaries, and the slow definitions."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdm_jax.core.errors import UserError
from mdm_jax.core.standard_errors import Estimate, mean
from mdm_jax.data import ngrams, segments
from mdm_jax.evaluation.text_metrics import (
  METRICS,
  as_json,
  copied_share,
  measure,
  metric,
  of_pools,
  tokens,
)

NAMES = [f"seq_rep_{n}" for n in (1, 2, 3, 4)]
NAMES += ["distinct_1", "distinct_2", "self_bleu_4", "unigram_entropy"]
NAMES += ["unique_starts@1", "unique_starts@5", "grade"]
POOLED = ["distinct_1", "distinct_2", "unique_starts@1", "unique_starts@5"]
RATIOS = [name for name in NAMES if name not in ("unigram_entropy", "grade")]
MIXED = [
  "The cat sat on the mat. The cat sat on the rug!",
  "A cat sat on the mat, and a dog sat on the rug.",
  "",
  "Dogs don't sit. Dogs run; dogs bark.\n\n Dogs sleep on the mat.",
  "the the the the the",
  "Yes.",
  "Yes.",
]
_words = st.sampled_from(["a", "b", "c", "D.", "e, f?", "\n"])
_texts = st.one_of(st.text(), st.lists(_words, max_size=20).map(" ".join))


def _same(got: float, expected: float):
  np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


# MARK: tokens


def test_tokens_are_lower_case_words_and_marks():
  text = "Don\u2019t stop_now: it's 1,234 na\u00efve caf\u00e9s\u2014(OK)!\n"
  found = "don\u2019t stop _ now : it's 1 , 234 na\u00efve caf\u00e9s \u2014"
  assert tokens(text) == [*found.split(), "(", "ok", ")", "!"]
  assert tokens(" '' \t") == ["'", "'"]
  assert tokens("") == []


# MARK: values by hand


def test_all_measures_in_their_order():
  assert list(measure(MIXED)) == NAMES
  assert {m.n for m in measure(MIXED).values()} == {7}


def test_repetition_is_averaged_over_texts():
  # a b a b a: 2 of 5, 2 of 4, 2 of 3, 2 of 2 n-grams are distinct.
  got = measure(["a b a b a", "c d e f g"])
  expected = [3 / 5, 2 / 4, 1 / 3, 0]
  for n, first in enumerate(expected, start=1):
    _same(got[f"seq_rep_{n}"].value, first / 2)
    # Two values x and 0: their standard deviation is x / sqrt(2).
    _same(got[f"seq_rep_{n}"].stderr, first / 2)


@pytest.mark.parametrize("period", [1, 2, 3, 7])
def test_repetition_of_a_cycle(period):
  length = 40
  got = measure([" ".join(str(i % period) for i in range(length))])
  for n in (1, 2, 3, 4):
    _same(got[f"seq_rep_{n}"].value, 1 - period / (length - n + 1))


def test_distinct_is_of_the_pool():
  got = measure(["a b a", "b a c c"])
  _same(got["distinct_1"].value, 3 / 7)
  _same(got["distinct_2"].value, 4 / 5)  # ab, ba, ac, cc of 5
  # Without the first text 3 of 4 and 3 of 3, without the second 2 of 3, 2 of 2.
  _same(got["distinct_1"].stderr, (3 / 4 - 2 / 3) / 2)
  _same(got["distinct_2"].stderr, 0)


def test_entropy_is_in_nats_and_averaged():
  got = measure(["a b c d", "a a a b"])["unigram_entropy"]
  first = math.log(4)
  second = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
  _same(got.value, (first + second) / 2)
  _same(got.stderr, (first - second) / 2)


def test_starts_are_of_words():
  texts = ["The end.", '"the" other', "A b c d e f", "a B, c d e!", "the end"]
  got = measure(texts)
  _same(got["unique_starts@1"].value, 2 / 5)
  _same(got["unique_starts@5"].value, 3 / 5)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 9])
def test_pools_of_some_texts_are_the_mean_over_all_choices(size):
  texts = ["a b a", "b a", "c c a b", "a b", "b d e", "a b a"]
  got = of_pools(size, texts)
  choices = list(itertools.combinations(texts, min(size, len(texts))))
  for name in ("unique_starts@1", "unique_starts@5"):
    every = [measure(choice)[name].value for choice in choices]
    _same(got[name].value, np.mean(every))
  # A pool of n-grams has a random size: the ratio of the means is taken.
  for name, n in (("distinct_1", 1), ("distinct_2", 2)):
    sizes = [sum(len(t.split()) - n + 1 for t in c) for c in choices]
    distinct = [
      measure(choice)[name].value * tokens
      for choice, tokens in zip(choices, sizes, strict=True)
    ]
    _same(got[name].value, np.sum(distinct) / np.sum(sizes))
  assert got["distinct_1"].n == len(texts)


def test_errors_of_pools_are_over_documents():
  texts, documents = ["a b", "b c", "a d", "e", "a b", "f"], [0, 0, 1, 1, 2, 2]
  size = 2
  got = of_pools(size, texts, documents)
  without = [
    [t for t, d in zip(texts, documents, strict=True) if d != left]
    for left in range(3)
  ]
  for name, found in got.items():
    values = [of_pools(size, rest)[name].value for rest in without]
    _same(found.stderr, np.sqrt(2 * np.var(values)))
  # All of the texts: what `measure` returns.
  assert of_pools(6, texts, documents) == {
    name: value
    for name, value in measure(texts, documents).items()
    if name in POOLED
  }


def test_self_bleu_by_hand():
  # Against each other, 4 of 5, 3 of 4, 2 of 3 and 1 of 2 n-grams match.
  got = measure(["a b c d e", "a b c d f"])["self_bleu_4"]
  _same(got.value, (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
  _same(got.stderr, 0)


def test_self_bleu_counts_a_tenth_for_no_match_and_brevity():
  got = measure(["a b", "a c c d"])["self_bleu_4"]
  short = math.exp(1 - 4 / 2) * (1 / 2 * 0.1 * 0.1 * 0.1) ** 0.25
  long = (1 / 4 * 0.1 / 3 * 0.1 / 2 * 0.1) ** 0.25
  _same(got.value, (short + long) / 2)


def test_grade_by_hand():
  texts = ["The cat sat. It ran.", "A dog ran to the water."]
  # 11 words, 3 sentences, 12 syllables.
  got = measure(texts)["grade"]
  _same(got.value, 0.39 * 11 / 3 + 11.8 * 12 / 11 - 15.59)
  assert math.isnan(got.stderr)  # either text alone has too few sentences


# MARK: boundaries


def test_nothing_but_one_token():
  got = measure(["na " * 30] * 3)
  for n in (1, 2, 3, 4):
    _same(got[f"seq_rep_{n}"].value, 1 - 1 / (31 - n))
  _same(got["distinct_1"].value, 1 / 90)
  _same(got["self_bleu_4"].value, 1)
  assert got["unigram_entropy"] == Estimate(0.0, 0.0, 3)
  _same(got["unique_starts@1"].value, 1 / 3)


def test_nothing_repeats():
  texts = [" ".join(f"w{i}x{j}" for j in range(20)) for i in range(4)]
  got = measure(texts)
  for name in NAMES[:4]:
    assert got[name] == Estimate(0.0, 0.0, 4)
  for name in POOLED:
    assert got[name] == Estimate(1.0, 0.0, 4)
  assert got["self_bleu_4"].value == 0
  _same(got["unigram_entropy"].value, math.log(20))


def test_identical_texts_have_a_self_bleu_of_one():
  _same(measure([MIXED[0]] * 5)["self_bleu_4"].value, 1)


def test_empty_texts_count():
  got = measure(["", "a b a", " \n"])
  _same(got["seq_rep_1"].value, 1 / 9)
  _same(got["unigram_entropy"].value, math.log(3) / 3 - 2 / 9 * math.log(2))
  _same(got["distinct_1"].value, 2 / 3)
  _same(got["unique_starts@1"].value, 2 / 3)
  assert math.isnan(got["distinct_1"].stderr)  # without "a b a" nothing is left
  assert got["self_bleu_4"].value == 0


def test_only_empty_texts():
  got = measure(["", ""])
  for name in ("distinct_1", "distinct_2", "grade"):
    assert math.isnan(got[name].value)
  for name in (*NAMES[:4], "self_bleu_4", "unigram_entropy"):
    assert got[name] == Estimate(0.0, 0.0, 2)


def test_a_single_text_has_no_standard_error_and_no_self_bleu():
  got = measure(["One here. Two here. Three here."])
  assert all(math.isnan(m.stderr) for m in got.values())
  undefined = [name for name, m in got.items() if math.isnan(m.value)]
  assert undefined == ["self_bleu_4"]


def test_no_text():
  for measured in measure([]).values():
    assert math.isnan(measured.value) and math.isnan(measured.stderr)
    assert measured.n == 0


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_grade_takes_three_sentences(count):
  grade = measure(["Dogs ran.", *["Cats sat."] * (count - 1)])["grade"]
  assert math.isnan(grade.value) == (count < 3)
  assert math.isnan(grade.stderr) == (count < 4)


def test_blank_sentences_do_not_count():
  assert math.isnan(measure(["Dogs ran. Cats sat.", " \n"])["grade"].value)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("text", ["... !! ?", "... ! ! ? ! - ! ? !"])
def test_a_grade_takes_words(text):
  assert len(segments.sentences(text)) >= 3
  assert math.isnan(measure([text] * 9)["grade"].value)


# MARK: against the definitions


def _naive_bleu(text, others):
  """BLEU-4 against several references, smoothed by method 1, from scratch."""
  if not any(token in other for token in text for other in others):
    return 0.0
  product = 1.0
  for n in (1, 2, 3, 4):
    grams = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
    found = 0
    for gram in set(grams):
      occurs = [
        sum(tuple(o[i : i + n]) == gram for i in range(len(o))) for o in others
      ]
      found += min(grams.count(gram), max(occurs))
    product *= (found or 0.1) / max(len(grams), 1)
  gaps = sorted((abs(len(o) - len(text)), len(o)) for o in others)
  return product**0.25 * min(1.0, math.exp(1 - gaps[0][1] / len(text)))


def _check_self_bleu(texts):
  found = [tokens(text) for text in texts]
  terms = [
    _naive_bleu(t, found[:i] + found[i + 1 :]) for i, t in enumerate(found)
  ]
  got = measure(texts)["self_bleu_4"]
  _same(got.value, np.mean(terms))
  _same(got.stderr, np.std(terms, ddof=1) / np.sqrt(len(terms)))


@given(st.lists(_texts, min_size=2, max_size=6))
@settings(deadline=None, max_examples=60)
def test_self_bleu_is_as_defined(texts):
  _check_self_bleu(texts)


def test_self_bleu_of_many_sharing_texts_is_as_defined():
  random = np.random.default_rng(0)
  words = np.array(["x", "y", "z", "w"])
  sizes = random.integers(0, 30, 12)
  _check_self_bleu([" ".join(random.choice(words, size)) for size in sizes])


def _brute_jackknife(name, texts):
  rest = [texts[:i] + texts[i + 1 :] for i in range(len(texts))]
  without = np.array([measure(r)[name].value for r in rest])
  spread = ((without - without.mean()) ** 2).sum()
  return np.sqrt((len(texts) - 1) / len(texts) * spread)


@pytest.mark.parametrize("name", [*POOLED, "grade"])
def test_jackknife_is_by_leaving_out(name):
  got = measure(MIXED)[name].stderr
  assert got > 0
  _same(got, _brute_jackknife(name, MIXED))


@pytest.mark.parametrize("name", [*NAMES[:4], "unigram_entropy"])
def test_jackknife_of_an_average_is_its_standard_error(name):
  _same(measure(MIXED)[name].stderr, _brute_jackknife(name, MIXED))


@given(st.lists(_texts, min_size=1, max_size=6))
@settings(deadline=None, max_examples=100)
def test_ratios_are_between_zero_and_one(texts):
  got = measure(texts)
  for name in RATIOS:
    assert math.isnan(got[name].value) or -1e-12 <= got[name].value <= 1 + 1e-12
    assert math.isnan(got[name].stderr) or got[name].stderr >= 0
  longest = max(len(tokens(text)) for text in texts)
  assert 0 <= got["unigram_entropy"].value <= math.log(max(longest, 1)) + 1e-12


@given(st.lists(_texts, min_size=2, max_size=5), st.randoms())
@settings(deadline=None, max_examples=30)
def test_the_order_of_the_texts_does_not_matter(texts, random):
  shuffled = random.sample(texts, len(texts))
  for a, b in zip(
    measure(texts).values(), measure(shuffled).values(), strict=True
  ):
    _same([a.value, a.stderr], [b.value, b.stderr])


# MARK: copying


def test_a_copy_is_found_whatever_its_case_and_white_space():
  index = ngrams.of(["One two, three four: five six seven."])  # 10 tokens
  copied = "ONE  two,\nthree four: five six"
  assert copied_share(index, [copied]).value == 1
  got = copied_share(index, [copied + " nine", copied])
  _same(got.value, 2 / 3)  # 2 runs of 8 in the first, 1 in the second
  _same(got.stderr, (1 - 1 / 2) / 2)
  assert got.n == 2


def test_no_run_of_eight_crosses_two_texts():
  first, second = "a b c d e f g h i", "j k l m n o p q r"
  index = ngrams.of([first, "x y", second, "z"])
  assert copied_share(index, [first, second]).value == 1
  _same(copied_share(index, [f"{first} {second}"]).value, 4 / 11)
  assert copied_share(index, ["h i x y j k l m"]).value == 0


def test_too_short_or_no_texts_have_no_share():
  index = ngrams.of(["a b c d e f g h"])
  for texts in ([], [""], ["a b c d e f g"], ["a", "b"]):
    got = copied_share(index, texts)
    assert math.isnan(got.value) and got.n == len(texts)
  assert copied_share(index, ["a b c d e f g", "a b c d e f g h"]).value == 1


@pytest.mark.parametrize("train", [[], [""], ["a b c"]])
def test_nothing_is_copied_from_too_short_a_text(train):
  assert copied_share(ngrams.of(train), ["a b c d e f g h"]).value == 0


def test_the_order_of_tokens_matters():
  index = ngrams.of(["a b c d e f g h"])
  assert copied_share(index, ["a b c d e f h g"]).value == 0
  assert copied_share(index, ["h g f e d c b a"]).value == 0
  assert copied_share(index, ["a a a a a a a a"]).value == 0


def test_an_unknown_token_is_no_known_one():
  index = ngrams.of(["a b c d e f g h"])
  for unknown in range(8):
    text = list("abcdefgh")
    text[unknown] = "x"
    assert copied_share(index, [" ".join(text)]).value == 0


def _eights(text):
  found = tokens(text)
  return [tuple(found[i : i + 8]) for i in range(len(found) - 7)]


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=40)
def test_the_share_is_as_defined(seed):
  random = np.random.default_rng(seed)
  draw = lambda: " ".join(random.choice(["x", "y"], random.integers(0, 40)))
  train, texts = [draw() for _ in range(3)], [draw() for _ in range(5)]
  known = {gram for text in train for gram in _eights(text)}
  grams = [_eights(text) for text in texts]
  found = [sum(g in known for g in of_text) for of_text in grams]
  got = copied_share(ngrams.of(train), texts)
  total = sum(map(len, grams))
  _same(got.value, sum(found) / total if total else math.nan)
  rest = [total - len(g) for g in grams]
  if min(rest) > 0:
    without = (sum(found) - np.array(found)) / rest
    _same(got.stderr, np.sqrt(4 * without.var()))


def test_hashes_do_not_collide():
  ids = np.arange(200_000, dtype=np.uint64)
  assert len(np.unique(ngrams.hashes_of_ids([ids]))) == len(ids) - 7


# MARK: other scripts

CHINESE = [
  "\u4ed6\u4eec\u5728\u8def\u4e0a\u8d70" + last
  for last in "\u7740\u4e86\u8fc7\u56de"
]


def test_found_A3_measures_make_sense_in_every_script():
  alike = measure(CHINESE)
  assert alike["distinct_1"].value == pytest.approx(10 / 28)
  assert alike["self_bleu_4"].value > 0.8
  same = measure(["\u7684" * 100] * 4)
  for n in (1, 2, 3, 4):
    _same(same[f"seq_rep_{n}"].value, 1 - 1 / (101 - n))
  _same(same["self_bleu_4"].value, 1)
  assert copied_share(ngrams.of(["".join(CHINESE)]), CHINESE[:1]).n == 1
  assert (
    copied_share(ngrams.of(["".join(CHINESE)]), ["".join(CHINESE)]).value == 1
  )
  assert tokens("\u091b\u094b\u091f\u0940 cafe\u0301") == [
    "\u091b\u094b\u091f\u0940",
    "cafe\u0301",
  ]
  for text in ("\u6211\u8d70\u3002" * 9, "\u0418\u0434\u0443. " * 9):
    grade = measure([text])["grade"]
    assert math.isnan(grade.value) and "English" in grade.reason


def test_no_other_language_has_a_grade():
  text = "The cat sat. It ran. It is here."
  assert measure([text])["grade"].reason is None
  assert "English" in measure([text], language="fr")["grade"].reason


# MARK: one's own


@pytest.fixture
def own():
  """A metric that is not of the package."""

  @metric("mean_words", "words of a text", "words")
  def mean_words(texts):
    return mean([len(text.split()) for text in texts], texts.documents)

  yield mean_words
  del METRICS._pieces["mean_words"]


def test_a_metric_of_your_own_is_measured_with_the_others(own):
  texts = ["one", "two words", "and three words"]
  found = measure(texts, documents=[1, 1, 2])
  assert list(found) == [*NAMES, "mean_words"]
  assert found["mean_words"] == mean([1, 2, 3], [1, 1, 2])
  plain = as_json(found)["mean_words"]
  assert plain["title"] == "words of a text, words" and plain["value"] == 2
  metric("mean_words", "words of a text", "words")(own)  # a module run again
  with pytest.raises(UserError, match="mean_words"):
    metric("mean_words", "another", "")(lambda texts: None)


def test_metrics_without_what_they_need_are_left_out():
  class Judge:
    name = "a judge"

    def nats_of(self, texts):
      return [2.0 * len(text) for text in texts]

  assert list(measure(["a b"])) == NAMES
  found = measure(["a b"], judge=Judge(), copies=ngrams.of(["a b c"]))
  assert found["judge_nll"].value == 2
  assert list(found)[-2:] == ["copied_8gram", "judge_nll"]
