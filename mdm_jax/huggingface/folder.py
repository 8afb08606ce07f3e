"""Opens a model that another library saved: hf:FOLDER or hf:FILE.gguf.

A folder has config.json, weights as safetensors, and tokenizer.json; a GGUF
file is opened in the same form, and so is an adapter of PEFT's, with the model
that it adds to. Nothing is downloaded, no code is run.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from mdm_jax.core import safe_files
from mdm_jax.core.errors import UserError
from mdm_jax.huggingface import peft, safetensors
from mdm_jax.huggingface.gguf_file import GGUF, SUFFIX

_PREFIX = "hf:"


def is_named(source: str) -> bool:
  """Returns whether a source is a Hugging Face folder: hf:FOLDER."""
  return source.startswith(_PREFIX)


@dataclasses.dataclass(frozen=True)
class Folder:
  """A saved model: a folder, or a file in the form of one.

  Attributes:
    path: the folder, or the GGUF file.
    config: what config.json says.
    gguf: what is read in place of a folder's files.
    adapters: folders of PEFT's whose products are added to the weights.
  """

  path: pathlib.Path
  config: dict[str, Any]
  gguf: GGUF | None = None
  adapters: tuple[pathlib.Path, ...] = ()

  def tensors(self) -> Mapping[str, Any]:
    """Returns the weights by name, arrays that are read when they are used.

    Raises:
      UserError: there are none, or a file is damaged.
    """
    found = self.gguf.tensors if self.gguf else safetensors.read(self.path)
    for adapter in self.adapters:
      found = peft.Adapted(found, adapter)
    return found

  def json(self, name: str) -> dict[str, Any] | None:
    """Returns the object in a JSON file, or None if there is no such file.

    Raises:
      UserError: the file is damaged.
    """
    if self.gguf:
      return json.loads(self.gguf.files.get(name, "null"))
    return _read_object(self.path / name)

  def text(self, name: str) -> str | None:
    """Returns a file's text, or None if there is no such file.

    Raises:
      UserError: it can't be read, or is not UTF-8.
    """
    if self.gguf:
      return self.gguf.files.get(name)
    path = self.path / name
    if not path.exists():
      return None
    try:
      return safe_files.read_bytes(path).decode()
    except UnicodeDecodeError:
      raise UserError(f"{path} is not UTF-8") from None


def open_folder(source: str) -> Folder:
  """Opens hf:FOLDER or hf:FILE.gguf; the folder may be an adapter of PEFT's.

  Raises:
    UserError: there is no such folder, or its config.json or the file is
      damaged.
  """
  path = pathlib.Path(source.removeprefix(_PREFIX)).expanduser()
  if path.suffix == SUFFIX:
    gguf = GGUF(path)
    return Folder(path, gguf.config, gguf)
  config = _read_object(path / "config.json")
  if config is None and (path / peft.CONFIG).exists():
    base = open_folder(str(peft.base_of(path)))
    return dataclasses.replace(base, adapters=(*base.adapters, path))
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
