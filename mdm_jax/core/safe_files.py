"""Safe reading of files from untrusted sources.

Sizes are bounded, names can't lead out of a folder, and nothing that is read is
executed. Problems raise a UserError that names the file.
"""

import json
from typing import Any

from etils import epath

from mdm_jax.core import files
from mdm_jax.core.errors import UserError

MAX_BYTES = 256 * 2**20  # of a JSON file or a tokenizer; both fit in memory


class UnsafeFile(UserError):
  """A file was refused."""


def read_bytes(path: epath.PathLike, most: int | None = None) -> bytes:
  """Returns a file's bytes.

  Args:
    path: the file.
    most: maximum size in bytes (None: MAX_BYTES).

  Raises:
    UnsafeFile: the file is larger, or can't be read.
  """
  path, most = epath.Path(path), MAX_BYTES if most is None else most
  try:
    with files.reaching(path), path.open("rb") as file:
      # Read one byte too many rather than trust the size that `stat` reports.
      content = file.read(most + 1)
  except OSError as error:
    raise UnsafeFile(f"{path} can't be read: {error.strerror}") from error
  if len(content) > most:
    raise UnsafeFile(
      f"{path} is larger than {most / 2**20:.0f} MiB, the most this library"
      " reads at once"
    )
  return content


def read_json(path: epath.PathLike) -> Any:
  """Returns the value of a JSON file; raises UnsafeFile if it is invalid."""
  try:
    return json.loads(read_bytes(path))
  except RecursionError:
    raise UnsafeFile(f"{path} is not valid JSON: nested too deeply") from None
  except ValueError as error:
    raise UnsafeFile(f"{path} is not valid JSON: {error}") from None


def check_name(name: Any, where: epath.PathLike) -> str:
  """Returns a file name read from a file; raises UnsafeFile unless plain.

  Args:
    name: the name, which must not contain any folder.
    where: the file that contains the name.
  """
  plain = isinstance(name, str) and name not in ("", ".", "..")
  if not plain or any(c in name for c in "/\\:\0"):
    raise UnsafeFile(
      f"{where} names the file {str(name)[:80]!r}; only plain names, in the"
      " same folder, are allowed"
    )
  return name
