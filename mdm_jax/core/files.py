"""Files that are whole or not there, whenever the writer is killed."""

import json
import os
from typing import Any

from etils import epath


def is_local(path: epath.PathLike) -> bool:
  """Whether a path is on this machine's file system, not in a bucket."""
  return "://" not in str(path)


def write(path: epath.Path, content: bytes) -> None:
  """Writes a file so that a crash leaves the old one or the new one."""
  partial = path.parent / f".{path.name}.{os.getpid()}"
  partial.write_bytes(content)
  partial.replace(path)


def write_json(path: epath.Path, value: Any) -> None:
  """Writes a value as JSON, the same way."""
  write(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: epath.Path) -> Any:
  """Returns a file's value, or None where there is no file or no JSON."""
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError):
    return None


def append_line(path: epath.Path, value: dict[str, Any]) -> None:
  """Appends one JSON object to a file of lines, on a line of its own."""
  cut = "\n" if _is_cut_short(path) else ""
  with path.open("a") as file:
    file.write(f"{cut}{json.dumps(value)}\n")
    file.flush()


def read_lines(path: epath.Path) -> list[dict[str, Any]]:
  """Returns the objects of a file of lines, without one cut short."""
  found = []
  for line in path.read_text().splitlines() if path.is_file() else ():
    try:
      value = json.loads(line)
    except ValueError:
      continue
    if isinstance(value, dict):
      found.append(value)
  return found


def _is_cut_short(path: epath.Path) -> bool:
  """Whether a file's last line has no end, its writer having been killed."""
  if not path.is_file() or not path.stat().length:
    return False
  with path.open("rb") as file:
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"
