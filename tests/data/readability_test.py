"""Readability: true syllables, the formulas by hand, arrays as numbers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdm_jax.data import readability
from mdm_jax.data import words as words_lib

# The words that begin the Gettysburg Address, by their syllables.
ADDRESS = {
  1: "four score and years our brought forth on this a new in to the that all"
  " men are now we great war or so can long",
  2: "seven ago fathers nation conceived equal engaged civil testing whether"
  " any endure",
  3: "continent liberty created",
  4: "dedicated proposition",
}
ENDINGS = {
  1: "made times asked called eye's through played don't",
  2: "useful people being wanted houses lonely movement judges",
  3: "beautiful government period separate however",
  5: "administration",
}
# The spelling doesn't tell: (syllables, what the rule says).
WRONG = {
  "rhythm": (2, 1),
  "poem": (2, 1),
  "science": (2, 1),
  "create": (2, 1),
  "idea": (3, 2),
  "society": (4, 3),
  "every": (2, 3),
  "business": (2, 3),
  "nineteen": (2, 3),
  "carefully": (3, 4),
}


def _wrong(by_count):
  return [
    word
    for count, words in by_count.items()
    for word in words.split()
    if readability.syllables(word) != count
  ]


def test_syllables_of_a_running_text():
  assert sum(len(words.split()) for words in ADDRESS.values()) == 43
  assert _wrong(ADDRESS) == ["created"]


def test_syllables_of_endings():
  assert _wrong(ENDINGS) == []


@pytest.mark.parametrize("word", WRONG)
def test_syllables_that_the_rule_gets_wrong(word):
  true, said = WRONG[word]
  assert readability.syllables(word) == said != true


@given(st.text())
def test_a_word_has_a_syllable(text):
  words = words_lib.words(text.lower())
  assert all(readability.syllables(word) >= 1 for word in words)


@pytest.mark.parametrize(
  "text, applies",
  [
    ("A caf\u00e9.", True),
    ("\u2014 12", True),
    ("\u5728 Python", True),
    ("\u5728\u8def\u4e0a\u8d70\u7740 Go", False),
  ],
)
def test_the_formulas_are_for_latin_letters_and_english(text, applies):
  assert readability.applies(text, "en") == applies
  assert not readability.applies(text, "de")


def test_formulas_by_hand():
  # "The cat sat on the mat.": 6 words, 1 sentence, 6 syllables.
  text = "The cat sat on the mat."
  words = words_lib.words(text.lower())
  counts = len(words), 1, sum(map(readability.syllables, words))
  assert counts == (6, 1, 6)
  assert readability.reading_ease(*counts) == pytest.approx(116.145)
  assert readability.grade(*counts) == pytest.approx(-1.45)


def test_a_harder_sentence_by_hand():
  # 5 words, 1 sentence, 2 + 3 + 4 + 1 + 3 syllables.
  text = "Fathers separate proposition from liberty."
  words = words_lib.words(text.lower())
  syllables = sum(map(readability.syllables, words))
  assert (len(words), syllables) == (5, 13)
  assert readability.reading_ease(5, 1, 13) == pytest.approx(-18.2)
  assert readability.grade(5, 1, 13) == pytest.approx(17.04)


def test_many_texts_are_as_one_by_one():
  counts = np.array([[6, 1, 6], [5, 1, 13], [40, 3, 61]])
  for formula in (readability.reading_ease, readability.grade):
    alone = [formula(*map(int, row)) for row in counts]
    np.testing.assert_allclose(formula(*counts.T), alone)
