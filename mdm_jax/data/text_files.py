"""Documents in files: which files there are, and the records that are bad.

What a record is, `records.py` says. A file that can't be read at all (no
permission, a broken disk) is never skipped: that is not its content, and the
next start would silently train on another text.
"""

import collections
import dataclasses
import glob
import itertools
import os
import pathlib
from collections.abc import Iterable, Iterator

from mdm_jax.core.errors import UserError

# Formats that are no text; all other files are read, and told if they are none.
_NO_TEXT = (
  *(".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub", ".zip", ".tar", ".tgz"),
  *(".xz", ".bz2", ".zst", ".7z", ".npy", ".npz", ".arrow", ".sqlite"),
)
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
    start: the first byte, or row group; not all files can be divided.
    end: after the last one (None: the file's end).
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
    UserError: there is none, or one is no text by its name.
  """
  pattern = os.path.expanduser(pattern)
  # What is no pattern in a name: `[` is one, but often a part of the name.
  for tried in (pattern, pattern.replace("[", "[[]"), glob.escape(pattern)):
    root = _root(tried)
    paths = sorted(map(pathlib.Path, glob.glob(tried, recursive=True)))
    if files := [path for path in paths if path.is_file()]:
      break
  else:
    raise UserError(_nothing(pattern))
  for path in files:
    if path.name.lower().endswith(_NO_TEXT):
      raise UserError(
        f"{path} is no text file; convert it to .txt, .jsonl, .csv or .parquet,"
        " or give a pattern that leaves it out"
      )
  return files, root


def _nothing(pattern: str) -> str:
  """Says why there are no files, and what may have been meant."""
  path = pathlib.Path(pattern)
  if path.is_dir():
    return f"text:{pattern} is a folder, {_holds(path)}; {_inside(path)}"
  root = _root(pattern)
  return f"text:{pattern} matches no file in {root}, {_holds(root)}"


def _inside(folder: pathlib.Path) -> str:
  """Says what to write for the files in a folder."""
  names = [p.suffix for p in folder.rglob("*") if p.is_file()]
  (suffix, _), *_ = collections.Counter(names).most_common(1) or [(".txt", 0)]
  return f"for its files write 'text:{folder}/**/*{suffix}'"


def as_path(corpus: str) -> str | None:
  """Says what to write for a corpus that is the bare path of files."""
  path = pathlib.Path(os.path.expanduser(corpus))
  if path.is_dir():
    return f"that is a folder, {_holds(path)}; {_inside(path)}"
  if path.is_file() or any(mark in corpus for mark in "/\\*"):
    return f"files are given as 'text:{corpus}'"
  return None


def whole(paths: Iterable[pathlib.Path]) -> Iterator[Span]:
  """Yields every file as one span."""
  return (Span(str(path)) for path in paths)


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
