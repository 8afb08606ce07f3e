"""Readability of English text, by the formulas of Flesch and Kincaid.

Both need syllable counts. Packages such as textstat look syllables up in a
dictionary that they download; a spelling rule estimates them here.
"""

import re

import numpy as np
import regex
from jaxtyping import Num

# A count of one text, or of each of many.
Count = int | Num[np.ndarray, "N"]

_LETTERS = regex.compile(r"\p{L}")
_LATIN = regex.compile(r"\p{Latin}")
_POSSESSIVE = re.compile("['\u2019]s?")
_VOWELS = re.compile("[aeiouy]+")
# A silent e, es or ed, alone or before -ly, -ment, ...: made, times, useful.
_SILENT = re.compile(
  "(?:[^aeiouyl]e|[aeiouy]le|[^aeiouysxzcgh]es|[^aeioutdyl]ed|[aeiouy]l+ed)"
  "(?:ly|ments?|ness|ful)?$"
)
# Adjacent vowels in separate syllables: period, being; not nation, million.
_HIATUS = re.compile("(?<![cstgxln])i[aou]|[ey]ing")


def applies(text: str, language: str) -> bool:
  """Whether the formulas apply: English, and at least half Latin letters.

  Text without letters passes.
  """
  if language != "en":
    return False
  if text.isascii():
    return True
  letters = len(_LETTERS.findall(text))
  return 2 * len(_LATIN.findall(text)) >= letters


def syllables(word: str) -> int:
  """Estimates the syllables of a lower-case word by its groups of vowels.

  Example:
    >>> syllables("readability"), syllables("made")
    (5, 1)
  """
  word = _POSSESSIVE.sub("", word)
  groups = len(_VOWELS.findall(word)) + len(_HIATUS.findall(word))
  return max(groups - bool(_SILENT.search(word)), 1)


def reading_ease(words: Count, sentences: Count, syllables: Count):
  """Returns Flesch's reading ease: about 100 for easy text, 0 for hard text.

  Source: Flesch 1948, A new readability yardstick.
  """
  return 206.835 - 1.015 * words / sentences - 84.6 * syllables / words


def grade(words: Count, sentences: Count, syllables: Count):
  """Returns the Flesch-Kincaid grade: years of US school needed to follow.

  Source: Kincaid et al. 1975, Derivation of new readability formulas.
  """
  return 0.39 * words / sentences + 11.8 * syllables / words - 15.59
