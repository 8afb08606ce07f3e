"""Documents with answers: which parts a model is given, and which it predicts.

Such a document is one string, so that it is split, hashed and stored like any
other. Four control characters divide it:

  prompt STX answer ETX prompt STX answer ETX ...

STX begins an answer. ETX ends one, and stands for the end-of-text id, which
belongs to the answer. ETB ends one without that id: a chat template has an end
of its own, which is in the answer. SUB ends one that is a hole in a text
(`holes.py`).
"""

import re
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int32

from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data.holes import Encoded, Holes
from mdm_jax.data.rows import Rows
from mdm_jax.data.tokenizer_base import Tokenizer

BEGIN, END, CLOSE, HOLE = "\x02", "\x03", "\x17", "\x1a"
_ENDS = END + CLOSE + HOLE
_ANSWER = re.compile(f"{BEGIN}([^{BEGIN}{_ENDS}]*)([{_ENDS}])")
_REMOVED = dict.fromkeys(map(ord, BEGIN + _ENDS))


def exchange(prompt: str, answer: str) -> str:
  """Returns a document of a prompt and its answer, with an end-of-text id.

  Example:
    >>> parts(exchange("2+3=", "5"))
    ('2+3=', '5\\x03')
  """
  return f"{prompt}{BEGIN}{answer}{END}"


def hole(before: str, answer: str, behind: str) -> str:
  """Returns a document whose answer is a hole with text on both sides."""
  return f"{before}{BEGIN}{answer}{HOLE}{behind}"


def has_marks(text: str) -> bool:
  """Returns whether a text has any of the four control characters."""
  return any(mark in text for mark in BEGIN + _ENDS)


def are_in(text: str) -> bool:
  """Returns whether a document has an answer."""
  # The first test is fast, and false for nearly all other text.
  return BEGIN in text and _ANSWER.search(text) is not None


def plain(text: str) -> str:
  """Returns a document's text without the control characters.

  A text without answers is returned as it is.
  """
  return without_marks(text) if are_in(text) else text


def without_marks(text: str) -> str:
  """Returns a text without any of the four control characters."""
  return text.translate(_REMOVED)


def until_last(text: str) -> str:
  """Returns a document up to the end of its last answer."""
  return text[: max(map(text.rfind, _ENDS)) + 1]


def parts(text: str) -> tuple[str, ...]:
  """Returns prompts and answers in turn, beginning with a prompt.

  A prompt may be empty; an answer keeps the character that ends it.
  """
  found, at = [], 0
  for answer in _ANSWER.finditer(text):
    found += [text[at : answer.start()], answer[1] + answer[2]]
    at = answer.end()
  return (*found, text[at:]) if text[at:] else tuple(found)


def encode(
  documents: Sequence[Sequence[str]],
  tokenizer: Tokenizer,
  answer_length: int | None = None,
  random: bool = False,
  holes: Holes | None = None,
) -> list[Encoded]:
  """Returns the ids of documents, divided into `parts`.

  Every part is encoded by itself, as a sampler encodes a prompt.

  Args:
    documents: the parts of each document.
    tokenizer: makes the ids.
    answer_length: tokens that the last answer is filled up to with end-of-text
      ids (None: it isn't).
    random: fill it up to a length between its own and `answer_length`, which
      depends on the document.
    holes: which holes are filled up (None: none are).
  """
  flat = [part for document in documents for part in document]
  # Names of special ids count in what a chat template writes. Prompts and
  # answers of such a document have none: `chat.py` refuses them.
  named = any(part.endswith(CLOSE) for part in flat)
  make = tokenizer.encode_with_names if named else tokenizer.encode_batch
  encoded = iter(make([part.rstrip(_ENDS) for part in flat]))
  vocab = tokenizer.vocab
  end = vocab.need("end") if answer_length else vocab.end
  return [
    _joined(document, encoded, end, answer_length, random, holes, vocab)
    for document in documents
  ]


def _joined(
  document: Sequence[str],
  encoded: Iterator[Int32[np.ndarray, "_"]],
  end: int | None,
  answer_length: int | None,
  random: bool,
  holes: Holes | None,
  vocab: Vocabulary,
) -> Encoded:
  ids, flags, size = [], [], 0
  # A hash, so that a document has the same rows in every process.
  place = zlib.crc32("".join(document).encode())
  untold, fits = holes is not None and holes.is_untold(place), True
  for number, part in enumerate(document):
    own, asked = next(encoded), number % 2 == 1
    if asked and part.endswith(END) and end is not None:
      own = np.append(own, np.int32(end))
    known = np.full(len(own), asked)
    size = len(own) if asked else size
    if untold and part.endswith(HOLE):
      fits &= size <= holes.length
      own, known = holes.filled(own, vocab)
    ids.append(own)
    flags.append(known)
  # An answer that something follows has the length that it has.
  if answer_length is not None and len(document) % 2 == 0:
    missing = max(answer_length - size, 0)
    if random:
      missing = place % (missing + 1)
    ids.append(np.full(missing, end, np.int32))
    flags.append(np.ones(missing, bool))
  return Encoded(
    np.concatenate(ids).astype(np.int32),
    np.concatenate(flags),
    fits and (answer_length is None or size <= answer_length),
  )


def last_answers(rows: Rows) -> list[tuple[int, int, int, int, int]]:
  """Returns the last answer of each text in rows.

  Returns:
    For each text with an answer: its row, and the positions where the text
    begins, the answer begins, the answer ends, and the text ends.
  """
  found = []
  segments, answer = np.asarray(rows.segments[:]), np.asarray(rows.answer)
  for row in range(len(rows)):
    for segment in range(1, int(segments[row].max(initial=0)) + 1):
      inside = np.flatnonzero(segments[row] == segment)
      asked = np.flatnonzero(answer[row, inside])
      if not len(asked):
        continue
      gaps = np.flatnonzero(np.diff(asked) > 1)
      first = asked[gaps[-1] + 1] if len(gaps) else asked[0]
      start, past = int(inside[0]), int(asked[-1]) + 1
      end = start + len(inside)
      found.append((row, start, start + int(first), start + past, end))
  return found
