"""The manifest of a checkpoint: sizes and SHA-256 hashes of all its files.

Orbax doesn't detect flipped bits and restores them silently. So every file is
hashed when it has been written, and again before it is read. A folder without a
valid manifest is no checkpoint.
"""

import concurrent.futures
import hashlib
import json
import os
from typing import Any

from etils import epath

import mdm_jax
from mdm_jax.core import files, strict_json
from mdm_jax.core.errors import UserError

NAME = "manifest.json"
FORMAT = 2  # 1 was written by mdm_jax 0.1 and older
_SELF = "sha256"


def write(
  folder: epath.Path, extra: dict[str, Any], written: epath.Path | None = None
) -> dict[str, Any]:
  """Hashes every file below a folder; writes and returns the manifest.

  Args:
    folder: the folder of a complete checkpoint.
    extra: further JSON values for the manifest, such as the progress.
    written: where the files were written, if they were copied from there.
  """
  content = {
    "format": FORMAT,
    "written_by": f"mdm_jax {mdm_jax.__version__}",
    # With null for nan, as it will be read: the manifest's hash must match.
    **strict_json.plain(extra),
    "files": _hash_all(written or folder),
  }
  content[_SELF] = _digest(content)
  files.write_json(folder / NAME, content)
  return content


def read(folder: epath.Path) -> dict[str, Any] | None:
  """Returns the manifest of a folder, or None if it is missing or damaged.

  Raises:
    UserError: another version of this library wrote it, in another format.
  """
  content = files.read_json(folder / NAME)
  if not isinstance(content, dict) or _digest(content) != content.get(_SELF):
    return None
  if content["format"] != FORMAT:
    newer = content["format"] > FORMAT
    advice = "newer one" if newer else "older one for it, or start a new run"
    raise UserError(
      f"checkpoint {folder} was written by {content['written_by']} (format"
      f" {content['format']}); this is mdm_jax {mdm_jax.__version__} (format"
      f" {FORMAT}): use the {advice}"
    )
  return content


def problem(folder: epath.Path) -> str | None:
  """Returns what is wrong with a checkpoint, or None; reads all its files.

  Raises:
    UserError: as in `read`.
  """
  content = read(folder)
  if content is None:
    return f"{NAME} is missing or damaged"
  listed = content["files"]
  if wrong := _wrong_size(folder, listed):
    return wrong
  for name, found in _hash_all(folder, list(listed)).items():
    if found["sha256"] != listed[name]["sha256"]:
      return f"{name} has changed (sha256)"
  return None


def has_its_files(folder: epath.Path) -> bool:
  """Returns whether all files of a checkpoint have their sizes.

  Cheap, because it doesn't hash: a flipped bit goes unnoticed.
  """
  content = read(folder)
  return content is not None and not _wrong_size(folder, content["files"])


def _wrong_size(folder: epath.Path, listed: dict[str, Any]) -> str | None:
  sizes = files.sizes(folder)
  for name, file in listed.items():
    if name not in sizes:
      return f"{name} is missing"
    if sizes[name] != file["bytes"]:
      return f"{name} has {sizes[name]} bytes instead of {file['bytes']}"
  return None


def _hash_all(
  folder: epath.Path, names: list[str] | None = None
) -> dict[str, dict[str, Any]]:
  if names is None:
    names = sorted(name for name in files.sizes(folder) if name != NAME)
  # Threads are enough: hashlib releases the interpreter's lock.
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
    found = threads.map(lambda name: _hash(folder / name), names)
    return dict(zip(names, found, strict=True))


def _hash(path: epath.Path) -> dict[str, Any]:
  with files.reaching(path), path.open("rb") as file:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"sha256": digest, "bytes": file.tell()}


def _digest(content: dict[str, Any]) -> str:
  hashed = {k: v for k, v in content.items() if k != _SELF}
  return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()
