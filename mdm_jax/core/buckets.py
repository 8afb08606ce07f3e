"""What an object store does otherwise than a file system.

It has no folders, takes only whole objects, and its packages (gcsfs, s3fs)
raise errors of their own. `files.py` is what the rest of the library calls.
"""

import contextlib
import errno
import functools
import logging
import os
from collections.abc import Iterator
from typing import Any

from etils import epath

from mdm_jax.core.errors import StorageError, UserError

SCHEMES = {"gs": "gcs", "s3": "s3"}  # and what fsspec calls them


class StoreError(StorageError, OSError):
  """A bucket that can't be reached, or does not do what it is asked."""

  def __init__(self, path: epath.PathLike, told: str):
    super().__init__(f"{path} can't be reached: {told}")
    self.errno, self.strerror = errno.EIO, told

  def __str__(self) -> str:
    return self.args[0]  # not the errno's form, which has no path


def is_local(path: epath.PathLike) -> bool:
  """Whether a path is on this machine's file system, not in a bucket."""
  return "://" not in str(path)


@contextlib.contextmanager
def reaching(path: epath.PathLike) -> Iterator[None]:
  """Makes the errors of a bucket's package those of a file system.

  Args:
    path: that the block reads or writes; nothing is done for a local one.

  Raises:
    FileNotFoundError, FileExistsError: as from a file system.
    StoreError: whatever else the package raises.
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
    raise FileNotFoundError(errno.ENOENT, _first_line(error)) from error
  except FileExistsError as error:
    raise FileExistsError(errno.EEXIST, _first_line(error)) from error
  except Exception as error:
    raise StoreError(path, _first_line(error)) from error


def read(path: epath.Path) -> bytes:
  """Returns an object's content."""
  with reaching(path):
    return _store(path).cat_file(str(path))


def write(path: epath.Path, content: bytes) -> None:
  """Writes an object; until it is there as a whole, the old one is."""
  with reaching(path):
    _store(path).pipe_file(str(path), content)


def create(path: epath.Path, content: bytes) -> None:
  """Writes an object where none is: of two writers at once, one may.

  Raises:
    FileExistsError: there is one.
  """
  with reaching(path):
    _store(path).pipe_file(str(path), content, mode="create")


def sizes(folder: epath.Path) -> dict[str, int]:
  """Returns the bytes of every object below a folder, in one request."""
  with reaching(folder):
    store = _store(folder)
    start = len(store._strip_protocol(str(folder))) + 1
    found = store.find(str(folder), detail=True)
  # Some tools write an empty object in a folder's place.
  return {
    path[start:]: told["size"]
    for path, told in found.items()
    if path[start:] and not path.endswith("/")
  }


def copy(source: epath.Path, target: epath.Path) -> None:
  """Copies a file, of which one or both are in a bucket."""
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
  """A file that grows, for a store that can't append.

  All of it stays in memory, and each flush writes it whole: a crash leaves
  what was flushed last.
  """

  def __init__(self, path: epath.PathLike, content: bytes = b""):
    """Goes on from the content that a file has already."""
    self._path = epath.Path(path)
    self._content, self._written = bytearray(content), len(content)

  def write(self, content: str | bytes) -> None:
    """Keeps what is appended."""
    plain = content.encode() if isinstance(content, str) else content
    self._content += plain

  def flush(self) -> None:
    """Writes the file, unless nothing has come."""
    if len(self._content) == self._written:
      return
    write(self._path, bytes(self._content))
    self._written = len(self._content)

  def close(self) -> None:
    """Writes what is left."""
    self.flush()


@functools.cache
def _prepare() -> None:
  """Settles, once a process, how the stores' packages behave."""
  import fsspec.config

  for name in {*SCHEMES, *SCHEMES.values()}:
    # Others write too: a listing that is kept would hide what they wrote.
    told = fsspec.config.conf.setdefault(name, {})
    told.setdefault("use_listings_cache", False)
  # It logs every retry with a traceback; the last one is raised anyway.
  logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
  # With TensorFlow installed, paths would go by its file systems instead.
  os.environ.setdefault("EPATH_USE_TF", "false")


def _store(path: epath.PathLike) -> Any:
  import fsspec

  scheme = str(path).partition("://")[0]
  return fsspec.filesystem(SCHEMES.get(scheme, scheme))


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0]
