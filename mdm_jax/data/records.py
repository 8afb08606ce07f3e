"""Reads the records of files: text, lines, .jsonl, .csv and .parquet.

A record becomes a document. It is a text file, or a line of one with
`data.document=line`; a line of a .jsonl; a row of a .csv or .parquet. All but
.parquet may be compressed with gzip. A record is bad if it can't be
decompressed, is not UTF-8, or holds no text where text should be.
"""

import contextlib
import csv
import functools
import gzip
import io
import json
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from mdm_jax.core import modules
from mdm_jax.core.errors import UserError, first_line
from mdm_jax.data.config import DataConfig
from mdm_jax.data.text_files import BadRecord, Document, Span, Tally

Kind = Literal["text", "lines", "jsonl", "csv", "parquet"]
# Name of a record, and its text or why it can't be read.
Record = tuple[str, "str | BadRecord"]

_KINDS: dict[str, Kind] = {
  ".jsonl": "jsonl",
  ".ndjson": "jsonl",
  ".csv": "csv",
  ".tsv": "csv",
  ".parquet": "parquet",
}
_MARK = b"\xef\xbb\xbf"  # UTF-8's byte order mark, which is no part of the text
# Byte order marks of other encodings. UTF-32's comes first, because it begins
# with UTF-16's.
_OTHER_MARKS = {
  b"\xff\xfe\0\0": "UTF-32",
  b"\0\0\xfe\xff": "UTF-32",
  b"\xff\xfe": "UTF-16",
  b"\xfe\xff": "UTF-16",
}
_LOOKED_AT = 4096  # bytes from which an encoding is guessed
_LONGEST_CELL = 2**31 - 1  # characters; csv's own limit is 131,072
# What reading a truncated file, or one that is no .gz, may raise.
_DAMAGED = EOFError, zlib.error, gzip.BadGzipFile


def kind_of(path: pathlib.Path, data: DataConfig) -> Kind:
  """Returns what a file holds, by its suffix, in upper or lower case."""
  name = path.name.lower().removesuffix(".gz")
  kind = _KINDS.get(pathlib.PurePath(name).suffix, "text")
  return "lines" if kind == "text" and data.document == "line" else kind


def parts(path: pathlib.Path, data: DataConfig) -> int | None:
  """Returns the number of units at which a file may be divided.

  These are bytes for files of lines and row groups for .parquet; None means
  that the file can only be read as a whole.
  """
  kind = kind_of(path, data)
  if kind == "parquet":
    with contextlib.suppress(BadRecord):  # reported when the file is read
      return _parquet(path).num_row_groups
  # A quoted CSV cell may hold line breaks, and gzip can't be entered midway.
  lines = kind in ("lines", "jsonl") and not _is_packed(path)
  return path.stat().st_size if lines else None


def read_all(
  spans: Iterable[Span],
  root: pathlib.Path,
  data: DataConfig,
  tally: Tally,
  of_line: Callable[[bytes], str] | None = None,
) -> Iterator[Document]:
  """Yields the documents of spans; their names are relative to `root`.

  Args:
    spans: parts of files to read.
    root: folder left out of the names, so that a moved corpus keeps them.
    data: how files are read.
    tally: counts files and records; raises the first bad record unless it is
      set to skip them.
    of_line: the text of a line of a .jsonl, or ValueError with a reason (None:
      that of `data.text_key`).
  """
  for span in spans:
    tally.files += 1
    name = pathlib.Path(span.path).relative_to(root).as_posix()
    for record, text in _records(span, name, data, of_line):
      tally.records += 1
      if isinstance(text, BadRecord):
        tally.add_bad(text)
      else:
        yield Document(record, text)


def decode(data: bytes, path: str | pathlib.Path, first_line: int = 1) -> str:
  """Returns the text of UTF-8 bytes.

  Args:
    data: a whole file, or lines of it.
    path: of the file, for the error.
    first_line: line number at which `data` starts.

  Raises:
    BadRecord: the bytes are not UTF-8; names the line.
  """
  try:
    return data.decode()
  except UnicodeDecodeError as e:
    line = first_line + data[: e.start].count(b"\n")
    raise BadRecord(f"{path}, line {line}: not valid UTF-8 ({e.reason})") from e


def _records(
  span: Span,
  name: str,
  data: DataConfig,
  of_line: Callable[[bytes], str] | None,
) -> Iterator[Record]:
  """Yields each record's name with its text, or with its error.

  Errors are values because a generator that raises is finished: this way the
  caller can count a bad record and continue with the next.
  """
  path = pathlib.Path(span.path)
  kind = kind_of(path, data)
  try:
    if kind == "text":
      yield name, _read_file(path)
    elif kind == "parquet":
      yield from _parquet_rows(span, name, data.text_key)
    elif kind == "csv":
      yield from _csv_rows(path, name, data.text_key)
    else:
      of_json = of_line or functools.partial(_from_json, key=data.text_key)
      of_line = of_json if kind == "jsonl" else _plain
      yield from _line_records(span, name, of_line)
  except BadRecord as error:  # the whole file is bad: count it as one record
    yield name, error
  except _DAMAGED as error:
    yield name, BadRecord(f"{path} is damaged or incomplete: {error}")
  except OSError as e:
    raise UserError(
      f"{path} can't be read: {e.strerror or first_line(e)}"
    ) from e


# MARK: bytes


def _is_packed(path: pathlib.Path) -> bool:
  return path.name.lower().endswith(".gz")


def _open(path: pathlib.Path) -> io.BufferedIOBase:
  return gzip.open(path, "rb") if _is_packed(path) else open(path, "rb")


def _read_file(path: pathlib.Path) -> str:
  content = path.read_bytes()
  content = gzip.decompress(content) if _is_packed(path) else content
  _check_encoding(content, path)
  return decode(content.removeprefix(_MARK), path)


def _check_encoding(data: bytes, where: Any) -> None:
  """Raises BadRecord, naming the encoding, if bytes can't be UTF-8 text.

  Args:
    data: bytes from the start of a file.
    where: file, for the error.
  """
  name = next((n for m, n in _OTHER_MARKS.items() if data.startswith(m)), None)
  if not name and b"\0" in data:
    head = data[:_LOOKED_AT]
    even, odd = head[::2].count(0), head[1::2].count(0)
    # UTF-16 without a mark: in most languages one byte of every two is mostly
    # 0, and the other hardly ever.
    if max(even, odd) > len(head) / 8 and min(even, odd) <= max(even, odd) / 8:
      name = "UTF-16LE" if odd > even else "UTF-16BE"
  if name:
    raise BadRecord(
      f"{where} is {name}, not UTF-8; convert it: iconv -f {name} -t UTF-8"
    )
  if b"\0" in data:
    line = 1 + data[: data.index(b"\0")].count(b"\n")
    raise BadRecord(
      f"{where}, line {line}: a NUL byte, so it is not a text file"
    )


# MARK: lines


def _line_records(
  span: Span, name: str, of_line: Callable[[bytes], str]
) -> Iterator[Record]:
  """Yields the records of a file of lines."""
  for number, line in enumerate(_lines(span), 1):
    # Only the first line of a file can have a byte order mark.
    if number == 1 and not span.start:
      _check_encoding(line, span.path)
      line = line.removeprefix(_MARK)
    if line.strip():
      try:
        text = of_line(line)
      except ValueError as reason:
        text = BadRecord(f"{_at(span, number)}: {reason}")
      yield f"{name}:{number}", text


def _lines(span: Span) -> Iterator[bytes]:
  """Yields the lines that begin in a span."""
  with _open(pathlib.Path(span.path)) as file:
    at = span.start
    if at:  # the line under way here belongs to the span before
      # One byte early, so that a line that begins exactly at `at` is kept.
      file.seek(at - 1)
      at += len(file.readline()) - 1
    for line in file:
      if span.end is not None and at >= span.end:
        return
      at += len(line)
      yield line


def _at(span: Span, number: int) -> str:
  """Returns the file and line number of a span's line, for an error."""
  # Read from the file's start only now that an error needs the line number.
  before = sum(1 for _ in _lines(Span(span.path, 0, span.start)))
  return f"{span.path}, line {before + number}"


def _plain(line: bytes) -> str:
  if b"\0" in line:
    raise ValueError("a NUL byte, so it is not a text file")
  try:
    return line.decode().removesuffix("\n").removesuffix("\r")
  except UnicodeDecodeError as e:
    raise ValueError(f"not valid UTF-8 ({e.reason})") from e


def _from_json(line: bytes, key: str) -> str:
  """Returns the text of a JSON object; raises ValueError with the reason."""
  found = None
  try:
    found = json.loads(line.decode())
    text = found[key]
    # Half a surrogate pair is valid in JSON, but no UTF-8 can hold it.
    text.encode()
    return text
  except UnicodeDecodeError as e:
    reason = f"not valid UTF-8 ({e.reason})"
  except UnicodeEncodeError:
    reason = "half of a surrogate pair in the text"
  except (ValueError, RecursionError) as e:
    reason = f"not valid JSON ({getattr(e, 'msg', None) or str(e)})"
  except (KeyError, TypeError, AttributeError):
    reason = f'no "{key}" with a string'
    if isinstance(found, dict):
      reason += _keys([k for k, v in found.items() if isinstance(v, str)])
  raise ValueError(reason)


def _keys(names: list[str]) -> str:
  """Lists the keys there are, and advises to set data.text_key."""
  if not names:
    return ""
  shown = ", ".join(json.dumps(name, ensure_ascii=False) for name in names[:9])
  return f", but with {shown}; set data.text_key"


# MARK: tables


def _csv_rows(path: pathlib.Path, name: str, key: str) -> Iterator[Record]:
  text = _read_file(path)
  head = text.partition("\n")[0]
  # Whichever is most frequent in the header.
  delimiter = max(",;\t", key=head.count)
  csv.field_size_limit(_LONGEST_CELL)
  # newline="" keeps the line breaks inside quoted cells as they are.
  rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
  where = lambda: f"{path}, line {rows.line_num}"
  try:
    column = _column(path, key, next(rows, []))
    for number, row in enumerate(rows, 1):
      if column < len(row):
        yield f"{name}:{number}", row[column]
      elif row:
        reason = f"{len(row)} columns, the text is in {column + 1}"
        yield f"{name}:{number}", BadRecord(f"{where()}: {reason}")
  except csv.Error as e:
    raise BadRecord(f"{where()}: not valid CSV ({e})") from e


def _column(path: pathlib.Path, key: str, names: list[str]) -> int:
  if key not in names:
    raise BadRecord(f'{path}: no column "{key}"{_keys(names)}')
  return names.index(key)


def _parquet(path: pathlib.Path) -> Any:
  modules.need("pyarrow", "parquet", str(path))
  from pyarrow import parquet

  try:
    return parquet.ParquetFile(path)
  except (ValueError, OSError) as e:  # base classes of pyarrow's errors
    # The operating system's errors have an errno, those about content don't.
    if isinstance(e, OSError) and e.errno:
      raise UserError(f"{path} can't be read: {e.strerror}") from e
    raise BadRecord(f"{path} is not a Parquet file: {first_line(e)}") from e


def _parquet_rows(span: Span, name: str, key: str) -> Iterator[Record]:
  path = pathlib.Path(span.path)
  file = _parquet(path)
  _column(path, key, file.schema_arrow.names)
  number = 0
  for group in range(file.num_row_groups)[span.start : span.end]:
    table = file.read_row_group(group, columns=[key])
    for text in table.column(0).to_pylist():
      number += 1
      if not isinstance(text, str):
        text = BadRecord(
          f"{path}, row group {group}, row {number}: {type(text).__name__}"
          " instead of text"
        )
      yield f"{name}:{number}", text
