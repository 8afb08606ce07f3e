"""Hugging Face tokenizers: tokenizer.json, run by the package `tokenizers`.

Ids are the file's own, wherever its special ids are. A mask and a padding id
that the file lacks get rows that it doesn't use, or rows behind its last.
"""

import importlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Int32, Integer

from mdm_jax.core.errors import UserError
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data import byte_pairs, chat_template
from mdm_jax.data.config import TokenizerConfig
from mdm_jax.data.sentencepiece_training import SPACE
from mdm_jax.data.tokenizer_base import Kind, Tokenizer
from mdm_jax.huggingface.families import FAMILIES
from mdm_jax.huggingface.folder import Folder

_ROUND = 128  # an embedding that grows gets a multiple of this many rows
_PROBE = " A\u00e9 b\t<s>\r\n\n\U0001f600 12 "


class HuggingFaceTokenizer(Tokenizer):
  """A tokenizer.json with a vocabulary of special ids.

  Attributes:
    fresh: ids that were added to the file's, which its model was not trained
      with.
    chat_template: the folder's template of conversations (Jinja), or "".
    lossless: whether decoding restores a text with spaces and accents.
  """

  kind = "huggingface"

  def __init__(self, fields: Mapping[str, Any]):
    """Builds the tokenizer.

    Args:
      fields: of the saved file; see `from_folder`.
    """
    self._file = fields["tokenizer"]
    self._rules = json.loads(self._file)
    self._tokens = parsed(fields["tokenizer"], "tokenizer.json")
    given = dict(fields["vocabulary"])
    given["forbidden"] = tuple(map(tuple, given["forbidden"]))
    pieces = tuple(_pieces(self._tokens, self._rules))
    content = json.dumps(dict(fields)).encode()
    super().__init__(pieces, content, Vocabulary(**given))
    self.fresh = tuple(fields["fresh"])
    self.chat_template = fields["chat_template"]
    self.lossless = self.decode(self.encode(_PROBE)) == _PROBE

  @property
  def file(self) -> str:
    """The content of tokenizer.json, as it was read."""
    return self._file

  def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, "_"]]:
    """Returns the ids of each text, using all cores.

    The name of a special token in a text is encoded as text.
    """
    found = self._tokens.encode_batch_fast(
      list(texts), add_special_tokens=False
    )
    return [np.array(one.ids, np.int32) for one in found]

  def encode_with_names(
    self, texts: Sequence[str]
  ) -> list[Int32[np.ndarray, "_"]]:
    """As `encode_batch`, but the name of a special token becomes its id."""
    # Not a second copy of the tokenizer: it may have 150,000 ids.
    self._tokens.encode_special_tokens = False
    try:
      return self.encode_batch(texts)
    finally:
      self._tokens.encode_special_tokens = True

  def decode(self, ids: Integer[np.ndarray, "N"] | Sequence[int]) -> str:
    """Returns the text of ids; special ids are left out."""
    if "ByteLevel" in _types(self._rules.get("decoder")):
      return super().decode(ids)
    # Other decoders have rules of their own for spaces.
    return self._tokens.decode([int(i) for i in ids if self.pieces[i]])


def from_folder(folder: Folder) -> HuggingFaceTokenizer:
  """Returns the tokenizer of a model, with as many ids as it has rows or more.

  Raises:
    UserError: it has none, the file is damaged, or has more ids than rows.
  """
  fields = folder.config
  rows = fields.get("embedding_size") or fields.get("vocab_size")
  return _from_files(folder, rows)


def _from_files(folder: Folder, rows: int | None) -> HuggingFaceTokenizer:
  file = folder.path / "tokenizer.json"
  text = folder.text(file.name)
  if text is None:
    raise UserError(
      f"{folder.path} has no tokenizer.json; load its tokenizer with"
      " transformers' AutoTokenizer, and save it there with save_pretrained"
    )
  tokens = parsed(text, str(file))
  vocabulary, fresh = _vocabulary(folder, tokens, rows)
  tokenizer = HuggingFaceTokenizer(
    {
      "kind": HuggingFaceTokenizer.kind,
      "tokenizer": text,
      "vocabulary": vocabulary,
      "fresh": fresh,
      "chat_template": chat_template.from_files(folder),
    }
  )
  if not tokenizer.lossless:
    logging.warning(
      "%s changes text (spaces or characters are normalised), so decoding does"
      " not restore it exactly; bits per byte count the original text's bytes.",
      file,
    )
  return tokenizer


def parsed(text: str, where: str) -> Any:
  """Returns a tokenizer of the package `tokenizers`.

  It encodes the name of a special token as text, and neither pads nor cuts.

  Args:
    text: the content of a tokenizer.json.
    where: its path, for messages.

  Raises:
    UserError: it is no tokenizer, or the package is not installed.
  """
  try:
    tokenizers = importlib.import_module("tokenizers")
  except ImportError:
    raise UserError(
      f"{where} needs the Python package 'tokenizers'; run: pip install -e"
      " '.[huggingface]'"
    ) from None
  try:
    found = tokenizers.Tokenizer.from_str(text)
  except Exception as error:  # the package raises plain Exceptions
    line = str(error).partition("\n")[0]
    raise UserError(f"{where} is not a tokenizer: {line}") from None
  found.no_padding()
  found.no_truncation()
  # A text may not forge the end of a document, or a mask.
  found.encode_special_tokens = True
  return found


# MARK: which ids are special


def _vocabulary(
  folder: Folder, tokens: Any, rows: int | None
) -> tuple[dict[str, Any], list[int]]:
  """Returns the fields of a `Vocabulary`, and the ids that were added."""
  known = 1 + max(tokens.get_vocab(with_added_tokens=True).values(), default=-1)
  if rows is not None and known > rows:
    raise UserError(
      f"{folder.path}: tokenizer.json has {known:,} ids, the model only"
      f" {rows:,} rows"
    )
  ends = _ids(folder, tokens, "eos")
  begin = next(iter(_ids(folder, tokens, "bos")), None)
  separator = next(iter(_ids(folder, tokens, "sep")), None)
  mask = next(iter(_ids(folder, tokens, "mask")), None)
  kind = folder.config.get("model_type")
  if mask is None and kind in FAMILIES:
    family = FAMILIES[kind]
    mask = rows - 1 if family.ends_with_mask else family.mask
  # A padding id that also ends texts must stay predictable.
  others = {*ends, begin, mask}
  pads = [i for i in _ids(folder, tokens, "pad") if i not in others]
  pad = next(iter(pads), None)
  # A mask can have a row that the tokenizer doesn't know.
  free, fresh = max(known, rows if mask == (rows or 0) - 1 else 0), []
  if mask is None:
    mask, free = free, free + 1
    fresh.append(mask)
  if pad is None:
    pad, free = free, free + 1
    fresh.append(pad)
  size = rows or 0
  if free > size:
    size = -(-free // _ROUND) * _ROUND
  end = next(iter(ends), None)
  beside = {i for i in (pad, mask) if i < known}
  forbidden = [(i, i + 1) for i in sorted(beside)]
  if known < size:
    forbidden.append((known, size))
  special = {"end": end, "pad": pad, "mask": mask, "begin": begin}
  special["separator"] = separator
  for name, i in special.items():
    if i is not None and not 0 <= i < size:
      raise UserError(f"{folder.path}: the {name} id {i} is not in [0, {size})")
  return special | {"size": size, "forbidden": forbidden}, fresh


def _ids(folder: Folder, tokens: Any, name: str) -> list[int]:
  """Returns the ids of a special token, the most telling first."""
  found = []
  for config in (folder.config, folder.json("generation_config.json") or {}):
    given = config.get(f"{name}_token_id")
    found += given if isinstance(given, list) else [given]
  token = (folder.json("tokenizer_config.json") or {}).get(f"{name}_token")
  token = token.get("content") if isinstance(token, dict) else token
  if isinstance(token, str):
    found.append(tokens.token_to_id(token))
  return list(dict.fromkeys(i for i in found if type(i) is int))


# MARK: what an id stands for


def _pieces(tokens: Any, rules: Mapping[str, Any]) -> Iterator[bytes]:
  """Yields the bytes of each id; empty for special and unused ones."""
  added = tokens.get_added_tokens_decoder()
  kinds = _types(rules.get("decoder"))
  symbols = byte_pairs.byte_symbols()
  known = 1 + max(tokens.get_vocab(with_added_tokens=True).values(), default=-1)
  for i in range(known):
    name = tokens.id_to_token(i) or ""
    if i in added:
      yield b"" if added[i].special else added[i].content.encode()
    elif "ByteLevel" in kinds:
      yield b"".join(symbols.get(c) or c.encode() for c in name)
    elif "ByteFallback" in kinds and _is_byte(name):
      yield bytes([int(name[3:5], 16)])
    elif "WordPiece" in kinds:
      yield (name[2:] if name[:2] == "##" else f" {name}").encode()
    else:
      yield name.replace(SPACE, " ").encode()


def _is_byte(name: str) -> bool:
  return len(name) == 6 and name.startswith("<0x") and name.endswith(">")


def _types(rule: Any) -> set[str]:
  """Returns the types of a rule of tokenizer.json and of those inside it."""
  if isinstance(rule, list):
    return set().union(*map(_types, rule))
  if not isinstance(rule, dict):
    return set()
  return {str(rule.get("type"))}.union(*map(_types, rule.values()))


# MARK: the kind


def _build(
  config: TokenizerConfig, texts: Sequence[str] = ()
) -> HuggingFaceTokenizer:
  del texts  # nothing is trained
  path = pathlib.Path(config.path)
  if not config.path or not path.exists():
    why = "there is no such file" if config.path else "not given"
    raise UserError(
      f"tokenizer.path={config.path}: {why}; tokenizer.kind=huggingface reads a"
      " tokenizer.json"
    )
  # Special ids are in the files beside it.
  config = Folder(path.parent, {}).json("config.json") or {}
  return _from_files(Folder(path.parent, config), rows=None)


KIND = Kind(
  build=_build,
  load=HuggingFaceTokenizer,
  planned=lambda config: _build(config).vocab,
)
