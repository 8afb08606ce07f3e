"""Cuts a corpus into blocks of similar size that can be read independently.

Block boundaries depend only on the files and the block size, never on who reads
them. Files of lines are cut between lines. A document is never divided, so a
document larger than a block makes its block larger.
"""

import dataclasses
import hashlib
import itertools
import pathlib
from collections.abc import Iterator

from mdm_jax.data import corpora, huggingface_datasets, records, tfds
from mdm_jax.data.config import DataConfig
from mdm_jax.data.corpora import Document
from mdm_jax.data.splits import TRAIN
from mdm_jax.data.text_files import Span, Tally

_COMPRESSED = 4  # text is about this many times the size of its .gz or .parquet


@dataclasses.dataclass(frozen=True)
class Block:
  """A part of a corpus.

  Attributes:
    number: position among the blocks of the same corpus, from 0.
    root: folder of the files, `tfds:NAME` or `hf:NAME`.
    spans: parts of files, or of a data set's splits.
    most: read at most this many documents (None: all).
    sha256: hash of the block's documents; empty until they have been counted.
    side: which split the corpus was given for; only `train` is split further.
  """

  number: int
  root: str
  spans: tuple[Span, ...]
  most: int | None = None
  sha256: str = ""
  side: str = TRAIN


def cut(data: DataConfig) -> list[Block]:
  """Returns the blocks of `data.corpus`, then those of the held-out corpora.

  Raises:
    UserError: a corpus can't be cut into blocks, or no file matches.
  """
  size = max(int(data.block_megabytes * 1e6), 1)
  found = []
  for side, (field, corpus) in corpora.sources(data).items():
    kind, _, name = corpus.partition(":")
    if kind == "tfds" and name:
      root, weighted = corpus, _split_spans(name, size)
    elif kind == "hf" and name:
      root, weighted = corpus, huggingface_datasets.spans(name, size)
    elif files := corpora.files(corpus):
      root, weighted = str(files[1]), _file_spans(files[0], size, data)
    else:
      valid = ("sotu", "shakespeare", "text:GLOB", "tfds:NAME", "hf:NAME")
      valid += ("chat:PATH",)
      why = " can't be prepared in blocks"
      raise corpora.unknown(corpus, field, why, valid)
    groups = enumerate(_group(weighted, size))
    # One block alone may have to supply all of `max_documents`.
    most = data.max_documents if side == TRAIN else None
    found += [Block(i, root, spans, most, side=side) for i, spans in groups]
  return found


def read(data: DataConfig, block: Block, tally: Tally) -> list[Document]:
  """Returns the documents of a block, without blank ones.

  Args:
    data: how files are read.
    block: what to read.
    tally: counts the files and records read, and the bad ones.

  Raises:
    UserError: a file can't be read, or a record is bad and may not be skipped.
  """
  if block.root.startswith("tfds:"):
    name = block.root.removeprefix("tfds:")
    parts = [tfds.read(name, s.path, s.start, s.end, data) for s in block.spans]
    found = itertools.chain.from_iterable(parts)
  elif block.root.startswith("hf:"):
    name = block.root.removeprefix("hf:")
    parts = [
      huggingface_datasets.read(name, span, data, tally) for span in block.spans
    ]
    found = corpora.advised(itertools.chain.from_iterable(parts))
  else:
    root = pathlib.Path(block.root)
    _, corpus = corpora.sources(data)[block.side]
    found = corpora.read_files(block.spans, root, data, tally, corpus)
  found = (document for document in found if document.text.strip())
  return list(itertools.islice(found, block.most))


def files(blocks: list[Block]) -> str:
  """Returns a hash of the names and sizes of all files, relative to the root.

  It stays the same when the corpus is moved to another folder.
  """
  # A set: a file counts once, into however many blocks it is cut.
  known = set()
  for block in blocks:
    for span in block.spans:
      path = pathlib.Path(span.path)
      # In a data set it names a split, or a file that is elsewhere.
      size = path.stat().st_size if path.is_file() else 0
      known.add((block.side, _within(path, block.root), size))
  return hashlib.sha256(repr(sorted(known)).encode()).hexdigest()


def state(blocks: list[Block]) -> str:
  """Returns a hash of all spans with the sizes and mtimes of their files.

  It changes when a file is edited between two runs of --mode=prepare.
  """
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
  """Returns the path relative to `root`, so a moved corpus hashes the same."""
  if root.startswith("hf:"):
    root = huggingface_datasets.folder(root.removeprefix("hf:"))
  inside = path.is_relative_to(root)
  return str(path.relative_to(root)) if inside else str(path)


def _file_spans(
  paths: list[pathlib.Path], size: int, data: DataConfig
) -> Iterator[tuple[Span, int]]:
  """Yields spans of files with the approximate size of their text in bytes."""
  for path in paths:
    packed = path.name.lower().endswith((".gz", ".parquet"))
    whole = path.stat().st_size * (_COMPRESSED if packed else 1)
    parts = records.parts(path, data)
    if not parts:  # can only be read as a whole, or is empty
      yield Span(str(path)), whole
      continue
    # `parts` counts bytes for files of lines and row groups for .parquet.
    step = max(size * parts // max(whole, 1), 1)
    for start in range(0, parts, step):
      end = min(start + step, parts)
      yield Span(str(path), start, end), whole * (end - start) // parts


def _split_spans(name: str, size: int) -> Iterator[tuple[Span, int]]:
  # Assumes that the examples of a split are about equally long.
  for part, (examples, total) in tfds.splits(name).items():
    step = max(size * examples // max(total, 1), 1)
    for start in range(0, examples, step):
      end = min(start + step, examples)
      yield Span(part, start, end), total * (end - start) // examples


def _group(
  weighted: Iterator[tuple[Span, int]], size: int
) -> Iterator[tuple[Span, ...]]:
  """Groups consecutive spans into blocks of at most `size` bytes."""
  group, total = [], 0
  for span, weight in weighted:
    if group and total + weight > size:
      yield tuple(group)
      group, total = [], 0
    group.append(span)
    total += weight
  if group:
    yield tuple(group)
