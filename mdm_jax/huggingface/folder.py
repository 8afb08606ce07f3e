"""Opens a model that Hugging Face's libraries saved: hf:FOLDER.

with config.json, weights as safetensors, and tokenizer.json. Nothing is
downloaded and no code of the folder is run.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from mdm_jax.core import safe_files
from mdm_jax.core.errors import UserError
from mdm_jax.huggingface import safetensors

_PREFIX = "hf:"


def is_named(source: str) -> bool:
  """Returns whether a source is a Hugging Face folder: hf:FOLDER."""
  return source.startswith(_PREFIX)


@dataclasses.dataclass(frozen=True)
class Folder:
  """A saved model.

  Attributes:
    path: the folder.
    config: what config.json says.
  """

  path: pathlib.Path
  config: dict[str, Any]

  def tensors(self) -> Mapping[str, Any]:
    """Returns the weights by name, memory-mapped.

    Raises:
      UserError: there are none, or a file is damaged.
    """
    return safetensors.read(self.path)

  def json(self, name: str) -> dict[str, Any] | None:
    """Returns the object in a JSON file, or None if there is no such file.

    Raises:
      UserError: the file is damaged.
    """
    return _read_object(self.path / name)

  def text(self, name: str) -> str | None:
    """Returns a file's text, or None if there is no such file.

    Raises:
      UserError: it can't be read, or is not UTF-8.
    """
    path = self.path / name
    if not path.exists():
      return None
    try:
      return safe_files.read_bytes(path).decode()
    except UnicodeDecodeError:
      raise UserError(f"{path} is not UTF-8") from None


def open_folder(source: str) -> Folder:
  """Opens hf:FOLDER, or a folder without the prefix.

  Raises:
    UserError: there is no such folder, or its config.json is damaged.
  """
  path = pathlib.Path(source.removeprefix(_PREFIX)).expanduser()
  config = _read_object(path / "config.json")
  if config is None:
    raise UserError(
      f"{source} is not the folder of a Hugging Face model: it has no"
      " config.json"
    )
  return Folder(path, config)


def _read_object(path: pathlib.Path) -> dict[str, Any] | None:
  if not path.exists():
    return None
  found = safe_files.read_json(path)
  if not isinstance(found, dict):
    raise UserError(f"{path} is not a JSON object")
  return found
