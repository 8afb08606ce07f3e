"""What others need for the same text: bits a byte of n-grams and of xz.

A bound per byte says little by itself: a model worse than counting n-grams
still passes four choices a byte.
"""

import concurrent.futures
import lzma
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mdm_jax.core.standard_errors import ratio
from mdm_jax.data.held_out import DOCUMENT, PIECE, ROW, SEGMENT, HeldOut
from mdm_jax.data.tokenizer import Tokenizer
from mdm_jax.evaluation.judge import NgramJudge

_MOST_TRAIN = 12 * 2**20  # bytes that xz is given: some ten seconds
_MOST_TEST = 4 * 2**20
_WINDOW = 2**24  # bytes back that xz finds repetitions in
_POLL_SECONDS = 1.0


def baselines(
  train: Sequence[str],
  held: HeldOut,
  tokenizer: Tokenizer,
  ngrams: NgramJudge,
  poll: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, Any]]:
  """Returns bits per byte of held-out rows, by who compresses them.

  What is compressed is the text that the rows spell, as the model reads it;
  bytes are those of the original text, as they are for the model.

  Args:
    train: what was trained on; xz is given the last part of it.
    held: the text; of rows that are not all, their texts of one document are
      read one after the other.
    tokenizer: of its rows.
    ngrams: counted on the same training text.
    poll: called as long as it takes.

  Returns:
    Name, bits_per_byte, bytes, and the standard error over documents where
    there is one; None for a number that there is not.
  """
  documents, sizes = _documents(held, tokenizer)
  before, after = _last("\n".join(train).encode()), _test(documents, sizes)
  text, counted = after
  with concurrent.futures.ThreadPoolExecutor(2) as threads:
    given = threads.submit(_compressed, before)
    both = threads.submit(_compressed, before + text)
    nats = [ngrams.nats(document) for document in documents]
    for future in (given, both):
      while not future.done():
        concurrent.futures.wait([future], _POLL_SECONDS)
        poll()
  bits = 8 * (both.result() - given.result())
  found = ratio(nats, sizes)
  of = sum(len(text.encode()) for text in train)
  part = f" ({len(before) / 1e6:,.1f} of {of / 1e6:,.1f} MB)"
  name = "xz, given the training text"
  return {
    "ngram": {
      "name": ngrams.name,
      "bits_per_byte": _number(found.value / math.log(2)),
      "stderr": _number(found.stderr / math.log(2)),
      "bytes": int(sum(sizes)),
    },
    "xz": {
      "name": name + (part if len(before) < of else ""),
      "bits_per_byte": bits / counted if counted else None,
      "stderr": None,
      "bytes": counted,
    },
  }


def _documents(
  held: HeldOut, tokenizer: Tokenizer
) -> tuple[list[str], list[int]]:
  """Returns the documents as the rows spell them, and their original bytes."""
  reading = np.lexsort((held.texts[:, PIECE], held.texts[:, DOCUMENT]))
  ids: dict[int, list[np.ndarray]] = {}
  sizes: dict[int, int] = {}
  for line in held.texts[reading].tolist():
    row, document = line[ROW], line[DOCUMENT]
    tokens = np.asarray(held.rows.tokens[row])
    inside = np.asarray(held.rows.segments[row]) == line[SEGMENT]
    ids.setdefault(document, []).append(tokens[inside])
    sizes[document] = sizes.get(document, 0) + line[3]
  texts = [tokenizer.decode(np.concatenate(parts)) for parts in ids.values()]
  return texts, list(sizes.values())


def _last(text: bytes) -> bytes:
  return text[-_MOST_TRAIN:]


def _test(texts: list[str], sizes: list[int]) -> tuple[bytes, int]:
  """Returns the first documents up to a size, and their original bytes."""
  taken, counted = [], 0
  for text, size in zip(texts, sizes, strict=True):
    if taken and counted + size > _MOST_TEST:
      break
    taken.append(text)
    counted += size
  return "\n".join(["", *taken]).encode(), counted


def _compressed(text: bytes) -> int:
  """Returns the bytes of a text by xz's method (LZMA2), without a header."""
  filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": _WINDOW}]
  return len(lzma.compress(text, format=lzma.FORMAT_RAW, filters=filters))


def _number(value: float) -> float | None:
  return value if math.isfinite(value) else None
