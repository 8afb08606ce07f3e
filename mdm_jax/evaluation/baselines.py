"""Baselines in bits per byte: an n-gram model and xz on the same text.

Bits per byte say little by themselves: even a model that is worse than counting
n-grams has a perplexity bound below 4 per byte.
"""

import concurrent.futures
import lzma
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mdm_jax.core.standard_errors import ratio
from mdm_jax.data.held_out import BYTES, DOCUMENT, ROW, SEGMENT, HeldOut
from mdm_jax.data.tokenizer import Tokenizer
from mdm_jax.evaluation.judge import NgramJudge
from mdm_jax.evaluation.running_text import in_reading_order, piece

# Most bytes of training and held-out text for xz, which takes some ten seconds.
_MOST_TRAIN = 12 * 2**20
_MOST_TEST = 4 * 2**20
# xz's dictionary, in bytes: covers both, so that all training text is used.
_WINDOW = 2**24
_POLL_SECONDS = 1.0


def baselines(
  train: Sequence[str],
  held: HeldOut,
  tokenizer: Tokenizer,
  ngrams: NgramJudge,
  poll: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, Any]]:
  """Returns bits per byte of held-out text under an n-gram model and xz.

  The text compressed is that decoded from the rows, which is what the model
  reads. Bytes are those of the original text, as for the model.

  Args:
    train: training text, of which xz gets the last part.
    held: held-out rows. If they are only some rows of a document, their texts
      are joined.
    tokenizer: tokenizer of the rows.
    ngrams: n-gram model of the same training text.
    poll: called about once a second while xz runs.

  Returns:
    By baseline: name, bits_per_byte, stderr over documents, and bytes.
  """
  documents, sizes = _documents(held, tokenizer)
  before = "\n".join(train).encode()[-_MOST_TRAIN:]
  text, counted = _test(documents, sizes)
  # xz of the held-out text given the training text: the bytes that it adds to
  # the compressed training text. lzma releases the GIL, so threads suffice.
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
      "bits_per_byte": found.value / math.log(2),
      "stderr": found.stderr / math.log(2),
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
  """Returns decoded documents, and the number of bytes of their originals."""
  ids: dict[int, list[np.ndarray]] = {}
  sizes: dict[int, int] = {}
  for line in in_reading_order(held).tolist():
    document, found = line[DOCUMENT], piece(held, line[ROW], line[SEGMENT])
    ids.setdefault(document, []).append(found)
    sizes[document] = sizes.get(document, 0) + line[BYTES]
  texts = [tokenizer.decode(np.concatenate(parts)) for parts in ids.values()]
  return texts, list(sizes.values())


def _test(texts: list[str], sizes: list[int]) -> tuple[bytes, int]:
  """Joins the first documents: up to `_MOST_TEST` bytes, but at least one.

  Returns:
    The text to compress, and the number of original bytes that it stands for.
  """
  taken, counted = [], 0
  for text, size in zip(texts, sizes, strict=True):
    if taken and counted + size > _MOST_TEST:
      break
    taken.append(text)
    counted += size
  # Begins with a newline, as it is compressed behind the training text.
  return "\n".join(["", *taken]).encode(), counted


def _compressed(text: bytes) -> int:
  """Returns the compressed size in bytes with xz's LZMA2, without a header."""
  filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": _WINDOW}]
  return len(lzma.compress(text, format=lzma.FORMAT_RAW, filters=filters))
