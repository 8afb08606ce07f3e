"""Stores that passes read documents from and write records and rows to.

`OnDisk` writes every record as a file, atomically, so any process can work on
any block and resume after a kill. `InMemory` holds a corpus as one block, and
writes only rows.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from mdm_jax.core.errors import UserError
from mdm_jax.data import blocks, corpora, journal, shards
from mdm_jax.data.blocks import Block
from mdm_jax.data.config import DataConfig
from mdm_jax.data.text_files import Document, Tally


@dataclasses.dataclass(frozen=True)
class OnDisk:
  """A store of records and rows as files; documents are read block by block.

  Attributes:
    folder: where the rows go.
    data: how documents are read.
  """

  folder: pathlib.Path
  data: DataConfig

  @property
  def work(self) -> pathlib.Path:
    """Folder of the records; it is deleted when the preparation is finished."""
    return self.folder / "work"

  def __contains__(self, name: str) -> bool:
    return (self.work / name).exists()

  def __getitem__(self, name: str) -> Any:
    return journal.get(self.work / name)

  def __setitem__(self, name: str, record: Any) -> None:
    journal.put(self.work / name, record)

  def read(self, block: Block) -> tuple[list[Document], Tally]:
    """Returns the documents of a block and the tally of reading them.

    Raises:
      UserError: they have changed since they were counted.
    """
    tally = Tally(skip=self.data.on_bad_record == "skip")
    documents = blocks.read(self.data, block, tally)
    # Every pass reads the text anew, so it must still be the text counted.
    if block.sha256 and corpora.fingerprint(documents) != block.sha256:
      raise UserError(
        f"{block.spans[0].path}, or a file after it, has changed while it was"
        f" prepared; delete the folder {self.folder} and run again"
      )
    return documents, tally

  def put_rows(
    self, name: str, block: Block, parts: dict[str, np.ndarray]
  ) -> dict[str, Any]:
    """Writes a block's rows; returns {part: size and hash of its file}."""
    file = lambda part: shards.shard_name(name, block.number, part)
    return {p: journal.put(self.folder / file(p), parts[p]) for p in parts}


class InMemory(dict[str, Any]):
  """A store of loaded corpora, one block each; records stay in memory."""

  def __init__(
    self,
    found: dict[str, tuple[list[Document], Tally]],
    folder: pathlib.Path | None = None,
  ):
    """Takes loaded corpora.

    Args:
      found: documents and tally by split, as from `corpora.load_all`.
      folder: where rows and the tokenizer go; None if none will be written.
    """
    self._found, self.folder = found, folder
    # Neither root nor spans: the documents are already here.
    self.blocks = [Block(0, "", (), side=side) for side in found]

  def read(self, block: Block) -> tuple[list[Document], Tally]:
    """Returns the documents of a block and the tally of reading them."""
    return self._found[block.side]

  def put_rows(
    self, name: str, _: Block, parts: dict[str, np.ndarray]
  ) -> dict[str, Any]:
    """Writes all rows of this name; the caller hashes the files itself."""
    for part, array in parts.items():
      path = self.folder / shards.shard_name(name, None, part)
      np.save(path, array, allow_pickle=False)
    return {}


Store = OnDisk | InMemory
