"""Words in any script, by Unicode's properties of characters.

A word is a run of letters and digits with the marks on them and apostrophes
inside. In scripts that put no spaces between words (those whose letters
Unicode's word boundaries leave to dictionaries, as of Chinese and Thai, beside
Katakana and Tibetan) each letter with its marks is a word. Numbers are divided
at points and commas, and names at underscores, where Unicode's boundaries
(UAX 29) join them.
"""

import re
from collections.abc import Sequence

import regex

# What `re` and `regex` find the same words in: no marks, no such script, and
# nothing invisible but spaces. `re` takes half the time.
_PLAIN = re.compile(r"[\x00-\xac\xae-\u02ff\u2010-\u2027\u2030-\u205e]*")
_PLAIN_WORD = r"[^\W_]+(?:['\u2019][^\W_]+)*"
_PLAIN_WORDS = re.compile(_PLAIN_WORD)
_PLAIN_TOKENS = re.compile(rf"{_PLAIN_WORD}|[^\w\s]|_")

_ON = r"[\p{M}\p{WB=Extend}\p{WB=Format}\p{WB=ZWJ}]*"  # stays on its letter
_ALONE = r"[[\p{WB=Other}\p{scx=Hira}\p{scx=Kana}\p{scx=Tibt}]&&[\p{L}\p{Nl}]]"
_RUN = rf"(?:[[\p{{L}}\p{{N}}]--{_ALONE}]{_ON})+"
_WORD = rf"{_ALONE}{_ON}|{_RUN}(?:['\u2019]{_RUN})*"
# A flag is two characters; an emoji may be several with joiners.
_OTHER = (
  rf"\p{{RI}}{{2}}|[^\s\x1c-\x1f\u200b\u2060\ufeff]{_ON}"
  rf"(?:(?<=\u200d)\p{{ExtPict}}{_ON})*"
)
_WORDS = regex.compile(rf"(?V1){_WORD}")
_TOKENS = regex.compile(rf"(?V1){_WORD}|{_OTHER}")
_UNSPACED = regex.compile(rf"(?V1){_ALONE}{_ON}")
_COUNTED = regex.compile(rf"(?V1){_ALONE}{_ON}|(?:(?!{_ALONE})[^\s\x1c-\x1f])+")
# What is no word: genes, encoded data. Each 6 characters count as one.
_LONGEST = 50
_LONG = re.compile(rf"[^\W_]{{{_LONGEST}}}")
_IN_RUN = 6
_BETWEEN_SPACES = re.compile(r"\S+")


def words(text: str) -> list[str]:
  """Returns the words of a text, in their case, without punctuation."""
  if _PLAIN.fullmatch(text):
    return _PLAIN_WORDS.findall(text)
  return _WORDS.findall(text)


def tokens(text: str) -> list[str]:
  """Returns the words of a text, and between them each visible character.

  What stays on a character belongs to it: marks, and the parts of an emoji.
  """
  if _PLAIN.fullmatch(text):
    return _PLAIN_TOKENS.findall(text)
  return _TOKENS.findall(text)


def count(text: str) -> int:
  """Returns how many words a text has where stages limit them.

  Words are what stands between white space, as `re-do` and `--`; in scripts
  without spaces, letters, and what else stands there if it has a letter. If 50
  letters and digits stand together, every 6 characters are a word.
  """
  rest, letters = text, 0
  if not text.isascii():
    rest, letters = _UNSPACED.subn(" ", text)
  found = rest.split()
  if letters:
    found = [word for word in found if _WORDS.search(word)]
  if max(map(len, found), default=0) < _LONGEST:
    return letters + len(found)
  return letters + sum(len(_in_run(word)) for word in found)


def _in_run(run: str) -> range:
  """Where the words in a run of characters begin."""
  if len(run) < _LONGEST or not _LONG.search(run):
    return range(1)
  return range(0, len(run) - len(run) % _IN_RUN, _IN_RUN)


def starts(text: str) -> list[int]:
  """Returns where each word begins that `count` counts."""
  found = _BETWEEN_SPACES.finditer(text)
  if not text.isascii() and _UNSPACED.search(text):
    runs = _COUNTED.finditer(text)
    found = (run for run in runs if _WORDS.search(run[0]))
  return [run.start() + at for run in found for at in _in_run(run[0])]


def share_of_runs(texts: Sequence[str]) -> float:
  """Returns the share of the characters that are in runs that are no words."""
  long = 0
  for text in texts:
    found = text.split()
    if max(map(len, found), default=0) >= _LONGEST:
      runs = (run for run in found if len(run) >= _LONGEST)
      long += sum(
        len(run)
        for run in runs
        if _LONG.search(run) and not _UNSPACED.search(run)
      )
  return long / max(sum(map(len, texts)), 1)
