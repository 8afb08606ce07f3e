"""Saves and loads samples with their sampling path, and renders it as HTML.

Arrays and files count steps from 0, as `Samples` does. Pages for people count
them from 1, and 0 is the canvas before the first step.
"""

import codecs
import hashlib
import html
import importlib.resources
import io
import json
import math
import re
import string
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from etils import epath

from mdm_jax.core import files, strict_json
from mdm_jax.core.errors import StorageError, UserError
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data.tokenizer import Tokenizer
from mdm_jax.sampling.generate import Samples
from mdm_jax.sampling.order_statistics import (
  MEANING,
  OrderStatistic,
  order_statistics,
)

_ARRAYS = ("path", "step", "confidence", "entropy", "calls", "put_back")
_MOST_TEXTS = 16  # shown on a page
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
  samples: Samples, tokenizer: Tokenizer, settings: Json, folder: epath.PathLike
) -> None:
  """Writes samples.npz, samples.json and samples.html into a folder.

  The .npz holds the arrays of `Samples`. The .json holds settings, texts, the
  final tokens as strings, denoiser calls and order statistics, with null for
  undefined numbers. Every file is written atomically, and `load` detects two
  files of different samples.

  Args:
    samples: what to save.
    tokenizer: the one that decoded them.
    settings: how they were drawn.
    folder: created if missing.

  Raises:
    StorageError: the folder can't be written, or the disk is full.
  """
  arrays = io.BytesIO()
  values = {name: getattr(samples, name) for name in _ARRAYS}
  np.savez_compressed(arrays, **values)
  statistics = order_statistics(samples, tokenizer.vocab)
  told = {
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
  text = strict_json.dumps(told, **layout) + "\n"
  page = render_page(samples, tokenizer, settings)
  folder = epath.Path(folder)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    files.write(folder / "samples.npz", arrays.getvalue())
    # backslashreplace writes a lone surrogate as an escape that JSON can read.
    files.write(folder / "samples.json", text.encode(errors="backslashreplace"))
    files.write(folder / "samples.html", page.encode())
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
    told = json.loads((folder / "samples.json").read_bytes())
    if told["arrays_sha256"] != hashlib.sha256(content).hexdigest():
      raise UserError(f"{folder}: samples.npz and samples.json do not match")
    # A pickle in a file of someone else's could run code.
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
      values = {name: arrays[name] for name in _ARRAYS}
    return Samples(texts=told["texts"], **values), told["settings"]
  except FileNotFoundError as error:
    raise UserError(
      f"{folder} holds no samples.npz and samples.json"
    ) from error
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f"{folder}/samples.json is damaged") from error


def _plain(found: OrderStatistic) -> Json:
  number = lambda x: round(x, 6) if math.isfinite(x) else None
  return {
    "mean": number(found.mean),
    "random": number(found.random_mean),
    "rows": [number(x) for x in found.rows.tolist()],
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


# MARK: the page


def render_page(samples: Samples, tokenizer: Tokenizer, settings: Json) -> str:
  """Returns a self-contained HTML page that replays the sampling of each text.

  Of more than 16 texts it shows the first 16.
  """
  statistics = order_statistics(samples, tokenizer.vocab)
  count, steps = len(samples.texts), len(samples.path) - 1
  shown = min(count, _MOST_TEXTS)
  of = f"{count} text" + "s" * (count != 1)
  rows = [_text(samples, tokenizer, statistics, i) for i in range(shown)]
  parts = {
    "count": _join([of if shown == count else f"{shown} of {of}"]),
    "steps": _join([steps]),
    "texts": _join(rows),
    "order": _order_table(statistics),
    "settings": _facts(settings, "settings"),
  }
  page = importlib.resources.files(__package__) / "trace_page.html"
  return string.Template(page.read_text("utf-8")).substitute(parts)


class _Html(str):
  """HTML markup; `_join` escapes any other string."""


def _join(parts: Iterable[Any]) -> _Html:
  safe = lambda p: html.escape(visible(str(p)))
  return _Html("".join(p if isinstance(p, _Html) else safe(p) for p in parts))


def _el(tag: str, *children: Any, **attributes: Any) -> _Html:
  """Returns an element; the attribute of `data_step` is data-step."""
  written = "".join(
    f' {name.rstrip("_").replace("_", "-")}="{_join([value])}"'
    for name, value in attributes.items()
  )
  return _Html(f"<{tag}{written}>{_join(children)}</{tag}>")


def _facts(pairs: Json, class_: str) -> _Html:
  items = [_el("div", _el("dt", k), _el("dd", v)) for k, v in pairs.items()]
  return _el("dl", *items, class_=class_)


def _number(value: float) -> str:
  # Adding 0 turns -0.0 into 0.0.
  return f"{round(value, 2) + 0:.2f}" if math.isfinite(value) else "\u2013"


def _order_table(statistics: dict[str, OrderStatistic]) -> _Html:
  top = ("measure", "these texts", "in random order")
  rows = [
    _el(
      "tr",
      _el(
        "th", name.replace("_", " "), _el("small", MEANING[name]), scope="row"
      ),
      _el("td", _number(found.mean)),
      _el("td", _number(found.random_mean)),
    )
    for name, found in statistics.items()
  ]
  head = _el("tr", *[_el("th", cell, scope="col") for cell in top])
  return _el("table", _el("thead", head), _el("tbody", *rows))


def _text(
  samples: Samples,
  tokenizer: Tokenizer,
  statistics: dict[str, OrderStatistic],
  row: int,
) -> _Html:
  """Returns a text's numbers and its final tokens."""
  spelt = [spell(ids, tokenizer) for ids in samples.path[:, row].tolist()]
  places = enumerate(zip(*spelt, strict=True))
  tokens = [_token(samples, tokenizer.vocab, row, *place) for place in places]
  numbers = {
    "denoiser calls": samples.calls[row],
    "put back": samples.put_back[row],
    **{
      k.replace("_", " "): _number(s.rows[row]) for k, s in statistics.items()
    },
  }
  title, canvas = f"Text {row + 1}", _el("p", *tokens, class_="canvas")
  facts = _facts(numbers, "inline")
  return _el("article", _el("h3", title), facts, canvas, class_="sample")


def _token(
  samples: Samples,
  vocab: Vocabulary,
  row: int,
  place: int,
  spelt: Sequence[str | None],
) -> _Html:
  """Returns a final token, with all its changes as data for the page's script.

  A change is [step, text], or [step, text, 1] if the token was drawn in that
  step. The text is null for MASK and false for PAD.
  """
  ids = samples.path[:, row, place].tolist()
  unreal = vocab.mask, vocab.pad  # ids that stand for no text
  before, changes = "", []
  for k, (i, text) in enumerate(zip(ids, spelt, strict=True)):
    now = False if i == vocab.pad else text and visible(text)
    drawn = k > 0 and i != ids[k - 1] and i not in unreal
    # Texts can change without a draw: bytes complete a character later on.
    if k == 0 or drawn or now != before:
      changes.append([k, now, 1] if drawn else [k, now])
    before = now
  names = ["token"]
  names += ["given"] if ids[0] not in unreal else []
  names += ["special"] if ids[-1] in (vocab.end, vocab.separator) else []
  written = json.dumps(changes, ensure_ascii=False, separators=(",", ":"))
  data = {"class_": " ".join(names), "data_changes": written}
  if samples.step[row, place] >= 0:
    data |= {
      "data_step": samples.step[row, place] + 1,
      "data_confidence": f"{samples.confidence[row, place]:.4f}",
      "data_entropy": f"{samples.entropy[row, place]:.3f}",
    }
  return _el("span", spelt[-1] or "", **data)
