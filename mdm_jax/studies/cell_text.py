"""Cuts the text of the study of repeated text: nested parts, held-out text."""

import dataclasses
import json
import math
import pathlib
import random

from mdm_jax.core.errors import UserError
from mdm_jax.data import corpora
from mdm_jax.studies.cells import Preset

_PIECE = 1000  # characters of a document, or a little more
_HELD_OUT = 0.05  # of the text for validation, and as much for test


@dataclasses.dataclass(frozen=True)
class Text:
  """The text of a study, as files of one document a line.

  Attributes:
    folder: has train_1_N.jsonl for every part N, validation.jsonl, test.jsonl.
    characters: in each of the files, by the name before the dot.
    sha256: of the documents that it was made of.
  """

  folder: pathlib.Path
  characters: dict[str, int]
  sha256: str


def write_text(
  corpus: str, preset: Preset, folder: pathlib.Path, most: int | None
) -> Text:
  """Divides a corpus into held-out text and nested parts of training text.

  The last 10 % of all characters are held out, half for validation and half for
  test, whatever the part. The rest is cut at line breaks into documents of some
  1,000 characters, shuffled with a fixed seed; 1/N of it are the first of them.
  So every part is a sample of the same text, and a smaller one is in a larger.

  Args:
    corpus: as in `data.corpus`, or a file.
    preset: the study, with its parts.
    folder: where to write.
    most: use no more than so many characters (None: all).

  Raises:
    UserError: there is no such text, or too little.
  """
  if ":" not in corpus and pathlib.Path(corpus).expanduser().is_file():
    corpus = f"text:{corpus}"
  documents = corpora.load(corpus)
  whole = "\n\n".join(d.text.strip() for d in documents)[:most]
  train_end = _line_end(whole, round(len(whole) * (1 - 2 * _HELD_OUT)))
  test_start = _line_end(whole, round(len(whole) * (1 - _HELD_OUT)))
  pieces = _pieces(whole[:train_end])
  random.Random(0).shuffle(pieces)
  if len(pieces) < 2 * max(preset.parts):
    raise UserError(
      f"{corpus} has {len(whole):,} characters, too few to train on"
      f" 1/{max(preset.parts)} of them: give more text"
    )
  made = {
    f"train_1_{n}": pieces[: math.ceil(len(pieces) / n)]
    for n in dict.fromkeys([1, *preset.parts])
  }
  made["validation"] = _pieces(whole[train_end:test_start])
  made["test"] = _pieces(whole[test_start:])
  folder.mkdir(parents=True, exist_ok=True)
  for name, documents_of in made.items():
    lines = (json.dumps({"text": text}) + "\n" for text in documents_of)
    (folder / f"{name}.jsonl").write_text("".join(lines))
  sizes = {name: sum(map(len, texts)) for name, texts in made.items()}
  return Text(folder, sizes, corpora.fingerprint(documents))


def _line_end(text: str, at: int) -> int:
  """Returns where the line of a character ends, or the text."""
  found = text.find("\n", at)
  return len(text) if found < 0 else found + 1


def _pieces(text: str) -> list[str]:
  """Cuts a text at line breaks into pieces, each of `_PIECE` or a bit more."""
  pieces, start = [], 0
  while start < len(text):
    end = _line_end(text, start + _PIECE)
    pieces.append(text[start:end])
    start = end
  return [piece for piece in pieces if piece.strip()]
