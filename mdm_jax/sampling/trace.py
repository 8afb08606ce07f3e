"""Saves and loads samples with their sampling path, and spells their tokens.

Arrays and files count steps from 0, as `Samples` does.
"""

import codecs
import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from mdm_jax.core import files, strict_json
from mdm_jax.core.errors import StorageError, UserError
from mdm_jax.data.tokenizer import Tokenizer
from mdm_jax.sampling.order_statistics import OrderStatistic, order_statistics
from mdm_jax.sampling.samples import ARRAYS, Samples

# Control characters except tab and newline, and lone surrogates.
_UNSEEN = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_END, _SEPARATOR, _UNUSED = (
  "\u27e8end\u27e9",
  "\u27e8sep\u27e9",
  "\u27e8?\u27e9",
)

Json = dict[str, Any]


# MARK: files


def save(
  samples: Samples,
  tokenizer: Tokenizer,
  settings: Json,
  pages: Mapping[str, str],
  folder: epath.PathLike,
) -> None:
  """Writes samples.npz, samples.json and pages that show them into a folder.

  The .npz holds the arrays of `Samples`. The .json holds settings, texts, the
  final tokens as strings, denoiser calls and order statistics, with null for
  undefined numbers. Every file is written atomically, and `load` detects two
  files of different samples.

  Args:
    samples: what to save.
    tokenizer: the one that decoded them.
    settings: how they were drawn.
    pages: contents by file name, such as samples.html; see
      `evaluation/pages/samples.py` and `picture.py`.
    folder: created if missing.

  Raises:
    StorageError: the folder can't be written, or the disk is full.
  """
  arrays = io.BytesIO()
  values = {name: getattr(samples, name) for name in ARRAYS}
  np.savez_compressed(arrays, **values)
  statistics = order_statistics(samples, tokenizer.vocab)
  saved = {
    "settings": settings,
    "texts": samples.texts,
    "pieces": [spell(ids.tolist(), tokenizer) for ids in samples.path[-1]],
    "calls": samples.calls.tolist(),
    "put_back": samples.put_back.tolist(),
    "order": {name: _plain(found) for name, found in statistics.items()},
    "tokenizer_sha256": tokenizer.sha256,
    # By which `load` knows that both files are of the same samples.
    "arrays_sha256": hashlib.sha256(arrays.getvalue()).hexdigest(),
  }
  layout = {"indent": 1, "ensure_ascii": False, "default": _as_json}
  text = strict_json.dumps(saved, **layout) + "\n"
  folder = epath.Path(folder)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    files.write(folder / "samples.npz", arrays.getvalue())
    # backslashreplace writes a lone surrogate as an escape that JSON can read.
    files.write(folder / "samples.json", text.encode(errors="backslashreplace"))
    for name, page in pages.items():
      files.write(folder / name, page.encode())
  except OSError as error:
    raise StorageError(f"{folder}: {error.strerror}") from error


def load(folder: epath.PathLike) -> tuple[Samples, Json]:
  """Returns the samples and the settings that `save` wrote.

  Settings are as JSON returns them: tuples have become lists.

  Raises:
    UserError: a file is missing, damaged, or belongs to other samples.
  """
  folder = epath.Path(folder)
  try:
    content = (folder / "samples.npz").read_bytes()
    saved = json.loads((folder / "samples.json").read_bytes())
    if saved["arrays_sha256"] != hashlib.sha256(content).hexdigest():
      raise UserError(f"{folder}: samples.npz and samples.json do not match")
    # A pickle in a file of someone else's could run code.
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
      values = {name: arrays[name] for name in ARRAYS}
    return Samples(texts=saved["texts"], **values), saved["settings"]
  except FileNotFoundError as error:
    raise UserError(
      f"{folder} holds no samples.npz and samples.json"
    ) from error
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f"{folder}/samples.json is damaged") from error


def _plain(found: OrderStatistic) -> Json:
  return {
    "mean": round(found.mean, 6),
    "random": round(found.random_mean, 6),
    "rows": found.rows.round(6).tolist(),
  }


def _as_json(value: Any) -> Any:
  return value.tolist() if hasattr(value, "tolist") else str(value)


# MARK: tokens as text


def spell(ids: Sequence[int], tokenizer: Tokenizer) -> list[str | None]:
  """Returns the text of each token; None for MASK and "" for PAD.

  A character that spans several byte tokens appears at the last of them;
  invalid UTF-8 becomes U+FFFD.
  """
  vocab = tokenizer.vocab
  named = {vocab.end: _END, vocab.separator: _SEPARATOR}
  named |= {vocab.pad: "", vocab.mask: None}
  # Incremental, as a character may span several byte tokens.
  decoder = codecs.getincrementaldecoder("utf-8")("replace")
  found: list[str | None] = []
  for i in ids:
    if piece := tokenizer.pieces[i]:
      found.append(decoder.decode(piece))
      continue
    _finish(decoder, found)
    found.append(named.get(i, _UNUSED))
  _finish(decoder, found)
  return found


def _finish(
  decoder: codecs.IncrementalDecoder, found: list[str | None]
) -> None:
  """Appends the rest of an incomplete character to the previous token."""
  if left := decoder.decode(b"", final=True):
    found[-1] += left
  decoder.reset()


def visible(text: str) -> str:
  """Replaces control characters, which a terminal could execute, by symbols."""
  symbol = lambda c: chr(0x2400 + ord(c)) if c < " " else "\ufffd"
  return _UNSEEN.sub(lambda found: symbol(found[0]), text)
