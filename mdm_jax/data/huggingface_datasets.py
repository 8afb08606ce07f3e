"""Reads Hugging Face datasets (`hf:NAME` or `hf:FOLDER`) as streams.

Files of the hub are read over the network, without a copy on disk, and one
batch of rows is in memory at a time. No code of a dataset is run.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from mdm_jax.core.errors import UserError, first_line
from mdm_jax.data import huggingface_files as hub
from mdm_jax.data.config import DataConfig
from mdm_jax.data.huggingface_files import Source, parse
from mdm_jax.data.splits import HELD_OUT, TEST, TRAIN, VALIDATION
from mdm_jax.data.text_files import BadRecord, Document, Span, Tally

# The names that datasets give to each split.
_NAMES = {
  TRAIN: (TRAIN,),
  VALIDATION: (VALIDATION, "valid", "val", "dev"),
  TEST: (TEST,),
}
_ROWS = 1000  # rows decoded at a time
_LOOKED_AT = 20  # rows by which the likeliest column of text is found


# MARK: revision and split


def settle(text: str, side: str) -> dict[str, str]:
  """Chooses the commit and the splits that are read.

  Args:
    text: what follows `hf:` in the config.
    side: split that the corpus is given for.

  Returns:
    {side: what follows `hf:`, with a commit and a split}. If the corpus is for
    training and names no split, the dataset's own held-out splits are added.

  Raises:
    UserError: the dataset isn't found, or has several splits of other names.
  """
  source = _pinned(parse(text))
  if source.split:
    return {side: str(source)}
  own = {name: _own(source, name) for name in HELD_OUT if side == TRAIN}
  own[side] = _own(source, side) or _only(source, side)
  settled = {s: dataclasses.replace(source, split=n) for s, n in own.items()}
  return {s: str(found) for s, found in settled.items() if found.split}


def _own(source: Source, side: str) -> str:
  """Returns the dataset's own name of a split, '' if it has none."""
  found = hub.splits(source)
  return next((name for name in _NAMES[side] if name in found), "")


def _only(source: Source, side: str) -> str:
  first, *others = hub.splits(source)
  if others:
    listed = ", ".join(f"split={name}" for name in (first, *others))
    raise UserError(f"hf:{source} has no split {side!r}; choose: {listed}")
  return first


def _pinned(source: Source) -> Source:
  """Returns the source at the commit that its revision is now."""
  if source.folder or source.is_fixed:
    return source
  # In the offline cache this is the commit that was downloaded.
  return dataclasses.replace(source, revision=hub.builder(source).hash)


def pinned(text: str) -> str:
  """Returns `NAME@COMMIT` of a settled source; '' for a folder."""
  source = parse(text)
  return source.pinned if source.revision else ""


def folder(text: str) -> str:
  """Returns the path of a folder that follows `hf:`; of a dataset, its name."""
  source = parse(text)
  return str(source.folder.resolve()) if source.folder else source.name


# MARK: reading


def spans(text: str, size: int) -> Iterator[tuple[Span, int]]:
  """Yields spans of about `size` bytes of text, which comes with each.

  A span is a file of a settled source, or consecutive row groups of a .parquet.
  """
  source = parse(text)
  rows = hub.split(source)
  for path, weight in hub.weights(source, rows.num_shards).items():
    # Opened only if it may have to be cut: there may be thousands of files.
    groups = hub.pieces(source, rows, path).num_shards if weight > size else 1
    step = max(size * groups // max(weight, 1), 1)
    for start in range(0, groups, step):
      end = min(start + step, groups)
      part = (start, end) if groups > 1 else ()
      yield Span(path, *part), weight * (end - start) // groups


def read(
  text: str, span: Span, data: DataConfig, tally: Tally
) -> Iterator[Document]:
  """Yields the rows of a settled source's span.

  Raises:
    UserError: the column is missing or holds no text, or a file can't be read.
  """
  source = parse(text)
  pieces = hub.pieces(source, _text_column(source, data.text_key), span.path)
  tally.files += 1
  for number in range(pieces.num_shards)[span.start : span.end]:
    group = f", row group {number}" if pieces.num_shards > 1 else ""
    piece = pieces.shard(pieces.num_shards, number)
    for row, text in enumerate(_texts(piece, span.path + group), 1):
      tally.records += 1
      if isinstance(text, BadRecord):
        tally.add_bad(text)
      else:
        yield Document(f"{span.path}{group}:{row}", text)


def read_all(text: str, tally: Tally, data: DataConfig) -> Iterator[Document]:
  """Yields the rows of a source's split, by default of its train split."""
  text = settle(text, TRAIN)[TRAIN]
  source = parse(text)
  for path in hub.paths(source, hub.split(source).num_shards):
    yield from read(text, Span(path), data, tally)


def _texts(piece: Any, name: str) -> Iterator[str | BadRecord]:
  """Yields each row's text, or why it can't be read."""
  row = 0
  with hub.explained(name):
    try:
      for table in piece.with_format("arrow").iter(_ROWS):
        for value in table.column(0):
          row += 1
          yield _text(value, f"{name}, row {row}")
    except ValueError as error:  # the base class of pyarrow's about content
      reason = f"damaged after row {row}: {first_line(error)}"
      yield BadRecord(f"{name} is {reason}")


def _text(value: Any, where: str) -> str | BadRecord:
  try:
    text = value.as_py()
    if text is None:
      return BadRecord(f"{where}: None instead of text")
    text.encode()
    return text
  except UnicodeDecodeError as error:
    return BadRecord(f"{where}: not valid UTF-8 ({error.reason})")
  except UnicodeEncodeError:  # valid in JSON, but no UTF-8 can hold it
    return BadRecord(f"{where}: half of a surrogate pair in the text")


# MARK: columns


def _text_column(source: Source, key: str) -> Any:
  """Returns a split's rows with nothing but the column of text."""
  rows = hub.split(source)
  with hub.explained(f"hf:{source}"):
    types = {field.name: field.type for field in _schema(rows)}
    if key not in types or not _is_text(types[key]):
      raise UserError(f"hf:{source}{_no_text(rows, types, key)}")
  if hub.builder(source).name == "parquet":
    # The other columns of a .parquet need not be read at all.
    rows = hub.split(source, (key,))
  return rows.select_columns([key])


def _schema(rows: Any) -> Any:
  if rows.features:
    return rows.features.arrow_schema
  # The columns of a JSON list are known only when it has been read.
  return next((t.schema for t in rows.with_format("arrow").iter(1)), ())


def _is_text(kind: Any) -> bool:
  from pyarrow import types

  kind = kind.value_type if types.is_dictionary(kind) else kind
  return types.is_string(kind) or types.is_large_string(kind)


def _no_text(rows: Any, types: dict[str, Any], key: str) -> str:
  """Says why a column isn't read, and which one is meant most likely."""
  if key not in types:
    listed = ", ".join(f"{name} ({kind})" for name, kind in types.items())
    why = f" has no column {key!r}, only {listed or 'empty files'}"
  elif types[key].num_fields:
    why = (
      f": column {key!r} holds lists or records ({types[key]}), such as"
      " paragraphs or messages, not text; join each to one text first"
    )
  else:
    why = f": column {key!r} holds {types[key]}, not text"
  texts = [name for name, kind in types.items() if _is_text(kind)]
  if not texts:
    return f"{why}; no column holds text"
  sizes = dict.fromkeys(texts, 0)
  for row in rows.select_columns(texts).take(_LOOKED_AT):
    sizes = {name: sizes[name] + len(row[name] or "") for name in texts}
  longest = max(texts, key=sizes.__getitem__)
  return (
    f"{why}; set data.text_key={longest}, the column with the longest texts"
  )
