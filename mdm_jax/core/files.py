"""Atomic file operations, on local paths and in buckets.

A killed writer leaves the old file or the new one, never a part of it. Paths
may be in a bucket, where writing an object is atomic by itself; `buckets.py`
has the other differences.
"""

import concurrent.futures
import contextlib
import json
import os
from collections.abc import Iterable
from typing import IO, Any

from etils import epath

from mdm_jax.core import buckets, strict_json
from mdm_jax.core.buckets import StoreError, is_local, reaching

_COPIES = 8  # concurrent transfers


def make_folder(folder: epath.Path) -> None:
  """Creates a folder and its parents; does nothing in a bucket."""
  if is_local(folder):
    folder.mkdir(parents=True, exist_ok=True)


def exists(path: epath.Path) -> bool:
  """Returns whether a file or folder exists."""
  with reaching(path):
    return path.exists()


def write(path: epath.Path, content: bytes) -> None:
  """Writes a file atomically: a crash leaves the old one or the new one."""
  if not is_local(path):
    buckets.write(path, content)
    return
  # Renaming is atomic within a file system, hence a file in the same folder.
  partial = path.parent / f".{path.name}.{os.getpid()}"
  try:
    partial.write_bytes(content)
    partial.replace(path)
  except OSError:
    with contextlib.suppress(OSError):
      partial.unlink(missing_ok=True)  # on a full disk, free what it took
    raise


def write_json(path: epath.Path, value: Any) -> None:
  """Writes a value as JSON, atomically."""
  write(path, _as_json(value))


def create_json(path: epath.Path, value: Any) -> None:
  """Writes a value as JSON to a new file.

  Raises:
    FileExistsError: the file exists. This is only detected in a bucket; on a
      file system the caller needs a lock.
  """
  if is_local(path):
    write_json(path, value)
  else:
    buckets.write(path, _as_json(value), mode="create")


def read_text(path: epath.Path) -> str:
  """Returns a file's text."""
  return path.read_text() if is_local(path) else buckets.read(path).decode()


def read_json(path: epath.Path) -> Any:
  """Returns the value of a JSON file; None if it is missing or invalid.

  Raises:
    StoreError: the file is in a bucket that can't be reached.
  """
  try:
    return json.loads(read_text(path))
  except StoreError:
    raise  # an OSError too, but the file may well exist
  except (OSError, ValueError):
    return None


def append_line(path: epath.Path, value: dict[str, Any]) -> None:
  """Appends one JSON object to a JSONL file."""
  line = strict_json.dumps(value)
  if not is_local(path):
    write(path, f"{_text_if_any(path)}{line}\n".encode())
    return
  # If a killed writer left half a line, don't continue it.
  cut = "\n" if _is_cut_short(path) else ""
  with path.open("a") as file:
    file.write(f"{cut}{line}\n")
    file.flush()


def open_to_append(path: epath.Path, content: bytes) -> IO | buckets.Appender:
  """Replaces a file's content, and returns the file opened to append text.

  In a bucket, every flush uploads the whole file.
  """
  write(path, content)
  if is_local(path):
    return path.open("a")
  return buckets.Appender(path, content)


def read_lines(path: epath.Path) -> list[dict[str, Any]]:
  """Returns the objects of a JSONL file, [] if it is missing.

  Lines that are not a JSON object are skipped, such as one that a killed writer
  left unfinished.
  """
  found = []
  for line in _text_if_any(path).splitlines():
    try:
      value = json.loads(line)
    except ValueError:
      continue
    if isinstance(value, dict):
      found.append(value)
  return found


def delete(path: epath.Path) -> None:
  """Deletes a file if it exists."""
  with reaching(path):
    path.unlink(missing_ok=True)


def delete_folder(folder: epath.Path) -> None:
  """Deletes a folder and its contents."""
  with reaching(folder):
    folder.rmtree()


def names(folder: epath.Path) -> list[str]:
  """Returns the names of a folder's entries, [] if it doesn't exist."""
  with reaching(folder):
    return [p.name for p in folder.iterdir()] if folder.exists() else []


def sizes(folder: epath.Path) -> dict[str, int]:
  """Returns the bytes of every file below a folder, by relative path."""
  if not is_local(folder):
    return buckets.sizes(folder)
  found = {}
  for root, _, inside in os.walk(folder):
    for name in inside:
      path = os.path.join(root, name)
      found[os.path.relpath(path, folder)] = os.path.getsize(path)
  return found


def copy_files(
  source: epath.Path, target: epath.Path, names: Iterable[str]
) -> None:
  """Copies files by name from one folder to another, to or from a bucket."""

  def copy(name: str) -> None:
    make_folder((target / name).parent)
    buckets.copy(source / name, target / name)

  with concurrent.futures.ThreadPoolExecutor(_COPIES) as threads:
    list(threads.map(copy, names))


def move_folder(source: epath.Path, target: epath.Path) -> None:
  """Renames a folder; in a bucket it copies and deletes every object."""
  if is_local(source):
    source.rename(target)
    return
  copy_files(source, target, sizes(source))
  delete_folder(source)


def _as_json(value: Any) -> bytes:
  return (strict_json.dumps(value, indent=2) + "\n").encode()


def _text_if_any(path: epath.Path) -> str:
  if is_local(path):
    return path.read_text() if path.is_file() else ""
  try:
    return read_text(path)
  except FileNotFoundError:
    return ""


def _is_cut_short(path: epath.Path) -> bool:
  """Returns whether a file's last line has no line feed."""
  if not path.is_file() or not path.stat().length:
    return False
  with path.open("rb") as file:
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"
