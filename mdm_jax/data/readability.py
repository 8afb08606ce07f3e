"""How readable an English text is, by the formulas of Flesch and Kincaid.

Both count syllables. The packages for this look them up in a dictionary that
they download when first asked, so here a spelling rule estimates them.
"""

import re

import numpy as np
import regex
from jaxtyping import Num

# Of one text, or of many.
Count = int | Num[np.ndarray, "N"]

_LETTERS = regex.compile(r"\p{L}")
_LATIN = regex.compile(r"\p{Latin}")
_POSSESSIVE = re.compile("['\u2019]s?")
_VOWELS = re.compile("[aeiouy]+")
# A last e, es or ed, also before -ly, -ment and the like: made, times, useful.
_SILENT = re.compile(
  "(?:[^aeiouyl]e|[aeiouy]le|[^aeiouysxzcgh]es|[^aeioutdyl]ed|[aeiouy]l+ed)"
  "(?:ly|ments?|ness|ful)?$"
)
# Neighbours that are two syllables: period, being, but not nation, million.
_HIATUS = re.compile("(?<![cstgxln])i[aou]|[ey]ing")


def applies(text: str, language: str) -> bool:
  """Whether the formulas say something: English, most letters being Latin.

  A text without letters is no reason against it.
  """
  if language != "en":
    return False
  if text.isascii():
    return True
  letters = len(_LETTERS.findall(text))
  return 2 * len(_LATIN.findall(text)) >= letters


def syllables(word: str) -> int:
  """Estimates the syllables of a lower-case word: its groups of vowels."""
  word = _POSSESSIVE.sub("", word)
  groups = len(_VOWELS.findall(word)) + len(_HIATUS.findall(word))
  return max(groups - bool(_SILENT.search(word)), 1)


def reading_ease(words: Count, sentences: Count, syllables: Count):
  """Returns Flesch's reading ease from counts: 100 is easy, 0 hard.

  Source: Flesch 1948, A new readability yardstick.
  """
  return 206.835 - 1.015 * words / sentences - 84.6 * syllables / words


def grade(words: Count, sentences: Count, syllables: Count):
  """Returns the Flesch-Kincaid grade from counts: years of US school.

  Source: Kincaid et al. 1975, Derivation of new readability formulas.
  """
  return 0.39 * words / sentences + 11.8 * syllables / words - 15.59
