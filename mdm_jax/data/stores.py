"""Where the passes over blocks read documents and keep what they make of them.

On disk, each file is whole or not there: anyone may do a block, and go on where
another was killed. In memory a corpus is one block, and nothing but its rows is
written.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from mdm_jax.core.errors import UserError
from mdm_jax.data import blocks, corpora, journal, shards
from mdm_jax.data.blocks import Block
from mdm_jax.data.config import DataConfig
from mdm_jax.data.text_files import Document, Tally


@dataclasses.dataclass(frozen=True)
class OnDisk:
  """Blocks of files; records, by their names, and rows are files of a folder.

  Attributes:
    folder: with the rows.
    data: how documents are read.
  """

  folder: pathlib.Path
  data: DataConfig

  @property
  def work(self) -> pathlib.Path:
    """Where records are, until all is done."""
    return self.folder / "work"

  def __contains__(self, name: str) -> bool:
    return (self.work / name).exists()

  def __getitem__(self, name: str) -> Any:
    return journal.get(self.work / name)

  def __setitem__(self, name: str, record: Any) -> None:
    journal.put(self.work / name, record)

  def read(self, block: Block) -> tuple[list[Document], Tally]:
    """Returns the documents of a block, and what was met in reading them.

    Raises:
      UserError: they are not those that were counted.
    """
    tally = Tally(skip=self.data.on_bad_record == "skip")
    documents = blocks.read(self.data, block, tally)
    if block.sha256 and corpora.fingerprint(documents) != block.sha256:
      raise UserError(
        f"{block.spans[0].path}, or a file after it, has changed while it was"
        f" prepared; delete the folder {self.folder} and run again"
      )
    return documents, tally

  def put_rows(
    self, name: str, block: Block, parts: dict[str, np.ndarray]
  ) -> dict[str, Any]:
    """Writes the rows of a block; returns sizes and hashes, by their parts."""
    file = lambda part: shards.shard_name(name, block.number, part)
    return {p: journal.put(self.folder / file(p), parts[p]) for p in parts}


class InMemory(dict[str, Any]):
  """Corpora that are here, a block each, and records; rows are files."""

  def __init__(
    self,
    found: dict[str, tuple[list[Document], Tally]],
    folder: pathlib.Path | None = None,
    done: Callable[[], Any] = lambda: None,
  ):
    """Takes what `corpora.load_all` returns, and where rows go, if anywhere.

    Args:
      found: documents, and what was met in reading them, by the side.
      folder: for the rows and the tokenizer.
      done: is called when some rows are written.
    """
    self._found, self._done = found, done
    self.folder = folder
    self.blocks = [Block(0, "", (), side=side) for side in found]

  def read(self, block: Block) -> tuple[list[Document], Tally]:
    """Returns the documents of a block, and what was met in reading them."""
    return self._found[block.side]

  def put_rows(
    self, name: str, _: Block, parts: dict[str, np.ndarray]
  ) -> dict[str, Any]:
    """Writes rows, all there are of this name."""
    for part, array in parts.items():
      path = self.folder / shards.shard_name(name, None, part)
      np.save(path, array, allow_pickle=False)
    self._done()
    return {}


Store = OnDisk | InMemory
