"""Finds and counts words in any script, by Unicode character properties.

A word is a run of letters and digits, with the marks on them and apostrophes
inside. In scripts without spaces between words (those in which Unicode's word
boundaries need a dictionary, such as Chinese and Thai, and also Katakana and
Tibetan) each letter with its marks is a word. Unlike Unicode's boundaries (UAX
29), points and commas divide numbers, and underscores divide names.
"""

import re
from collections.abc import Sequence

import regex

# Text in which `re` finds the same words as `regex`, in half the time: no
# marks, no script without spaces, nothing invisible except spaces.
_PLAIN = re.compile(r"[\x00-\xac\xae-\u02ff\u2010-\u2027\u2030-\u205e]*")
_PLAIN_WORD = r"[^\W_]+(?:['\u2019][^\W_]+)*"
_PLAIN_WORDS = re.compile(_PLAIN_WORD)
_PLAIN_TOKENS = re.compile(rf"{_PLAIN_WORD}|[^\w\s]|_")

# Marks and joiners, which stay with the letter before them.
_ON = r"[\p{M}\p{WB=Extend}\p{WB=Format}\p{WB=ZWJ}]*"
# Letters that are a word each.
_ALONE = r"[[\p{WB=Other}\p{scx=Hira}\p{scx=Kana}\p{scx=Tibt}]&&[\p{L}\p{Nl}]]"
_RUN = rf"(?:[[\p{{L}}\p{{N}}]--{_ALONE}]{_ON})+"
_WORD = rf"{_ALONE}{_ON}|{_RUN}(?:['\u2019]{_RUN})*"
# A flag is two characters; an emoji may be several that are joined.
_OTHER = (
  rf"\p{{RI}}{{2}}|[^\s\x1c-\x1f\u200b\u2060\ufeff]{_ON}"
  rf"(?:(?<=\u200d)\p{{ExtPict}}{_ON})*"
)
_WORDS = regex.compile(rf"(?V1){_WORD}")
_TOKENS = regex.compile(rf"(?V1){_WORD}|{_OTHER}")
_UNSPACED = regex.compile(rf"(?V1){_ALONE}{_ON}")
_COUNTED = regex.compile(rf"(?V1){_ALONE}{_ON}|(?:(?!{_ALONE})[^\s\x1c-\x1f])+")
# Runs of this length are no words but genes or encoded data; every 6 characters
# of them count as one.
_LONGEST = 50
_LONG = re.compile(rf"[^\W_]{{{_LONGEST}}}")
_IN_RUN = 6
_BETWEEN_SPACES = re.compile(r"\S+")


def words(text: str) -> list[str]:
  """Returns the words of a text, in their original case."""
  if _PLAIN.fullmatch(text):
    return _PLAIN_WORDS.findall(text)
  return _WORDS.findall(text)


def tokens(text: str) -> list[str]:
  """Returns the words of a text and every other visible character, in order.

  Marks stay with their character, and the parts of an emoji stay together.
  """
  if _PLAIN.fullmatch(text):
    return _PLAIN_TOKENS.findall(text)
  return _TOKENS.findall(text)


def count(text: str) -> int:
  """Returns the number of words, as a stage's word limits count them.

  Words are separated by white space, so `re-do` and `--` are one each. In
  scripts without spaces every letter is a word, and runs between them are if
  they have a letter or digit. A run of 50 letters and digits or more counts as
  one word per 6 characters.

  Example:
    >>> count("We the People -- 1787"), count("ACGT" * 100)
    (5, 66)
  """
  rest, letters = text, 0
  if not text.isascii():
    rest, letters = _UNSPACED.subn(" ", text)
  found = rest.split()
  if letters:
    found = [word for word in found if _WORDS.search(word)]
  # Nearly always true, and much cheaper than the search below.
  if max(map(len, found), default=0) < _LONGEST:
    return letters + len(found)
  return letters + sum(len(_in_run(word)) for word in found)


def _in_run(run: str) -> range:
  """Returns where words begin in a run of characters without spaces."""
  if len(run) < _LONGEST or not _LONG.search(run):
    return range(1)
  return range(0, len(run) - len(run) % _IN_RUN, _IN_RUN)


def starts(text: str) -> list[int]:
  """Returns where each word begins, for the same words as in `count`."""
  found = _BETWEEN_SPACES.finditer(text)
  if not text.isascii() and _UNSPACED.search(text):
    runs = _COUNTED.finditer(text)
    found = (run for run in runs if _WORDS.search(run[0]))
  return [run.start() + at for run in found for at in _in_run(run[0])]


def share_of_runs(texts: Sequence[str]) -> float:
  """Returns the share of characters in runs too long to be words."""
  long = sum(
    len(run)
    for text in texts
    for run in text.split()
    if len(run) >= _LONGEST and _LONG.search(run) and not _UNSPACED.search(run)
  )
  return long / max(sum(map(len, texts)), 1)
