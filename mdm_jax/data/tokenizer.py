"""Text to token ids and back, exactly."""

import abc
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import sentencepiece
from absl import logging
from etils import epath
from jaxtyping import Int32, Integer

from mdm_jax.core import safe_files
from mdm_jax.core.errors import UserError
from mdm_jax.core.registry import Registry
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data.config import TokenizerConfig
from mdm_jax.data.sentencepiece_training import SPACE, chunks, train

_BYTES = tuple(bytes([i]) for i in range(256))
# What parsing a file that this library did not write may raise.
_NOT_OURS = ValueError, KeyError, TypeError, AttributeError, RecursionError
_PROBE = " A\u00e9\u0301\ufb01  b\t\u3000\uff21\r\n\n<s>\U0001f600 "


class Tokenizer(abc.ABC):
  """Turns text into ids and back.

  Attributes:
    kind: its name in `TOKENIZERS`.
    filename: what `save` writes inside the folder it is given.
    pieces: the bytes that each id stands for, none where that is no text.
    content: the file's bytes, all that is needed to build the tokenizer again.
    vocab: the ids.
  """

  kind: str
  filename: str = "tokenizer.json"

  def __init__(
    self,
    pieces: tuple[bytes, ...],
    content: bytes,
    vocab: Vocabulary | None = None,
  ):
    """Makes it of the bytes of the first ids.

    Args:
      pieces: as the attribute; ids beyond them stand for no text.
      content: as the attribute.
      vocab: the ids (None: the special ones come after the pieces).
    """
    self.vocab = vocab or Vocabulary.after_text(len(pieces))
    self.pieces = pieces + (b"",) * (self.vocab.size - len(pieces))
    self.content = content

  @property
  def sha256(self) -> str:
    """The file's hash, which tells two tokenizers apart."""
    return hashlib.sha256(self.content).hexdigest()

  @abc.abstractmethod
  def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, "_"]]:
    """Returns the ids of each text; faster than one `encode` a text."""

  def encode(self, text: str) -> Int32[np.ndarray, "N"]:
    """Returns the ids of a text, without any special id."""
    return self.encode_batch([text])[0]

  def decode(self, ids: Integer[np.ndarray, "N"] | Sequence[int]) -> str:
    """Returns the text of the ids, leaving out special ones.

    Bytes that are not UTF-8, which only ids that `encode` never gives in this
    order can spell, become U+FFFD.
    """
    text = b"".join(self.pieces[i] for i in ids)
    return text.decode(errors="replace")

  def save(self, folder: epath.PathLike) -> None:
    """Writes the tokenizer's one file into a folder, made if need be."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / self.filename).write_bytes(self.content)


@dataclasses.dataclass(frozen=True)
class Kind:
  """How tokenizers of one kind are made.

  Attributes:
    build: (config, texts of the train split) -> tokenizer.
    load: (fields of the tokenizer.json it saved) -> tokenizer. What the fields
      are is the kind's affair, but `kind` is its name.
    planned: config -> its vocabulary as far as it is known without any text.
  """

  build: Callable[[TokenizerConfig, Sequence[str]], Tokenizer]
  load: Callable[[dict[str, Any]], Tokenizer]
  planned: Callable[[TokenizerConfig], Vocabulary]


TOKENIZERS: Registry[Kind] = Registry("kind of tokenizer", "tokenizer.kind")


def build(config: TokenizerConfig, texts: Sequence[str]) -> Tokenizer:
  """Returns the tokenizer a config asks for, trained on the texts if need be.

  Raises:
    UserError: the given model can't be used, or there is too little text or
      too small a vocabulary to train one.
  """
  return TOKENIZERS[config.kind].build(config, texts)


def planned_vocabulary(config: TokenizerConfig) -> Vocabulary:
  """Returns the vocabulary a config asks for, without any text.

  Of a SentencePiece model to train, as if the text gave that many pieces; of
  characters, as if there were 256.
  """
  return TOKENIZERS[config.kind].planned(config)


def is_saved_in(folder: epath.PathLike) -> bool:
  """Whether `save` wrote a tokenizer into the folder."""
  names = SentencePieceTokenizer.filename, CharTokenizer.filename
  return any((epath.Path(folder) / name).exists() for name in names)


def load_tokenizer(folder: epath.PathLike) -> Tokenizer:
  """Returns the tokenizer that `save` wrote into a folder.

  Raises:
    UserError: there is none, or its file is damaged.
  """
  model = epath.Path(folder) / SentencePieceTokenizer.filename
  if model.exists():
    return SentencePieceTokenizer(_checked(model))
  path = epath.Path(folder) / CharTokenizer.filename
  if not path.exists():
    raise UserError(f"{folder} holds no {model.name} and no {path.name}")
  content = safe_files.read_bytes(path)
  try:
    fields = json.loads(content)
    TOKENIZERS.check(fields["kind"], f"{path}: kind")
    return TOKENIZERS[fields["kind"]].load(fields)
  except _NOT_OURS as e:
    raise UserError(f"{path} is not a tokenizer this library wrote") from e


# MARK: bytes and characters


class CharTokenizer(Tokenizer):
  """One id a known character, and one a UTF-8 byte of any other."""

  def __init__(self, kind: str, characters: str):
    self.kind = kind
    self._known = _code_points(characters)
    fields = {"kind": kind, "characters": characters}
    pieces = _BYTES + tuple(c.encode() for c in characters)
    super().__init__(pieces, json.dumps(fields).encode())

  def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, "_"]]:
    """Returns the ids of each text."""
    return [self._encode(text) for text in texts]

  def _encode(self, text: str) -> Int32[np.ndarray, "N"]:
    if not len(self._known):
      return np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    points = _code_points(text)
    index = np.searchsorted(self._known, points).clip(max=len(self._known) - 1)
    rare = self._known[index] != points
    widths = 1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF)
    ids = np.repeat(index + 256, np.where(rare, widths, 1)).astype(np.int32)
    spelt = points[rare].tobytes().decode("utf-32-le").encode()
    ids[np.repeat(rare, np.where(rare, widths, 1))] = list(spelt)
    return ids


def _load_characters(fields: dict[str, Any]) -> Tokenizer:
  return CharTokenizer(fields["kind"], fields["characters"])


TOKENIZERS.register(
  "byte",
  Kind(
    build=lambda config, texts: CharTokenizer("byte", ""),
    load=_load_characters,
    planned=lambda config: Vocabulary.after_text(256),
  ),
)
TOKENIZERS.register(
  "char",
  Kind(
    build=lambda config, texts: CharTokenizer(
      "char", "".join(sorted(set().union(*texts)))
    ),
    load=_load_characters,
    planned=lambda config: Vocabulary.after_text(256 + 256),
  ),
)


def _code_points(text: str) -> np.ndarray:
  return np.frombuffer(text.encode("utf-32-le"), "<u4")


# MARK: SentencePiece


class SentencePieceTokenizer(Tokenizer):
  """A SentencePiece model with byte fallback.

  Ids are the model's own without its unknown and control symbols, which no
  text is ever encoded to. A model trained here gives every text back exactly.
  """

  kind = "sentencepiece"
  filename = "tokenizer.model"

  def __init__(self, content: bytes):
    self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
    names = [self._model.id_to_piece(i) for i in range(len(self._model))]
    kept = [i for i in range(len(names)) if not self._is_special(i)]
    super().__init__(tuple(self._piece(i, names[i]) for i in kept), content)
    self._ids = np.full(len(names), -1, np.int32)
    self._ids[kept] = np.arange(len(kept))
    # The space symbol itself would come back as a space, so it is spelt.
    self._spelt = [
      self._model.piece_to_id(f"<0x{b:02X}>") for b in b"\xe2\x96\x81"
    ]
    self.lossless = self._is_lossless()

  def _is_special(self, i: int) -> bool:
    m = self._model
    return m.is_unknown(i) or m.is_control(i) or m.is_unused(i)

  def _piece(self, i: int, name: str) -> bytes:
    if self._model.is_byte(i):
      return bytes([int(name[3:5], 16)])
    return name.replace(SPACE, " ").encode()

  def _is_lossless(self) -> bool:
    self.lossless = False  # a model that normalises may not be cut into chunks
    return self.decode(self.encode(_PROBE)) == _PROBE

  def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, "_"]]:
    """Returns the ids of each text, on all cores."""
    cut = [chunks(t) if self.lossless else [t] for t in texts]
    flat = list(itertools.chain.from_iterable(cut))
    encoded = self._model.encode(flat, num_threads=os.cpu_count() or 1)
    parts = iter(
      self._spelt if self.lossless and chunk == SPACE else ids
      for chunk, ids in zip(flat, encoded, strict=True)
    )
    return [self._join(itertools.islice(parts, len(text))) for text in cut]

  def _join(self, parts: Iterable[list[int]]) -> Int32[np.ndarray, "N"]:
    ids = np.fromiter(itertools.chain.from_iterable(parts), np.int32)
    ids = self._ids[ids]
    if np.any(ids < 0):
      raise UserError("the SentencePiece model uses its unknown symbol in text")
    return ids


def _sentencepiece(
  config: TokenizerConfig, texts: Sequence[str]
) -> SentencePieceTokenizer:
  if config.path:
    return _given(config.path)
  return SentencePieceTokenizer(train(config.vocab_size, texts))


def _planned_pieces(config: TokenizerConfig) -> Vocabulary:
  if config.path:
    return _given(config.path).vocab
  return Vocabulary.after_text(config.vocab_size)


def _not_json(fields: dict[str, Any]) -> Tokenizer:
  raise ValueError(f"{fields['kind']} is saved as a model")


TOKENIZERS.register(
  "sentencepiece", Kind(_sentencepiece, _not_json, _planned_pieces)
)


def _given(path: str) -> SentencePieceTokenizer:
  file = epath.Path(path).expanduser()
  if not file.is_file():
    raise UserError(f"tokenizer.path={path}: there is no such file")
  tokenizer = SentencePieceTokenizer(_checked(file))
  if not tokenizer.lossless:
    logging.warning(
      "tokenizer.path=%s changes text (spaces or characters are normalised), so"
      " decoding does not give it back exactly and bits per byte are of the"
      " original text's bytes.",
      path,
    )
  return tokenizer


def _checked(path: epath.Path) -> bytes:
  """Returns a model's bytes once it is clear that they can be used."""
  content = safe_files.read_bytes(path)
  try:
    if not content:
      raise RuntimeError("empty")
    model = sentencepiece.SentencePieceProcessor(model_proto=content)
  except RuntimeError as e:
    raise UserError(f"{path} is not a SentencePiece model") from e
  if sum(model.is_byte(i) for i in range(len(model))) != 256:
    raise UserError(
      f"{path} has no byte fallback, so text would be lost; train it with"
      " --byte_fallback=true"
    )
  return content
