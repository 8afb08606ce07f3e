"""Byte pair encoding as GPT-2's, from its file of merges.

A text is divided into words by a pattern, and the bytes of a word are joined
pair by pair, the pair that comes first in the file before all others. Source:
Radford et al. 2019, Language models are unsupervised multitask learners, 2.2;
Sennrich et al. 2016, arXiv 1508.07909.
"""

import functools
from collections.abc import Sequence

import regex

from mdm_jax.core.errors import UserError

_WORD = regex.compile(
  r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)
_HEADER = "#version"
_MOST_WORDS = 2**17  # whose ids are kept: most words of a text come again


class BytePairs:
  """The pieces of a byte pair encoding, and how text becomes their ids.

  Ids are GPT-2's: its 256 bytes, then what each merge makes, in order.

  Attributes:
    pieces: the bytes that each id stands for.
  """

  def __init__(self, merges: Sequence[str]):
    """Reads merges.

    Args:
      merges: each two symbols with a space between them, as in the file.

    Raises:
      UserError: a merge is not of two symbols that are known by then.
    """
    symbols = byte_symbols()
    ids = {symbol: i for i, symbol in enumerate(symbols)}
    pieces = list(symbols.values())
    self._ranks: dict[tuple[int, int], tuple[int, int]] = {}
    for rank, merge in enumerate(merges):
      pair = merge.split(" ")
      if len(pair) != 2 or not all(symbol in ids for symbol in pair):
        raise UserError(f"merge {rank + 1}, {merge!r}, is not of known symbols")
      first, second = (ids[symbol] for symbol in pair)
      joined = ids.setdefault("".join(pair), len(pieces))
      if joined == len(pieces):
        pieces.append(pieces[first] + pieces[second])
      self._ranks[first, second] = rank, joined
    self.pieces = tuple(pieces)
    self._bytes = [0] * 256
    for i, piece in enumerate(symbols.values()):
      self._bytes[piece[0]] = i
    self._word = functools.lru_cache(_MOST_WORDS)(self._encode_word)

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text."""
    return [i for word in _WORD.findall(text) for i in self._word(word)]

  def _encode_word(self, word: str) -> tuple[int, ...]:
    ids = [self._bytes[byte] for byte in word.encode()]
    last = (len(self._ranks), -1)
    while len(ids) > 1:
      pairs = zip(ids, ids[1:], strict=False)
      ranks = [self._ranks.get(pair, last) for pair in pairs]
      best = rank, joined = min(ranks)
      if rank == last[0]:
        break
      # Every occurrence, from the left; one that overlaps it is gone then.
      found, i = [], 0
      while i < len(ids):
        here = i < len(ranks) and ranks[i] == best
        found.append(joined if here else ids[i])
        i += 2 if here else 1
      ids = found
    return tuple(ids)


def read_merges(content: str) -> list[str]:
  """Returns the merges of a file such as merges.txt or vocab.bpe."""
  lines = (line.rstrip("\r") for line in content.split("\n"))
  return [line for line in lines if line and not line.startswith(_HEADER)]


def byte_symbols() -> dict[str, bytes]:
  """Returns the character that the file writes for each byte, in id order."""
  shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
  hidden = [byte for byte in range(256) if byte not in shown]
  named = [(chr(byte), byte) for byte in shown]
  # Bytes that can't be seen, or would be taken for a space, are written as
  # characters from U+0100 on.
  named += [(chr(256 + n), byte) for n, byte in enumerate(hidden)]
  return {symbol: bytes([byte]) for symbol, byte in named}
