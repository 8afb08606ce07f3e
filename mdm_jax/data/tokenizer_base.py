"""What a tokenizer is, and the registry of their kinds."""

import abc
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int32, Integer

from mdm_jax.core.registry import Registry
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data.config import TokenizerConfig


class Tokenizer(abc.ABC):
  """Turns text into ids and back.

  Attributes:
    kind: name in `TOKENIZERS`.
    filename: name of the file that `save` writes.
    pieces: the bytes that each id stands for; empty for ids that are no text.
    content: the file's bytes, from which the tokenizer can be rebuilt.
    vocab: vocabulary of the ids.

  Example:
    >>> tokenizer = build(TokenizerConfig(kind="byte"), texts=[])
    >>> tokenizer.encode("Hi")
    array([ 72, 105], dtype=int32)
    >>> tokenizer.decode([72, 105, tokenizer.vocab.end])
    'Hi'
  """

  kind: str
  filename: str = "tokenizer.json"

  def __init__(
    self,
    pieces: tuple[bytes, ...],
    content: bytes,
    vocab: Vocabulary | None = None,
  ):
    """Sets up the vocabulary.

    Args:
      pieces: bytes of the first ids; later ids stand for no text.
      content: bytes of the file to save.
      vocab: vocabulary of the ids (None: special ids follow the pieces).
    """
    self.vocab = vocab or Vocabulary.after_text(len(pieces))
    self.pieces = pieces + (b"",) * (self.vocab.size - len(pieces))
    self.content = content

  @property
  def sha256(self) -> str:
    """Hash of the file; equal hashes mean equal tokenizers."""
    return hashlib.sha256(self.content).hexdigest()

  @abc.abstractmethod
  def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, "_"]]:
    """Returns the ids of each text; faster than calling `encode` on each."""

  def encode_with_names(
    self, texts: Sequence[str]
  ) -> list[Int32[np.ndarray, "_"]]:
    """As `encode_batch`, but the name of a special token becomes its id.

    For texts that a chat template wrote. Most tokenizers have no such names.
    """
    return self.encode_batch(texts)

  def encode(self, text: str) -> Int32[np.ndarray, "N"]:
    """Returns the ids of a text, without special ids."""
    return self.encode_batch([text])[0]

  def decode(self, ids: Integer[np.ndarray, "N"] | Sequence[int]) -> str:
    """Returns the text of ids; special ids are left out.

    Bytes that are not UTF-8 become U+FFFD. `encode` never gives such a sequence
    of ids, but a model may.
    """
    text = b"".join(self.pieces[i] for i in ids)
    return text.decode(errors="replace")

  def save(self, folder: epath.PathLike) -> None:
    """Writes the tokenizer's file into a folder; creates the folder."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / self.filename).write_bytes(self.content)


@dataclasses.dataclass(frozen=True)
class Kind:
  """How tokenizers of one kind are built, loaded and planned.

  Attributes:
    build: (config, texts of the train split) -> tokenizer.
    load: fields of the saved tokenizer.json -> tokenizer. Its "kind" is the
      name in `TOKENIZERS`, the other fields are up to the kind.
    planned: config -> vocabulary, as far as it is known without any text.
  """

  build: Callable[[TokenizerConfig, Sequence[str]], Tokenizer]
  load: Callable[[dict[str, Any]], Tokenizer]
  planned: Callable[[TokenizerConfig], Vocabulary]


TOKENIZERS: Registry[Kind] = Registry("kind of tokenizer", "tokenizer.kind")
