"""Files that are whole or not there, whenever the writer is killed.

A path may be in a bucket, where every object is written whole or not at all;
what else is different there is in `buckets.py`.
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

_COPIES = 8  # at once


def make_folder(folder: epath.Path) -> None:
  """Makes a folder and those above it; a bucket has none to make."""
  if is_local(folder):
    folder.mkdir(parents=True, exist_ok=True)


def exists(path: epath.Path) -> bool:
  """Whether a file or folder is there."""
  with reaching(path):
    return path.exists()


def write(path: epath.Path, content: bytes) -> None:
  """Writes a file so that a crash leaves the old one or the new one."""
  if not is_local(path):
    buckets.write(path, content)
    return
  partial = path.parent / f".{path.name}.{os.getpid()}"
  try:
    partial.write_bytes(content)
    partial.replace(path)
  except OSError:
    with contextlib.suppress(OSError):
      partial.unlink(missing_ok=True)  # half of it, on a full disk
    raise


def write_json(path: epath.Path, value: Any) -> None:
  """Writes a value as JSON, the same way."""
  write(path, _as_json(value))


def create_json(path: epath.Path, value: Any) -> None:
  """Writes a value as JSON where no file is.

  Raises:
    FileExistsError: there is one by now. Only a bucket tells; on a file
      system, the caller has to be alone.
  """
  if is_local(path):
    write_json(path, value)
  else:
    buckets.create(path, _as_json(value))


def read_text(path: epath.Path) -> str:
  """Returns a file's text."""
  return path.read_text() if is_local(path) else buckets.read(path).decode()


def read_json(path: epath.Path) -> Any:
  """Returns a file's value, or None where there is no file or no JSON.

  Raises:
    StoreError: it is in a bucket that can't be reached.
  """
  try:
    return json.loads(read_text(path))
  except StoreError:
    raise  # not to be taken for a file that is not there
  except (OSError, ValueError):
    return None


def append_line(path: epath.Path, value: dict[str, Any]) -> None:
  """Appends one JSON object to a file of lines, on a line of its own."""
  line = strict_json.dumps(value)
  if not is_local(path):
    write(path, f"{_text_if_any(path)}{line}\n".encode())
    return
  cut = "\n" if _is_cut_short(path) else ""
  with path.open("a") as file:
    file.write(f"{cut}{line}\n")
    file.flush()


def open_to_append(path: epath.Path, content: bytes) -> IO | buckets.Appender:
  """Replaces a file's content and returns the file, to go on writing text.

  In a bucket, each flush writes all of it again.
  """
  write(path, content)
  if is_local(path):
    return path.open("a")
  return buckets.Appender(path, content)


def read_lines(path: epath.Path) -> list[dict[str, Any]]:
  """Returns the objects of a file of lines, without one cut short."""
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
  """Deletes a file, if it is there."""
  with reaching(path):
    path.unlink(missing_ok=True)


def delete_folder(folder: epath.Path) -> None:
  """Deletes a folder and all that is in it."""
  with reaching(folder):
    folder.rmtree()


def names(folder: epath.Path) -> list[str]:
  """Returns the names of what is in a folder; none if it is not there."""
  with reaching(folder):
    return [p.name for p in folder.iterdir()] if folder.exists() else []


def sizes(folder: epath.Path) -> dict[str, int]:
  """Returns the bytes of every file below a folder, by its name from there."""
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
  """Copies files from a folder to another one; one of them is in a bucket."""

  def copy(name: str) -> None:
    make_folder((target / name).parent)
    buckets.copy(source / name, target / name)

  with concurrent.futures.ThreadPoolExecutor(_COPIES) as threads:
    list(threads.map(copy, names))


def move_folder(source: epath.Path, target: epath.Path) -> None:
  """Gives a folder another name; in a bucket, object by object."""
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
  """Whether a file's last line has no end, its writer having been killed."""
  if not path.is_file() or not path.stat().length:
    return False
  with path.open("rb") as file:
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"
