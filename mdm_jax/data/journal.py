"""Writes files atomically: to a temporary name, then renamed into place.

A reader sees a whole file or none. Several processes may write the same bytes
to the same path at once.
"""

import hashlib
import io
import json
import os
import pathlib
import tempfile
from typing import Any

import numpy as np

from mdm_jax.core import safe_files
from mdm_jax.core.errors import StorageError

UNFINISHED = "tmp-"  # prefix of temporary files; a kill may leave some behind


def put(path: pathlib.Path, value: Any) -> dict[str, Any]:
  """Writes a file atomically; returns its size in bytes and its sha256.

  Args:
    path: where to; the suffix sets the format: .json for plain values, .npy for
      one array, .npz for a dict of arrays.
    value: what to write; bytes are written unchanged under any suffix.

  Returns:
    `{"bytes": ..., "sha256": ...}` of the file.

  Raises:
    StorageError: the file can't be written, for example to a full disk.

  Example:
    >>> put(folder / "ids.npy", np.arange(3))["bytes"]
    152
  """
  content = _content(path.suffix, value)
  try:
    # In the same folder: os.replace is atomic only within a file system.
    handle, beside = tempfile.mkstemp(prefix=UNFINISHED, dir=path.parent)
    with open(handle, "wb") as file:
      file.write(content)
      file.flush()
      # The content must be on disk before the final name exists.
      os.fsync(file.fileno())
    os.replace(beside, path)
  except OSError as error:
    raise StorageError(
      f"{path} can't be written: {error.strerror}; the same command resumes"
    ) from error
  return {
    "bytes": len(content),
    "sha256": hashlib.sha256(content).hexdigest(),
  }


def _content(suffix: str, value: Any) -> bytes:
  if isinstance(value, bytes):
    return value
  if suffix == ".json":
    return json.dumps(value, indent=1).encode()
  content = io.BytesIO()
  if suffix == ".npy":
    np.save(content, value, allow_pickle=False)
  else:
    np.savez(content, **value)
  return content.getvalue()


def get(path: pathlib.Path) -> Any:
  """Returns what `put` wrote to a .json, .npy or .npz; .npy is memory-mapped.

  Raises:
    UnsafeFile: a .json file holds something else than plain values.
  """
  if path.suffix == ".json":
    return safe_files.read_json(path)
  if path.suffix == ".npy":
    # allow_pickle=False here and below: reading a pickle may run any code.
    return np.load(path, mmap_mode="r", allow_pickle=False)
  with np.load(path, allow_pickle=False) as arrays:
    return dict(arrays)


def sweep(folder: pathlib.Path) -> None:
  """Deletes temporary files that killed processes left in a folder."""
  for path in folder.glob(f"{UNFINISHED}*"):
    path.unlink(missing_ok=True)
