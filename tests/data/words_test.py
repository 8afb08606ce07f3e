"""Words in every script, and the fast way is the general one."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdm_jax.data import words

# What stands between bars is one word.
WORDS = {
  "apostrophes": "Don\u2019t| |it's| '|quote|' x'",
  "marks": "cafe\u0301| |\u0635\u064e\u0628\u0627\u062d| na\u00efve",
  "hindi": "\u091b\u094b\u091f\u0940| |\u0932\u095c\u0915\u0940|\u0964",
  "joiners": "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645| co\u00adop",
  "chinese": "\u6211|\u4eec|\u662f| |NASA|\u7684|\u3002 |2024|\u5e74|\u3007",
  "japanese": "\u3053|\u308c|\u306f| |\u30da|\u30f3|\u30fc",
  "thai": "\u0e2a|\u0e27\u0e31|\u0e2a|\u0e14\u0e35",
  "lao": "\u0e81|\u0ead|\u0e87",
  "khmer": "\u1781\u17d2|\u1798\u17c2|\u179a",
  "myanmar": "\u1019\u103c|\u1014\u103a|\u1019\u102c",
  "tibetan": "\u0f56\u0f7c|\u0f51|\u0f0b",
  "korean": "\ud55c\uad6d\uc5b4| \ub2e8\uc5b4",
  "numbers": "1|,|000| |3|.|5| \u0967\u0968",
}


@pytest.mark.parametrize("name", WORDS)
def test_words_of_scripts(name):
  parts = WORDS[name].split("|")
  found = words.words("".join(parts))
  assert found == [p.strip(" '") for p in parts if any(map(str.isalnum, p))]


def test_an_underscore_divides():
  assert words.words("snake_case __x1__") == ["snake", "case", "x1"]


@pytest.mark.parametrize(
  "emoji",
  [
    "\U0001f469\u200d\U0001f469\u200d\U0001f467",
    "\U0001f44d\U0001f3fd",
    "\U0001f1e9\U0001f1ea",
  ],
)
def test_an_emoji_is_one_token(emoji):
  assert words.tokens(f"{emoji}{emoji} {emoji}, a") == [emoji] * 3 + [",", "a"]


def test_what_divides_invisibly_is_no_token():
  text = "\ufeff\u1781\u17d2\u200b\u1798\u17c2 a\u2060"
  assert words.tokens(text) == ["\u1781\u17d2", "\u1798\u17c2", "a\u2060"]


@given(st.text(st.characters(max_codepoint=0x2050)))
@settings(deadline=None, max_examples=300)
def test_plain_text_has_the_same_words_either_way(text):
  plain = "".join(c for c in text if words._PLAIN.fullmatch(c))
  assert words.words(plain) == words._WORDS.findall(plain)
  assert words.tokens(plain) == words._TOKENS.findall(plain)


def test_every_plain_character_is_the_same_either_way():
  every = map(chr, range(0x2060))
  for c in filter(words._PLAIN.fullmatch, every):
    for text in (c, f"a{c}b", f"1{c}{c}"):
      assert words.tokens(text) == words._TOKENS.findall(text)


@given(st.text())
@settings(deadline=None)
def test_tokens_hold_every_visible_character_and_all_words(text):
  found = words.tokens(text)
  visible = re.sub(r"[\s\u200b\u2060\ufeff]", "", text)
  assert re.sub("[\u200b\u2060\ufeff]", "", "".join(found)) == visible
  assert [t for t in found if words.words(t)] == words.words(text)


@pytest.mark.parametrize(
  "text, count",
  [
    ("One, two -- three re-do.", 5),
    ("na\u00efve \u2014 yes", 3),
    ("\u091b\u094b\u091f\u0940 \u0932\u095c\u0915\u0940 \u0939\u0948\u0964", 3),
    ("\u4f60\u597d\uff0c\u4e16\u754c\u3002", 4),
    ("\u6211\u7528 Python 3 \u5199 \u2014 \u4ee3\u7801\u3002", 7),
    ("", 0),
  ],
)
def test_words_that_stages_limit(text, count):
  assert words.count(text) == count


def test_what_is_no_word_counts_by_its_length():
  assert words.count("=" * 99) == words.count("_" * 99) == 1
  assert words.count("a" * 49) == 1 and words.count("a" * 50) == 8
  assert words.count("one " + "ACGT" * 100) == 1 + 400 // 6


@given(
  st.one_of(
    st.text(),
    st.lists(
      st.sampled_from(["a", "x\u0301", "\u7684", "\u0e2a\u0e31", " ", "\u3002"])
      | st.sampled_from(["\n", "--", "\x1f", "\u2003", "gattaca" * 9]),
    ).map("".join),
  )
)
@settings(deadline=None, max_examples=300)
def test_words_start_where_they_are_counted(text):
  starts = words.starts(text)
  assert len(starts) == words.count(text)
  assert starts == sorted(set(starts))
  assert not any(text[at].isspace() for at in starts)
