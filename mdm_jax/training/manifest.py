"""A list of a checkpoint's files and hashes: without it, it is none.

Orbax detects no bit that has changed: it would be restored in silence. So every
file is hashed once it is written, and again before it is read.
"""

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any

from etils import epath

import mdm_jax
from mdm_jax.core import files
from mdm_jax.core.errors import UserError

NAME = "manifest.json"
FORMAT = 1
_SELF = "sha256"


def write(folder: epath.Path, told: dict[str, Any]) -> dict[str, Any]:
  """Hashes every file under a folder; writes and returns the manifest.

  Args:
    folder: of a checkpoint that is complete.
    told: what else to keep beside it.
  """
  content = {
    "format": FORMAT,
    "written_by": f"mdm_jax {mdm_jax.__version__}",
    **told,
    "files": _hash_all(folder),
  }
  content[_SELF] = _digest(content)
  files.write_json(folder / NAME, content)
  return content


def read(folder: epath.Path) -> dict[str, Any] | None:
  """Returns the manifest of a folder; None if it is missing or damaged.

  Raises:
    UserError: it is of a newer format.
  """
  content = files.read_json(folder / NAME)
  if not isinstance(content, dict) or _digest(content) != content.get(_SELF):
    return None
  if content["format"] > FORMAT:
    raise UserError(
      f"checkpoint {folder} was written by {content['written_by']} (format"
      f" {content['format']}); this is mdm_jax {mdm_jax.__version__} (format"
      f" {FORMAT}): install the newer one"
    )
  return content


def problem(folder: epath.Path) -> str | None:
  """Returns what is wrong with a checkpoint's files, reading them all.

  Raises:
    UserError: it is of a newer format.
  """
  content = read(folder)
  if content is None:
    return f"{NAME} is missing or damaged"
  listed = content["files"]
  for name, file in listed.items():
    path = folder / name
    if not path.exists():
      return f"{name} is missing"
    if path.stat().length != file["bytes"]:
      return f"{name} has {path.stat().length} bytes instead of {file['bytes']}"
  for name, found in _hash_all(folder, list(listed)).items():
    if found["sha256"] != listed[name]["sha256"]:
      return f"{name} has changed (sha256)"
  return None


def has_its_files(folder: epath.Path) -> bool:
  """Whether a checkpoint has all files in their sizes: cheap, no proof."""
  content = read(folder)
  return content is not None and all(
    (folder / name).exists() and (folder / name).stat().length == file["bytes"]
    for name, file in content["files"].items()
  )


def _hash_all(
  folder: epath.Path, names: list[str] | None = None
) -> dict[str, dict[str, Any]]:
  if names is None:
    names = sorted(name for name in _walk(folder) if name != NAME)
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
    found = threads.map(lambda name: _hash(folder / name), names)
    return dict(zip(names, found, strict=True))


def _walk(folder: epath.Path, prefix: str = "") -> Iterator[str]:
  """Yields the names of all files below a folder; buckets have no `**`."""
  for path in folder.iterdir():
    if path.is_dir():
      yield from _walk(path, f"{prefix}{path.name}/")
    else:
      yield f"{prefix}{path.name}"


def _hash(path: epath.Path) -> dict[str, Any]:
  with path.open("rb") as file:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
  return {"sha256": digest, "bytes": path.stat().length}


def _digest(content: dict[str, Any]) -> str:
  told = {k: v for k, v in content.items() if k != _SELF}
  return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
