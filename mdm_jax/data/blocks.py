"""A corpus in blocks of about one size, each of them read by itself.

Where it is cut depends on the files and the size of a block, never on who reads
them. A `.jsonl` is cut between lines; a document is never divided, so one that
is larger than a block makes its block larger.
"""

import dataclasses
import hashlib
import itertools
import pathlib
from collections.abc import Iterator

from mdm_jax.data import corpora, records
from mdm_jax.data.config import DataConfig
from mdm_jax.data.corpora import Document
from mdm_jax.data.records import Form
from mdm_jax.data.splits import TRAIN
from mdm_jax.data.text_files import Span, Tally

_COMPRESSED = 4  # text is about so many times larger than its .gz or .parquet


@dataclasses.dataclass(frozen=True)
class Block:
  """A part of a corpus.

  Attributes:
    number: from 0, in the order of its corpus.
    root: the folder of the files, or the name of a TFDS data set.
    spans: parts of its files, or of its splits: examples instead of bytes.
    most: documents that are read of it (None: all).
    sha256: of its documents, once they were read.
    side: which its corpus was given for; `train` is also split.
  """

  number: int
  root: str
  spans: tuple[Span, ...]
  most: int | None = None
  sha256: str = ""
  side: str = TRAIN


def cut(data: DataConfig) -> list[Block]:
  """Returns the blocks of a run's corpus, then of those given for a side.

  Raises:
    UserError: one can't be cut, or holds nothing to cut.
  """
  size = max(int(data.block_megabytes * 1e6), 1)
  found = []
  for side, (field, corpus) in corpora.sources(data).items():
    root, weighted = _spans(corpus, field, size, records.form_of(data))
    groups = enumerate(_group(weighted, size))
    # No block has to give more than all of them.
    most = data.max_documents if side == TRAIN else None
    found += [Block(i, root, spans, most, side=side) for i, spans in groups]
  return found


def _spans(
  corpus: str, field: str, size: int, form: Form
) -> tuple[str, Iterator[tuple[Span, int]]]:
  """Returns the root of a corpus, and its parts with their sizes in bytes."""
  kind, _, name = corpus.partition(":")
  if kind == "tfds" and name:
    return corpus, _split_spans(name, size)
  if found := corpora.files(corpus):
    return str(found[1]), _file_spans(found[0], size, form)
  valid = ("sotu", "shakespeare", "text:GLOB", "tfds:NAME")
  raise corpora.unknown(corpus, field, " can't be prepared in blocks", valid)


def read(data: DataConfig, block: Block, tally: Tally) -> list[Document]:
  """Returns the documents of a block that hold text."""
  form = records.form_of(data)
  if block.root.startswith("tfds:"):
    name = block.root.removeprefix("tfds:")
    parts = [
      corpora.read_tfds(name, s.path, s.start, s.end, form) for s in block.spans
    ]
    found = (document for part in parts for document in part)
  else:
    root = pathlib.Path(block.root)
    found = corpora.read_files(block.spans, root, tally, form)
  found = (document for document in found if document.text.strip())
  return list(itertools.islice(found, block.most))


def files(blocks: list[Block]) -> str:
  """Returns a hash of which files there are and how large, wherever."""
  known = set()
  for block in blocks:
    for span in block.spans:
      path = pathlib.Path(span.path)
      size = path.stat().st_size if path.is_file() else 0
      known.add((block.side, _within(path, block.root), size))
  return hashlib.sha256(repr(sorted(known)).encode()).hexdigest()


def state(blocks: list[Block]) -> str:
  """Returns a hash of the parts of files, and how large and old those are."""
  digest = hashlib.sha256()
  for block in blocks:
    for span in block.spans:
      path = pathlib.Path(span.path)
      known = block.side, _within(path, block.root), span.start, span.end
      if path.is_file():
        known += (path.stat().st_size, path.stat().st_mtime_ns)
      digest.update(repr(known).encode())
  return digest.hexdigest()


def _within(path: pathlib.Path, root: str) -> str:
  """Returns a path that stays the same where its root moves."""
  inside = path.is_relative_to(root)
  return str(path.relative_to(root)) if inside else str(path)


def _file_spans(
  paths: list[pathlib.Path], size: int, form: Form
) -> Iterator[tuple[Span, int]]:
  """Yields parts of files, and about how much text each holds, in bytes."""
  for path in paths:
    packed = path.name.lower().endswith((".gz", ".parquet"))
    whole = path.stat().st_size * (_COMPRESSED if packed else 1)
    parts = records.parts(path, form)
    if not parts:
      yield Span(str(path)), whole
      continue
    step = max(size * parts // max(whole, 1), 1)
    for start in range(0, parts, step):
      end = min(start + step, parts)
      yield Span(str(path), start, end), whole * (end - start) // parts


def _split_spans(name: str, size: int) -> Iterator[tuple[Span, int]]:
  for part, (examples, total) in corpora.tfds_splits(name).items():
    step = max(size * examples // max(total, 1), 1)
    for start in range(0, examples, step):
      end = min(start + step, examples)
      yield Span(part, start, end), total * (end - start) // examples


def _group(
  weighted: Iterator[tuple[Span, int]], size: int
) -> Iterator[tuple[Span, ...]]:
  """Puts neighbours together, until they would be more than a block."""
  group, total = [], 0
  for span, weight in weighted:
    if group and total + weight > size:
      yield tuple(group)
      group, total = [], 0
    group.append(span)
    total += weight
  if group:
    yield tuple(group)
