"""Rows in many files (shards), memory-mapped as they are needed.

A set of rows is a list of shards, each with one .npy file per field, and an
index that lists the number of rows, sizes and hashes of every shard.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64

from mdm_jax.core import safe_files
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data import inputs, row_checks
from mdm_jax.data.rows import Fields, Rows
from mdm_jax.data.splits import HELD_OUT

TABLE = "texts"  # further file of each held-out shard
_MAPPED = 512  # most files mapped at once; Linux allows about 65,000 maps


def shard_name(name: str, number: int | None, part: str) -> str:
  """Returns the file name of one field of a shard (None: of an only shard)."""
  return f"{name}{'' if number is None else f'.{number:06d}'}.{part}.npy"


def index_name(name: str) -> str:
  """Returns the file name of the index of a set of rows."""
  return f"{name}.shards.json"


class Shards:
  """A read-only array [N, L] whose rows lie in many files.

  It has the few methods of an array that readers of rows use. A file is mapped
  when one of its rows is read; the most recently used files stay mapped.
  """

  def __init__(
    self, paths: list[pathlib.Path], rows: list[int], length: int, dtype: str
  ):
    """Opens nothing yet.

    Args:
      paths: files, in the order of their rows.
      rows: number of rows in each file.
      length: tokens per row.
      dtype: of all files.
    """
    self._ends = np.cumsum(rows, dtype=np.int64)
    self._starts = self._ends - np.array(rows, np.int64)
    self.dtype = np.dtype(dtype)
    self.shape = int(self._ends[-1]) if rows else 0, length
    # A cache per object: one on the method would keep every `Shards` alive.
    self._map = functools.lru_cache(_MAPPED)(lambda shard: _map(paths[shard]))

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(self, key: Any) -> np.ndarray:
    """Returns rows by number, by slice, or by an array of numbers."""
    if isinstance(key, slice):
      key = np.arange(*key.indices(len(self)))
    numbers = np.asarray(key, np.int64)
    flat = numbers.reshape(-1)
    flat = np.where(flat < 0, flat + len(self), flat)
    if flat.size and not 0 <= flat.min() <= flat.max() < len(self):
      raise IndexError(f"row {key} of {len(self)}")
    return self._gather(flat).reshape(*numbers.shape, self.shape[1])

  def _gather(self, numbers: np.ndarray) -> np.ndarray:
    out = np.empty((len(numbers), self.shape[1]), self.dtype)
    # "right" passes over shards without rows.
    shards = np.searchsorted(self._ends, numbers, side="right")
    # File by file, so each is mapped once per call, in whatever order rows are.
    for shard in np.unique(shards):
      here = np.flatnonzero(shards == shard)
      out[here] = self._map(int(shard))[numbers[here] - self._starts[shard]]
    return out


def _map(path: pathlib.Path) -> np.ndarray:
  return np.load(path, mmap_mode="r", allow_pickle=False)


@dataclasses.dataclass(frozen=True)
class Index:
  """The index of a set of rows.

  Attributes:
    folder: where the shards are.
    name: of the rows, as `stage_1` or `test`.
    length: tokens per row.
    dtype: dtype of each field that these rows have.
    shards: for each shard its number of "rows", and by file "bytes" and
      "sha256".
    numbered: whether file names contain the shard's number; those of the cache
      do not.
  """

  folder: pathlib.Path
  name: str
  length: int
  dtype: dict[str, str]
  shards: list[dict[str, Any]]
  numbered: bool = True

  @property
  def parts(self) -> tuple[str, ...]:
    """The files of each shard: its fields, and the table if held out."""
    return (*self.dtype, TABLE) if self.name in HELD_OUT else (*self.dtype,)

  def path(self, number: int, part: str) -> pathlib.Path:
    """Returns the path of one file of a shard."""
    shown = number if self.numbered else None
    return self.folder / shard_name(self.name, shown, part)

  def open(self) -> Rows:
    """Returns the rows, without reading any."""
    return Rows(**{name: self._open(name) for name in self.dtype})

  def _open(self, part: str) -> Shards | np.ndarray:
    paths = [self.path(i, part) for i in range(len(self.shards))]
    if len(paths) == 1:
      return _map(paths[0])
    rows = [shard["rows"] for shard in self.shards]
    return Shards(paths, rows, self.length, self.dtype[part])

  def texts(self) -> Int64[np.ndarray, "M 5"]:
    """Returns the table of held-out texts of all shards."""
    numbers = range(len(self.shards))
    tables = [np.load(self.path(i, TABLE), allow_pickle=False) for i in numbers]
    return _joined(tables, [shard["rows"] for shard in self.shards])

  def missing(self) -> str | None:
    """Describes the first missing file or wrong size; None if all is well."""
    for i, shard in enumerate(self.shards):
      for part in self.parts:
        path, size = self.path(i, part), shard[part]["bytes"]
        if not path.is_file():
          return f"{path} is missing"
        if path.stat().st_size != size:
          return f"{path} has {path.stat().st_size:,} bytes, not {size:,}"
    return None

  def damaged(self, number: int, vocab: Vocabulary) -> str | None:
    """Describes the first wrong hash or value of a shard; reads all of it."""
    shard = self.shards[number]
    for part in self.parts:
      path = self.path(number, part)
      if inputs.file_sha256(path) != shard[part]["sha256"]:
        return str(path)
    return self.wrong(number, vocab)

  def wrong(self, number: int, vocab: Vocabulary) -> str | None:
    """Describes the first invalid value of a shard, without checking hashes."""
    rows, arrays = self.shards[number]["rows"], {}
    for part in self.parts:
      path = self.path(number, part)
      try:
        arrays[part] = _map(path)
      except (ValueError, EOFError):
        return str(path)
    path, found = self.path(number, "tokens"), len(arrays["tokens"])
    fields = {name: arrays[name] for name in self.dtype}
    if wrong := row_checks.find_wrong(fields, self.length, vocab):
      return f"{path}, {wrong}"
    if found != rows:
      return f"{path}: {found} rows, not {rows}"
    if TABLE in arrays:
      segments, table = arrays["segments"], arrays[TABLE]
      if wrong := row_checks.find_wrong_texts(segments, table):
        return f"{self.path(number, TABLE)}, {wrong}"
    return None


def _joined(parts: Sequence[np.ndarray], rows: Sequence[int]) -> np.ndarray:
  """Concatenates tables of texts, renumbering their rows and documents.

  Args:
    parts: tables of consecutive documents, each of which counts from 0.
    rows: number of rows that each table is about.
  """
  joined, row, document = [np.zeros((0, 5), np.int64)], 0, 0
  for part, count in zip(parts, rows, strict=True):
    # Offset rows and documents only: the other columns count within them.
    joined.append(part + np.array([row, 0, document, 0, 0]))
    row += count
    document += int(part[:, 2].max(initial=-1)) + 1
  return np.concatenate(joined)


def read_index(folder: pathlib.Path, name: str) -> Index:
  """Reads the index of a set of rows.

  Raises:
    UnsafeFile: the file is not a valid index.
  """
  path = folder / index_name(name)
  found = safe_files.read_json(path)
  try:
    index = Index(
      folder, name, found["length"], dict(found["dtype"]), found["shards"]
    )
    # Fail here rather than later, with an error that names no file.
    for shard in index.shards:
      for number in (shard["rows"], *(shard[p]["bytes"] for p in index.parts)):
        int(number)
    for dtype in Fields(**index.dtype).fields.values():
      np.dtype(dtype)
    return index
  except (KeyError, TypeError, ValueError) as error:
    raise safe_files.UnsafeFile(f"{path} is no index of shards") from error


def index_bytes(
  length: int, dtype: dict[str, str], shards: list[dict[str, Any]]
) -> bytes:
  """Returns an index as JSON, with one line per shard."""
  lines = ",\n".join(map(json.dumps, shards))
  head = json.dumps({"length": length, "dtype": dtype})[:-1]
  return f'{head}, "shards": [\n{lines}\n]}}\n'.encode()
