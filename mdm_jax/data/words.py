"""Words in any script, by Unicode's properties of characters.

A word is a run of letters and digits with the marks on them and apostrophes
inside. In scripts that put no spaces between words (those whose letters
Unicode's word boundaries leave to dictionaries, as of Chinese and Thai, beside
Katakana and Tibetan) each letter with its marks is a word. Numbers are divided
at points and commas, and names at underscores, where Unicode's boundaries
(UAX 29) join them.
"""

import re

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
  without spaces, letters, and what else stands there if it has a letter.
  """
  if text.isascii():
    return len(text.split())
  rest, letters = _UNSPACED.subn(" ", text)
  if not letters:
    return len(text.split())
  return letters + sum(bool(_WORDS.search(word)) for word in rest.split())
