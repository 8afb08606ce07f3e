"""Files in object stores (gs://, s3://), where they differ from local ones.

An object store has no folders, can't append, and its packages (gcsfs, s3fs)
raise their own errors. The rest of the library calls `files.py`.
"""

import contextlib
import errno
import functools
import logging
import os
from collections.abc import Iterator
from typing import Any

from etils import epath

from mdm_jax.core.errors import StorageError, UserError, first_line

SCHEMES = {"gs": "gcs", "s3": "s3"}  # URL scheme -> fsspec's protocol


class StoreError(StorageError, OSError):
  """A bucket can't be reached, or a request to it failed."""

  def __init__(self, path: epath.PathLike, reason: str):
    super().__init__(f"{path} can't be reached: {reason}")
    self.errno, self.strerror = errno.EIO, reason

  def __str__(self) -> str:
    return self.args[0]  # OSError's own form has no path


def is_local(path: epath.PathLike) -> bool:
  """Returns whether a path is on a file system, not in a bucket."""
  return "://" not in str(path)


@contextlib.contextmanager
def reaching(path: epath.PathLike) -> Iterator[None]:
  """Converts errors of a bucket's package to those of a file system.

  Args:
    path: what the block reads or writes; for a local path this does nothing.

  Raises:
    FileNotFoundError: as from a file system.
    FileExistsError: as from a file system.
    StoreError: for any other error of the package.
    UserError: the package is not installed.
  """
  if is_local(path):
    yield
    return
  _prepare()
  try:
    yield
  except ImportError as error:
    scheme = str(path).partition("://")[0]
    raise UserError(
      f"workdir {path}: {error}; run: pip install -e '.[{scheme}]'"
    ) from error
  except StoreError:
    raise
  except FileNotFoundError as error:
    raise FileNotFoundError(errno.ENOENT, first_line(error)) from error
  except FileExistsError as error:
    raise FileExistsError(errno.EEXIST, first_line(error)) from error
  except Exception as error:
    raise StoreError(path, first_line(error)) from error


def read(path: epath.Path) -> bytes:
  """Returns an object's content."""
  with reaching(path):
    return _store(path).cat_file(str(path))


def write(path: epath.Path, content: bytes, mode: str = "overwrite") -> None:
  """Writes an object atomically: readers see the old one or the new one.

  Args:
    path: the object.
    content: its new content.
    mode: "create" for a new object; of concurrent writers only one succeeds.

  Raises:
    FileExistsError: the object exists, and the mode is "create".
  """
  with reaching(path):
    _store(path).pipe_file(str(path), content, mode=mode)


def sizes(folder: epath.Path) -> dict[str, int]:
  """Returns the size in bytes of every object below a folder.

  One listing serves all of them.
  """
  with reaching(folder):
    store = _store(folder)
    start = len(store._strip_protocol(str(folder))) + 1
    found = store.find(str(folder), detail=True)
  # Some tools write an empty object to stand for a folder.
  return {
    path[start:]: info["size"]
    for path, info in found.items()
    if path[start:] and not path.endswith("/")
  }


def copy(source: epath.Path, target: epath.Path) -> None:
  """Copies a file to, from or within a bucket."""
  bucket = target if is_local(source) else source
  with reaching(bucket):
    store, names = _store(bucket), (str(source), str(target))
    if is_local(source):
      store.put_file(*names)
    elif is_local(target):
      store.get_file(*names)
    else:
      store.cp_file(*names)


class Appender:
  """A growing file in a store that can't append.

  The content stays in memory and every flush uploads all of it. A crash loses
  what was written since the last flush.
  """

  def __init__(self, path: epath.PathLike, content: bytes = b""):
    """Starts with the content that the file already has."""
    self._path = epath.Path(path)
    self._content, self._written = bytearray(content), len(content)

  def write(self, content: str | bytes) -> None:
    """Appends to the content in memory."""
    plain = content.encode() if isinstance(content, str) else content
    self._content += plain

  def flush(self) -> None:
    """Uploads the file if it has grown since the last flush."""
    if len(self._content) == self._written:
      return
    write(self._path, bytes(self._content))
    self._written = len(self._content)

  def close(self) -> None:
    """Uploads the rest."""
    self.flush()


@functools.cache
def _prepare() -> None:
  """Configures the stores' packages, once per process."""
  import fsspec.config

  for name in {*SCHEMES, *SCHEMES.values()}:
    # Other processes write too: a cached listing would hide their objects.
    options = fsspec.config.conf.setdefault(name, {})
    options.setdefault("use_listings_cache", False)
  # gcsfs logs every retry with a traceback; the last error is raised anyway.
  logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
  # If TensorFlow is installed, epath would use its file systems, not fsspec.
  os.environ.setdefault("EPATH_USE_TF", "false")


def _store(path: epath.PathLike) -> Any:
  import fsspec

  scheme = str(path).partition("://")[0]
  return fsspec.filesystem(SCHEMES.get(scheme, scheme))
