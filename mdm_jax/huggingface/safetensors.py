"""Reads and writes safetensors files, memory-mapped, with NumPy alone.

A file is 8 bytes with the length of a JSON header, the header, and the tensors'
bytes in row-major order. The header gives each tensor's dtype, shape and place.
Nothing in a file is executed. Format:
https://github.com/huggingface/safetensors#format
"""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from mdm_jax.core import safe_files
from mdm_jax.core.errors import UserError

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MOST_HEADER = 100 * 2**20  # the format's own limit
_DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(jnp.bfloat16),
}
# Tensors that may be in a file, but are no weights that this library reads.
_OTHER_SIZES = {
  **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
  **dict.fromkeys(("U16", "I16"), 2),
  **dict.fromkeys(("U32", "I32"), 4),
  **dict.fromkeys(("U64", "I64"), 8),
}


class Tensors(Mapping[str, Any]):
  """The tensors of one file by name; values are memory-mapped, not read."""

  def __init__(self, path: pathlib.Path):
    """Reads and checks a file's header.

    Raises:
      UserError: the file is damaged, truncated, or no safetensors file.
    """
    self._path = path
    try:
      self._bytes = np.memmap(path, np.uint8, mode="r")
    except (OSError, ValueError) as error:  # ValueError: the file is empty
      why = getattr(error, "strerror", None) or "it is empty"
      raise UserError(f"{path} can't be read: {why}") from None
    self._start, self._entries = self._header()

  def __iter__(self) -> Iterator[str]:
    return iter(self._entries)

  def __len__(self) -> int:
    return len(self._entries)

  def __getitem__(self, name: str) -> np.ndarray:
    """Returns a view of a tensor in the file.

    Raises:
      UserError: its dtype is not supported.
    """
    dtype, shape, start = self._entries[name]
    if dtype not in _DTYPES:
      raise UserError(
        f"{self._path}: {name} has dtype {dtype}; supported:"
        f" {', '.join(_DTYPES)}"
      )
    return np.frombuffer(
      self._bytes, _DTYPES[dtype], math.prod(shape), self._start + start
    ).reshape(shape)

  def _header(self) -> tuple[int, dict[str, tuple[str, tuple[int, ...], int]]]:
    size = len(self._bytes)
    length = int.from_bytes(self._bytes[:8].tobytes(), "little")
    if size < 8 or length > min(_MOST_HEADER, size - 8):
      raise self._damaged(
        f"its header would have {length:,} bytes, of {size:,} in the file"
      )
    try:
      header = json.loads(
        self._bytes[8 : 8 + length].tobytes(), object_pairs_hook=_without_twins
      )
    except (ValueError, RecursionError) as error:
      raise self._damaged(f"its header is not valid JSON: {error}") from None
    if not isinstance(header, dict):
      raise self._damaged("its header is not a JSON object")
    header.pop("__metadata__", None)
    entries, places = {}, []
    for name, fields in header.items():
      entries[name], end = self._entry(name, fields)
      places.append((entries[name][2], end, name))
    self._check_places(sorted(places), size - 8 - length)
    return 8 + length, entries

  def _entry(self, name: str, fields: Any) -> tuple[Any, int]:
    """Returns (dtype, shape, start) of a tensor, and where it ends."""
    sizes = {n: d.itemsize for n, d in _DTYPES.items()} | _OTHER_SIZES
    try:
      dtype, shape = fields["dtype"], tuple(fields["shape"])
      start, end = fields["data_offsets"]
      if any(type(n) is not int or n < 0 for n in (*shape, start, end)):
        raise ValueError
      wanted = math.prod(shape) * sizes[dtype]
    except (KeyError, TypeError, ValueError):
      text = json.dumps(fields)[:80]
      raise self._damaged(f"its header describes {name!r} as {text}") from None
    if end - start != wanted:
      raise self._damaged(
        f"{name!r} has {end - start:,} bytes; {dtype}{list(shape)} needs"
        f" {wanted:,}"
      )
    return (dtype, shape, start), end

  def _check_places(self, places: list[tuple[int, int, str]], size: int):
    """Raises UserError unless the tensors fill the file, without overlaps."""
    expected = 0
    for start, end, name in places:
      if start != expected:
        raise self._damaged(
          f"{name!r} begins at byte {start:,} of the data, not {expected:,}"
        )
      expected = end
    if expected != size:
      raise self._damaged(
        f"its tensors have {expected:,} bytes, the file has {size:,}"
      )

  def _damaged(self, why: str) -> UserError:
    return UserError(f"{self._path} is not a whole safetensors file: {why}")


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) != len(pairs):
    raise ValueError("a name occurs twice")
  return found


@dataclasses.dataclass(frozen=True)
class Unread:
  """A tensor that is made only when it is written.

  Attributes:
    shape: its shape.
    dtype: its dtype, one of those supported.
    read: returns its values.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def write(path: pathlib.Path, tensors: Mapping[str, Any]) -> None:
  """Writes a file, one tensor after the other.

  Args:
    path: the file.
    tensors: arrays of a supported dtype or `Unread`, by name.
  """
  names = {dtype: name for name, dtype in _DTYPES.items()}
  header, end = {"__metadata__": {"format": "pt"}}, 0
  for name, tensor in tensors.items():
    start, end = end, end + tensor.nbytes
    header[name] = {
      "dtype": names[tensor.dtype],
      "shape": list(tensor.shape),
      "data_offsets": [start, end],
    }
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)  # aligned, as the format recommends
  with path.open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
      values = tensor.read() if isinstance(tensor, Unread) else tensor
      # As bytes: a bfloat16 array has no buffer of its own.
      flat = np.ascontiguousarray(values).reshape(-1)
      file.write(flat.view(np.uint8).data)


def write_folder(
  folder: pathlib.Path, tensors: Mapping[str, Any], most: int
) -> list[str]:
  """Writes one file, or several and their index; returns the files' names.

  Args:
    folder: where to.
    tensors: see `write`.
    most: bytes of a file, unless a single tensor has more.
  """
  parts, size = [{}], 0
  for name, tensor in tensors.items():
    if parts[-1] and size + tensor.nbytes > most:
      parts.append({})
      size = 0
    parts[-1][name] = tensor
    size += tensor.nbytes
  if len(parts) == 1:
    write(folder / FILE, tensors)
    return [FILE]
  stem, suffix = FILE.split(".")
  files = {
    f"{stem}-{i:05}-of-{len(parts):05}.{suffix}": part
    for i, part in enumerate(parts, start=1)
  }
  for file, part in files.items():
    write(folder / file, part)
  index = {
    "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
    "weight_map": {name: file for file, part in files.items() for name in part},
  }
  (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
  return [*files, INDEX]


class Shards(Mapping[str, Any]):
  """The tensors of several files, which an index lists; opened when needed."""

  def __init__(self, folder: pathlib.Path):
    """Reads the index.

    Raises:
      UserError: it is damaged, or names a file outside of the folder.
    """
    self._index = folder / INDEX
    content = safe_files.read_json(self._index)
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict):
      raise UserError(f"{self._index} has no weight_map")
    self._files = {
      name: safe_files.check_name(file, self._index)
      for name, file in files.items()
    }
    self._open = functools.cache(lambda file: Tensors(folder / file))
    self._check_all()

  def _check_all(self) -> None:
    for file in sorted({*self._files.values()}):
      listed = {name for name, at in self._files.items() if at == file}
      differ = listed ^ set(self._open(file))
      if differ:
        raise UserError(
          f"{self._index} and {file} disagree about {sorted(differ)[0]!r}"
        )

  def __iter__(self) -> Iterator[str]:
    return iter(self._files)

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, name: str) -> np.ndarray:
    return self._open(self._files[name])[name]


def read(folder: pathlib.Path) -> Mapping[str, Any]:
  """Returns the tensors of a folder, arrays by name, in one file or several.

  Raises:
    UserError: there are none, or a file is damaged.
  """
  if (folder / FILE).exists():
    return Tensors(folder / FILE)
  if (folder / INDEX).exists():
    return Shards(folder)
  pickles = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))
  why = f"{folder} has neither {FILE} nor {INDEX}"
  if pickles:
    why += (
      f"; {pickles[0].name} is a pickle, which could run code: save the model"
      " with safe_serialization=True"
    )
  raise UserError(why)
