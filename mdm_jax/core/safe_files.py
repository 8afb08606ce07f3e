"""Files that others may have written: of bounded size, and inside a folder.

Nothing here runs what it reads. What is not as it should be is a UserError
that names the file.
"""

import json
from typing import Any

from etils import epath

from mdm_jax.core import files
from mdm_jax.core.errors import UserError

MAX_BYTES = 256 * 2**20  # of a JSON file or a tokenizer; both fit in memory


class UnsafeFile(UserError):
  """A file that is not read, and why."""


def read_bytes(path: epath.PathLike, most: int | None = None) -> bytes:
  """Returns a file's bytes.

  Args:
    path: of the file.
    most: bytes it may have (None: MAX_BYTES).

  Raises:
    UnsafeFile: it is larger, or can't be read.
  """
  path, most = epath.Path(path), MAX_BYTES if most is None else most
  try:
    with files.reaching(path), path.open("rb") as file:
      content = file.read(most + 1)  # its stated size may be another one
  except OSError as error:
    raise UnsafeFile(f"{path} can't be read: {error.strerror}") from error
  if len(content) > most:
    raise UnsafeFile(
      f"{path} is larger than {most / 2**20:.0f} MiB, the most this library"
      " reads at once"
    )
  return content


def read_json(path: epath.PathLike) -> Any:
  """Returns what a JSON file holds; raises UnsafeFile if it is none."""
  try:
    return json.loads(read_bytes(path))
  except RecursionError:
    raise UnsafeFile(f"{path} is not valid JSON: nested too deeply") from None
  except ValueError as error:
    raise UnsafeFile(f"{path} is not valid JSON: {error}") from None


def check_name(name: Any, where: epath.PathLike) -> str:
  """Returns a file's name; raises UnsafeFile if it leads out of its folder.

  Args:
    name: a plain name, without any folder.
    where: the file that the name stands in.
  """
  plain = isinstance(name, str) and name not in ("", ".", "..")
  if not plain or any(c in name for c in "/\\:\0"):
    raise UnsafeFile(
      f"{where} names the file {str(name)[:80]!r}; only a plain name, in the"
      " same folder, is read"
    )
  return name
