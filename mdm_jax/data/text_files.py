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
from collections.abc import Callable, Iterator

from mdm_jax.core.errors import UserError

SUFFIXES = (".txt", ".txt.gz", ".jsonl")
# Skipping ends where it is no longer a matter of single records: at this share
# of them, but a few are always allowed.
MAX_BAD_SHARE = 0.01
FEWEST_BAD = 10


@dataclasses.dataclass(frozen=True)
class Document:
  """A text that no split ever divides, and where it was found."""

  name: str
  text: str


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


def find(pattern: str) -> tuple[list[pathlib.Path], pathlib.Path]:
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


def read_all(
  paths: list[pathlib.Path], root: pathlib.Path, tally: Tally
) -> Iterator[Document]:
  """Yields documents whose names don't tell where the root is."""
  for path in paths:
    tally.files += 1
    for name, read in _records(path, path.relative_to(root).as_posix()):
      tally.records += 1
      try:
        text = read()
      except BadRecord as error:
        tally.add_bad(error)
      else:
        yield Document(name, text)


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


def _records(
  path: pathlib.Path, name: str
) -> Iterator[tuple[str, Callable[[], str]]]:
  """Yields the name of each record, and what reads it or finds it bad."""
  if path.suffix != ".jsonl":
    yield name, functools.partial(_read_file, path)
    return
  try:
    with path.open("rb") as file:
      for number, line in enumerate(file, 1):
        if line.strip():
          read = functools.partial(_read_line, line, path, number)
          yield f"{name}:{number}", read
  except OSError as e:
    raise UserError(f"{path} can't be read: {e.strerror}") from e


def _read_file(path: pathlib.Path) -> str:
  try:
    data = path.read_bytes()
    data = gzip.decompress(data) if path.suffix == ".gz" else data
  except (EOFError, zlib.error, gzip.BadGzipFile) as e:
    raise BadRecord(f"{path} is damaged or incomplete: {e}") from e
  except OSError as e:
    raise UserError(f"{path} can't be read: {e.strerror}") from e
  return decode(data, path)


def _read_line(line: bytes, path: pathlib.Path, number: int) -> str:
  where = f"{path}, line {number}"
  text = decode(line, path, number)
  try:
    text = json.loads(text)["text"]
    text.encode()
    return text
  except UnicodeEncodeError as e:
    raise BadRecord(f"{where}: half of a surrogate pair in the text") from e
  except (ValueError, RecursionError) as e:
    reason = getattr(e, "msg", None) or str(e)
    raise BadRecord(f"{where}: not valid JSON ({reason})") from e
  except (KeyError, TypeError, AttributeError) as e:
    raise BadRecord(f'{where}: no "text" with a string') from e
