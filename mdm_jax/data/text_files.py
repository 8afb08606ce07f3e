"""Finds text files, and keeps count of their records and of bad ones.

`records.py` says what a record is. A file that can't be read at all (no
permission, broken disk) is never skipped: that says nothing about its content,
and the next start would silently train on other text.
"""

import collections
import dataclasses
import glob
import itertools
import os
import pathlib

from mdm_jax.core.errors import UserError

# Suffixes that are refused unread. Any other file is read, and refused if its
# content isn't text.
_NO_TEXT = (
  *(".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub", ".zip", ".tar", ".tgz"),
  *(".xz", ".bz2", ".zst", ".7z", ".npy", ".npz", ".arrow", ".sqlite"),
)
# More bad records than this share means that something else is wrong; up to 9
# are allowed in any case.
MAX_BAD_SHARE = 0.01
FEWEST_BAD = 10

Files = tuple[list[pathlib.Path], pathlib.Path]


@dataclasses.dataclass(frozen=True)
class Document:
  """A text and its name: file, relative to the corpus, and line or row."""

  name: str
  text: str


@dataclasses.dataclass(frozen=True)
class Span:
  """The records of a file that begin in a range.

  Attributes:
    path: of the file.
    start: first byte, or row group of a .parquet, or example of a TFDS split.
    end: exclusive end of the range (None: the end of the file).
  """

  path: str
  start: int = 0
  end: int | None = None


class BadRecord(UserError):
  """A record that can't be read; the message says where it is and why."""


@dataclasses.dataclass
class Tally:
  """Counts of what was read.

  Attributes:
    skip: leave out bad records; otherwise the first one is raised.
    files: opened so far.
    records: read so far, bad ones included.
    bad: records left out.
    first: the message about the first bad record.
  """

  skip: bool = False
  files: int = 0
  records: int = 0
  bad: int = 0
  first: str = ""

  def add_bad(self, error: BadRecord) -> None:
    """Counts a bad record, or raises it if none may be left out."""
    if not self.skip:
      raise error
    self.bad += 1
    self.first = self.first or str(error)

  def add(self, other: "Tally") -> None:
    """Adds the counts of something that was read later."""
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
        f" (or {FEWEST_BAD - 1}): repair the files, or give others"
      )

  def describe(self) -> str:
    """Describes how many records were bad, and the first of them."""
    return (
      f"{self.bad:,} of {self.records:,} records can't be read, the first:"
      f" {self.first}"
    )


def find(pattern: str) -> Files:
  """Returns the sorted files that match a pattern, and their common folder.

  Args:
    pattern: a glob pattern; `~` and `**` are expanded.

  Raises:
    UserError: nothing matches, or a file has a suffix of no text format.
  """
  pattern = os.path.expanduser(pattern)
  # Brackets are pattern syntax, but also common in names: if the pattern
  # matches nothing, take `[`, then every special character, literally.
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
        f"{path} is not a text file; convert it to .txt, .jsonl, .csv or"
        " .parquet, or give a pattern that leaves it out"
      )
  return files, root


def _nothing(pattern: str) -> str:
  """Says why no file matches, and what may have been meant."""
  path = pathlib.Path(pattern)
  if path.is_dir():
    return f"text:{pattern} is a folder, {_holds(path)}; {_inside(path)}"
  root = _root(pattern)
  return f"text:{pattern} matches no file in {root}, {_holds(root)}"


def _inside(folder: pathlib.Path) -> str:
  """Suggests a pattern for the files in a folder, by their commonest suffix."""
  names = [p.suffix for p in folder.rglob("*") if p.is_file()]
  (suffix, _), *_ = collections.Counter(names).most_common(1) or [(".txt", 0)]
  return f"to read its files, write 'text:{folder}/**/*{suffix}'"


def as_path(corpus: str) -> str | None:
  """Suggests what to write instead of a bare path; None if it isn't one."""
  path = pathlib.Path(os.path.expanduser(corpus))
  if path.is_dir():
    return f"that is a folder, {_holds(path)}; {_inside(path)}"
  if path.is_file() or any(mark in corpus for mark in "/\\*"):
    return f"write files as 'text:{corpus}'"
  return None


def _root(pattern: str) -> pathlib.Path:
  """Returns the longest folder path before the pattern's first wildcard."""
  parts = pathlib.Path(pattern).parts[:-1]
  plain = itertools.takewhile(lambda part: not glob.has_magic(part), parts)
  return pathlib.Path(*plain)


def _holds(folder: pathlib.Path) -> str:
  """Describes what is in a folder, so that a wrong pattern is noticed."""
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
    f"which contains {files:,} files{f' ({common})' if files else ''} and"
    f" {len(entries) - files:,} folders"
  )
