"""Documents in files: which files there are, and the records that are bad.

A record is a file of text, or a line of a `.jsonl`. It is bad if it can't be
decompressed, is not UTF-8, or is no JSON with a text. A file that can't be read
at all (no permission, a broken disk) is never skipped: that is not its content,
and the next start would silently train on another text.
"""

import collections
import dataclasses
import functools
import glob
import gzip
import itertools
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator

from mdm_jax.core.errors import UserError

SUFFIXES = (".txt", ".txt.gz", ".jsonl")
# Skipping ends where it is no longer a matter of single records: at this share
# of them, but a few are always allowed.
MAX_BAD_SHARE = 0.01
FEWEST_BAD = 10

Files = tuple[list[pathlib.Path], pathlib.Path]


@dataclasses.dataclass(frozen=True)
class Document:
  """A text that no split ever divides, and where it was found."""

  name: str
  text: str


@dataclasses.dataclass(frozen=True)
class Span:
  """Records of a file: those that begin within some of its bytes.

  Attributes:
    path: of the file.
    start: the first byte; only a `.jsonl` is ever divided.
    end: after the last byte (None: the file's end).
  """

  path: str
  start: int = 0
  end: int | None = None


class BadRecord(UserError):
  """A record that can't be read, and where it is."""


@dataclasses.dataclass
class Tally:
  """What was met while reading.

  Attributes:
    skip: whether bad records are left out, or the first one is an error.
    files: opened so far.
    records: met so far, the bad ones among them.
    bad: records left out.
    first: what is wrong with the first of those, and where.
  """

  skip: bool = False
  files: int = 0
  records: int = 0
  bad: int = 0
  first: str = ""

  def add_bad(self, error: BadRecord) -> None:
    """Counts a bad record; raises it if none may be left out."""
    if not self.skip:
      raise error
    self.bad += 1
    self.first = self.first or str(error)

  def add(self, other: "Tally") -> None:
    """Adds what was met while reading something that comes later."""
    self.files += other.files
    self.records += other.records
    self.bad += other.bad
    self.first = self.first or other.first

  def check(self) -> None:
    """Raises UserError if too many records were left out."""
    most = MAX_BAD_SHARE * self.records
    if self.bad >= FEWEST_BAD and self.bad > most:
      raise UserError(
        f"{self.describe()}; at most {MAX_BAD_SHARE:.0%} may be left out"
        f" (or {FEWEST_BAD - 1}): mend the files, or name others"
      )

  def describe(self) -> str:
    """Says how many records were bad, and which one was the first."""
    return (
      f"{self.bad:,} of {self.records:,} records can't be read, the first:"
      f" {self.first}"
    )


def find(pattern: str) -> Files:
  """Returns the files that match, sorted, and the folder they are in.

  Raises:
    UserError: there is none, or one has a suffix this library does not read.
  """
  pattern = os.path.expanduser(pattern)
  root = _root(pattern)
  paths = sorted(map(pathlib.Path, glob.glob(pattern, recursive=True)))
  paths = [path for path in paths if path.is_file()]
  if not paths:
    raise UserError(f"text:{pattern} matches no file in {root}, {_holds(root)}")
  for path in paths:
    if not path.name.endswith(SUFFIXES):
      raise UserError(f"{path} is none of {', '.join(SUFFIXES)}")
  return paths, root


def whole(paths: Iterable[pathlib.Path]) -> Iterator[Span]:
  """Yields every file as one span."""
  return (Span(str(path)) for path in paths)


def read_all(
  spans: Iterable[Span], root: pathlib.Path, tally: Tally
) -> Iterator[Document]:
  """Yields documents whose names don't tell where the root is."""
  for span in spans:
    tally.files += 1
    name = pathlib.Path(span.path).relative_to(root).as_posix()
    for record, read in _records(span, name):
      tally.records += 1
      try:
        text = read()
      except BadRecord as error:
        tally.add_bad(error)
      else:
        yield Document(record, text)


def decode(data: bytes, path: str | pathlib.Path, first_line: int = 1) -> str:
  """Returns the text of bytes; raises BadRecord, with the line, if not UTF-8.

  Args:
    data: a whole file, or lines of it.
    path: of the file.
    first_line: the number of the first line of `data`.
  """
  try:
    return data.decode()
  except UnicodeDecodeError as e:
    line = first_line + data[: e.start].count(b"\n")
    raise BadRecord(f"{path}, line {line}: not valid UTF-8 ({e.reason})") from e


def _root(pattern: str) -> pathlib.Path:
  """Returns the folder that a pattern starts from."""
  parts = pathlib.Path(pattern).parts[:-1]
  plain = itertools.takewhile(lambda part: not glob.has_magic(part), parts)
  return pathlib.Path(*plain)


def _holds(folder: pathlib.Path) -> str:
  """Says what is in a folder, so that a wrong pattern is seen."""
  try:
    entries = list(folder.iterdir())
  except FileNotFoundError:
    return "which does not exist"
  except OSError as e:
    return f"which can't be read: {e.strerror}"
  suffixes = collections.Counter(p.suffix for p in entries if p.is_file())
  common = ", ".join(
    f"{count:,} {suffix or 'without a suffix'}"
    for suffix, count in suffixes.most_common(3)
  )
  files = suffixes.total()
  return (
    f"which holds {files:,} files{f' ({common})' if files else ''} and"
    f" {len(entries) - files:,} folders"
  )


# MARK: records


def _records(span: Span, name: str) -> Iterator[tuple[str, Callable[[], str]]]:
  """Yields the name of each record, and what reads it or finds it bad."""
  path = pathlib.Path(span.path)
  if path.suffix != ".jsonl":
    yield name, functools.partial(_read_file, path)
    return
  try:
    for number, line in enumerate(_lines(span), 1):
      if line.strip():
        read = functools.partial(_read_line, line, span, number)
        yield f"{name}:{number}", read
  except OSError as e:
    raise UserError(f"{path} can't be read: {e.strerror}") from e


def _lines(span: Span) -> Iterator[bytes]:
  """Yields the lines that begin in a span."""
  with open(span.path, "rb") as file:
    at = span.start
    if at:  # what began before it is another span's
      file.seek(at - 1)
      at += len(file.readline()) - 1
    for line in file:
      if span.end is not None and at >= span.end:
        return
      at += len(line)
      yield line


def _read_file(path: pathlib.Path) -> str:
  try:
    data = path.read_bytes()
    data = gzip.decompress(data) if path.suffix == ".gz" else data
  except (EOFError, zlib.error, gzip.BadGzipFile) as e:
    raise BadRecord(f"{path} is damaged or incomplete: {e}") from e
  except OSError as e:
    raise UserError(f"{path} can't be read: {e.strerror}") from e
  return decode(data, path)


def _read_line(line: bytes, span: Span, number: int) -> str:
  try:
    text = json.loads(line.decode())["text"]
    text.encode()
    return text
  except UnicodeDecodeError as e:
    reason = f"not valid UTF-8 ({e.reason})"
  except UnicodeEncodeError:
    reason = "half of a surrogate pair in the text"
  except (ValueError, RecursionError) as e:
    reason = f"not valid JSON ({getattr(e, 'msg', None) or str(e)})"
  except (KeyError, TypeError, AttributeError):
    reason = 'no "text" with a string'
  raise BadRecord(f"{span.path}, line {_line(span, number)}: {reason}")


def _line(span: Span, number: int) -> int:
  """Returns the number in its file of a line of a span."""
  return number + sum(1 for _ in _lines(Span(span.path, 0, span.start)))
