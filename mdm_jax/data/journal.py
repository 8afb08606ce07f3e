"""Files that are whole or not there: written beside, then renamed.

Several processes may write the same file with the same bytes at once.
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

UNFINISHED = "tmp-"  # how the name begins of what a kill may leave


def put(path: pathlib.Path, value: Any) -> dict[str, Any]:
  """Writes a file; returns its size and hash.

  Args:
    path: its end says what it holds: plain values (.json), an array (.npy),
      several with names (.npz), or else bytes.
    value: to be written.

  Raises:
    StorageError: the disk is full, or does not take it.
  """
  content = _content(path.suffix, value)
  try:
    handle, beside = tempfile.mkstemp(prefix=UNFINISHED, dir=path.parent)
    with open(handle, "wb") as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    os.replace(beside, path)
  except OSError as error:
    raise StorageError(
      f"{path} can't be written: {error.strerror}; the same command goes on"
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
  """Returns what `put` wrote; a single array is memory-mapped.

  Raises:
    UnsafeFile: it should be plain values, and is not.
  """
  if path.suffix == ".json":
    return safe_files.read_json(path)
  if path.suffix == ".npy":
    return np.load(path, mmap_mode="r", allow_pickle=False)
  with np.load(path, allow_pickle=False) as arrays:
    return dict(arrays)


def sweep(folder: pathlib.Path) -> None:
  """Removes what killed processes left half-written in a folder."""
  for path in folder.glob(f"{UNFINISHED}*"):
    path.unlink(missing_ok=True)
