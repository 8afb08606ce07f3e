"""Tokenizers: text to ids and back, without loss."""

import itertools
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import sentencepiece
from absl import logging
from etils import epath
from jaxtyping import Int32

from mdm_jax.core import safe_files
from mdm_jax.core.errors import UserError
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data import byte_pairs, huggingface_tokenizer
from mdm_jax.data.config import TokenizerConfig
from mdm_jax.data.sentencepiece_training import SPACE, chunks, train
from mdm_jax.data.tokenizer_base import TOKENIZERS as TOKENIZERS
from mdm_jax.data.tokenizer_base import Kind as Kind
from mdm_jax.data.tokenizer_base import Tokenizer as Tokenizer

_BYTES = tuple(bytes([i]) for i in range(256))
# What parsing a file may raise if this library did not write it.
_NOT_OURS = ValueError, KeyError, TypeError, AttributeError, RecursionError
# Text that normalisation would change: composed and full-width characters,
# ligatures, all kinds of space, a control symbol's name, an emoji.
_PROBE = " A\u00e9\u0301\ufb01  b\t\u3000\uff21\r\n\n<s>\U0001f600 "


def build(config: TokenizerConfig, texts: Sequence[str]) -> Tokenizer:
  """Returns the tokenizer of a config, trained on the texts if necessary.

  Raises:
    UserError: the given model can't be used, or the text or vocabulary is too
      small to train one.
  """
  return TOKENIZERS[config.kind].build(config, texts)


def planned_vocabulary(config: TokenizerConfig) -> Vocabulary:
  """Returns the vocabulary of a config before any text is read.

  For SentencePiece, this assumes that training finds all `vocab_size` pieces;
  for characters, that there are 256.
  """
  return TOKENIZERS[config.kind].planned(config)


def is_saved_in(folder: epath.PathLike) -> bool:
  """Whether a tokenizer is saved in a folder."""
  names = SentencePieceTokenizer.filename, CharTokenizer.filename
  return any((epath.Path(folder) / name).exists() for name in names)


def load_tokenizer(folder: epath.PathLike) -> Tokenizer:
  """Loads the tokenizer that `save` wrote into a folder.

  Raises:
    UserError: there is none, or its file is damaged.
  """
  model = epath.Path(folder) / SentencePieceTokenizer.filename
  if model.exists():
    return SentencePieceTokenizer(_checked(model))
  path = epath.Path(folder) / CharTokenizer.filename
  if not path.exists():
    raise UserError(f"{folder} contains neither {model.name} nor {path.name}")
  content = safe_files.read_bytes(path)
  try:
    fields = json.loads(content)
    TOKENIZERS.check(fields["kind"], f"{path}: kind")
    return TOKENIZERS[fields["kind"]].load(fields)
  except _NOT_OURS as e:
    raise UserError(f"{path} is not a tokenizer file of this library") from e


# MARK: bytes and characters


class CharTokenizer(Tokenizer):
  """One id per known character; other characters as one id per UTF-8 byte.

  Ids 0 to 255 are the bytes. Without known characters it is a byte tokenizer.
  """

  def __init__(self, kind: str, characters: str):
    self.kind = kind
    # `characters` are sorted: `_encode` looks them up by binary search.
    self._known = _code_points(characters)
    fields = {"kind": kind, "characters": characters}
    pieces = _BYTES + tuple(c.encode() for c in characters)
    super().__init__(pieces, json.dumps(fields).encode())

  def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, "_"]]:
    """Returns the ids of each text."""
    return [self._encode(text) for text in texts]

  def _encode(self, text: str) -> Int32[np.ndarray, "N"]:
    if not len(self._known):  # a byte tokenizer: ids are the bytes
      return np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    points = _code_points(text)
    # Vectorised: look all code points up, then spell the unknown ones, whose
    # number of ids is their number of UTF-8 bytes.
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
  # Four bytes a character, so NumPy can compare whole texts.
  return np.frombuffer(text.encode("utf-32-le"), "<u4")


# MARK: SentencePiece


class SentencePieceTokenizer(Tokenizer):
  """A SentencePiece model with byte fallback.

  Ids are the model's without its unknown and control symbols, to which no text
  is encoded. A model trained by this library restores every text exactly.
  """

  kind = "sentencepiece"
  filename = "tokenizer.model"

  def __init__(self, content: bytes):
    self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
    names = [self._model.id_to_piece(i) for i in range(len(self._model))]
    self._kept = kept = [
      i for i in range(len(names)) if not self._is_special(i)
    ]
    super().__init__(tuple(self._piece(i, names[i]) for i in kept), content)
    # From the model's ids to ours; -1 for symbols that have none.
    self._ids = np.full(len(names), -1, np.int32)
    self._ids[kept] = np.arange(len(kept))
    # U+2581 in a text would be decoded as a space, so it is encoded as its
    # three UTF-8 bytes.
    self._spelt = [
      self._model.piece_to_id(f"<0x{b:02X}>") for b in b"\xe2\x96\x81"
    ]
    self.lossless = self._is_lossless()

  def _is_special(self, i: int) -> bool:
    m = self._model
    return m.is_unknown(i) or m.is_control(i) or m.is_unused(i)

  def _piece(self, i: int, name: str) -> bytes:
    if self._model.is_byte(i):
      # Byte pieces are named like <0x0A>.
      return bytes([int(name[3:5], 16)])
    return name.replace(SPACE, " ").encode()

  def scores(self) -> list[tuple[bytes, float, bool]]:
    """Returns each piece, its log-probability, and whether it is a byte."""
    m = self._model
    return [
      (piece, m.get_score(i), m.is_byte(i))
      for piece, i in zip(self.pieces, self._kept, strict=False)
    ]

  def _is_lossless(self) -> bool:
    # While False, `encode` passes whole texts: chunks are only right for models
    # that don't normalise.
    self.lossless = False
    return self.decode(self.encode(_PROBE)) == _PROBE

  def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, "_"]]:
    """Returns the ids of each text, using all cores."""
    cut = [chunks(t) if self.lossless else [t] for t in texts]
    flat = list(itertools.chain.from_iterable(cut))
    encoded = self._model.encode(flat, num_threads=os.cpu_count() or 1)
    parts = iter(
      # `chunks` makes U+2581 a chunk of its own.
      self._spelt if self.lossless and chunk == SPACE else ids
      for chunk, ids in zip(flat, encoded, strict=True)
    )
    return [self._join(itertools.islice(parts, len(text))) for text in cut]

  def _join(self, parts: Iterable[list[int]]) -> Int32[np.ndarray, "N"]:
    ids = np.fromiter(itertools.chain.from_iterable(parts), np.int32)
    ids = self._ids[ids]
    if np.any(ids < 0):
      raise UserError(
        "the SentencePiece model encodes text as its unknown symbol"
      )
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
      " decoding does not restore it exactly; bits per byte count the original"
      " text's bytes.",
      path,
    )
  return tokenizer


def _checked(path: epath.Path) -> bytes:
  """Returns a model file's bytes; raises UserError if it is unusable."""
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


# MARK: GPT-2's


class BytePairTokenizer(Tokenizer):
  """GPT-2's tokenizer, with its ids; the end of a document is its 50256.

  It is saved with its merges, so a run doesn't need the file they came from.
  """

  kind = "gpt2"

  def __init__(self, merges: Sequence[str]):
    self._pairs = byte_pairs.BytePairs(merges)
    fields = {"kind": self.kind, "merges": list(merges)}
    super().__init__(self._pairs.pieces, json.dumps(fields).encode())

  def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, "_"]]:
    """Returns the ids of each text."""
    return [np.array(self._pairs.encode(text), np.int32) for text in texts]


def _byte_pairs(
  config: TokenizerConfig, texts: Sequence[str] = ()
) -> BytePairTokenizer:
  del texts  # nothing is trained
  file = epath.Path(config.path).expanduser()
  if not config.path or not file.is_file():
    why = "there is no such file" if config.path else "not given"
    raise UserError(
      f"tokenizer.path={config.path}: {why}; tokenizer.kind=gpt2 reads GPT-2's"
      " file of merges, merges.txt or vocab.bpe"
    )
  content = safe_files.read_bytes(file).decode(errors="replace")
  try:
    return BytePairTokenizer(byte_pairs.read_merges(content))
  except UserError as error:
    raise UserError(f"tokenizer.path={config.path}: {error}") from None


TOKENIZERS.register(
  "gpt2",
  Kind(
    build=_byte_pairs,
    load=lambda fields: BytePairTokenizer(fields["merges"]),
    planned=lambda config: _byte_pairs(config).vocab,
  ),
)


# MARK: Hugging Face's

TOKENIZERS.register("huggingface", huggingface_tokenizer.KIND)
