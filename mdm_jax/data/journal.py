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


def put(path: pathlib.Path, content: bytes) -> dict[str, Any]:
  """Writes a file; returns its size and hash.

  Raises:
    StorageError: the disk is full, or does not take it.
  """
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


def put_json(path: pathlib.Path, value: Any) -> dict[str, Any]:
  """Writes plain values."""
  return put(path, json.dumps(value, indent=1).encode())


def get_json(path: pathlib.Path) -> Any:
  """Returns plain values; raises UnsafeFile if there are none."""
  return safe_files.read_json(path)


def put_array(path: pathlib.Path, array: np.ndarray) -> dict[str, Any]:
  """Writes an array."""
  content = io.BytesIO()
  np.save(content, array, allow_pickle=False)
  return put(path, content.getvalue())


def put_arrays(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
  """Writes several arrays with names."""
  content = io.BytesIO()
  np.savez(content, **arrays)
  put(path, content.getvalue())


def get_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns the arrays of `put_arrays`."""
  with np.load(path, allow_pickle=False) as arrays:
    return dict(arrays)


def map_array(path: pathlib.Path) -> np.ndarray:
  """Returns the array of `put_array`, memory-mapped."""
  return np.load(path, mmap_mode="r", allow_pickle=False)


def sweep(folder: pathlib.Path) -> None:
  """Removes what killed processes left half-written in a folder."""
  for path in folder.glob(f"{UNFINISHED}*"):
    path.unlink(missing_ok=True)
