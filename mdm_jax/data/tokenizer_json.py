"""Writes a tokenizer as the tokenizer.json of the package `tokenizers`.

Ids stay the same. Whether the file is exact is not assumed but tried: it has to
give the same ids for texts put together from the tokenizer's own pieces, and
for texts that are easy to get wrong.
"""

import dataclasses
import json
import random
from typing import Any

from mdm_jax.data import byte_pairs
from mdm_jax.data.huggingface_tokenizer import HuggingFaceTokenizer, parsed
from mdm_jax.data.sentencepiece_training import CHUNK
from mdm_jax.data.tokenizer import SentencePieceTokenizer
from mdm_jax.data.tokenizer_base import Tokenizer

_SPECIAL = "end", "separator", "pad", "mask"
# A byte's name is a piece that text could contain: it is cut, and costs more
# than the characters one by one.
_NAME_OF_A_BYTE, _NEVER = "<(?=0x[0-9A-F]{2}>)", -1e6
_TEXTS, _PIECES = 64, 200  # texts that are tried, and pieces of each
_LONGEST = 100  # of runs of one character that are tried
_HARD = (
  "a <0x41><0xE2> b<unk></s><s><pad><|end|><|mask|>",
  "\u2581space\u2581\u2581 symbol \u2581",
  "\0 NUL\0 lone \r and \r\n and \n\n\n\n  spaces   everywhere  \t\n ",
  "\ufeff\ufb01 e\u0301 \uff21 \u2047 \u2585 it's DON'T 12345 _x_",
  "\U0001f469\u200d\U0001f680 \U0010ffff",
  "x" * 2500 + " " + "word " * 900 + "\u4e2d" * 2100 + "\n" * 7,
  "\u0417\u0434\u0440\u0430\u0432\u043e \u0645\u0631\u062d\u0628\u0627"
  " \u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35"
  " \u3053\u3093\u306b\u3061\u306f \u4f60\u597d \u05e9\u05dc\u05d5\u05dd"
  " \uc548\ub155 \u0393\u03b5\u03b9\u03ac",
  "",
)


@dataclasses.dataclass(frozen=True)
class Written:
  """A tokenizer in the form of `tokenizers`.

  Attributes:
    content: the text of tokenizer.json, None if it would give other ids.
    names: names of the special ids that the file has, by their role.
    why: what is inexact, in words.
  """

  content: str | None
  names: dict[str, str]
  why: str = ""


def written(tokenizer: Tokenizer) -> Written:
  """Returns a tokenizer as a tokenizer.json; a file that was read comes back.

  Raises:
    UserError: the package `tokenizers` is not installed.
  """
  if isinstance(tokenizer, HuggingFaceTokenizer):
    file = parsed(tokenizer.file, "tokenizer.json")
    found = {n: getattr(tokenizer.vocab, n) for n in ("begin", *_SPECIAL)}
    names = {n: file.id_to_token(i) for n, i in found.items() if i is not None}
    return Written(tokenizer.file, {n: t for n, t in names.items() if t})
  rules = _RULES.get(tokenizer.kind)
  if rules is None:
    kind = f"tokenizer.kind={tokenizer.kind}"
    return Written(None, {}, f"{kind} has no counterpart in tokenizer.json")
  names = {name: f"<|{name}|>" for name in _SPECIAL}
  added = [
    {
      "id": getattr(tokenizer.vocab, name),
      "content": token,
      "special": True,
      **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
    }
    for name, token in names.items()
  ]
  fields = {"version": "1.0", "added_tokens": added} | rules(tokenizer)
  content = json.dumps(fields, ensure_ascii=False)
  return _tried(tokenizer, Written(content, names))


def _tried(tokenizer: Tokenizer, made: Written) -> Written:
  """Returns what was made, with what is inexact about it."""
  file, why = parsed(made.content, "tokenizer.json"), ""
  for text in (*_HARD, *_texts(tokenizer)):
    wanted = tokenizer.encode(text).tolist()
    got = file.encode(text, add_special_tokens=False).ids
    if sorted(got) != sorted(wanted) or file.decode(got) != text:
      why = f"tokenizer.json would give other ids for {text[:40]!r}"
      return Written(None, {}, why)
    if got != wanted:
      # Equally likely: SentencePiece's float32 sums decide, there the first.
      why = "tokenizer.json may order pieces of a run, as of '=', differently"
  return dataclasses.replace(made, why=why)


def _texts(tokenizer: Tokenizer) -> list[str]:
  """Returns texts of the tokenizer's pieces, in a random order."""
  draw = random.Random(0)
  pieces = [p for p in (_text(piece) for piece in tokenizer.pieces) if p]
  repeated = sorted({p[0] for p in pieces if len(p) > 2 and {*p} == {p[0]}})
  runs = ["\n".join(c * n for n in range(1, _LONGEST)) for c in repeated]
  return runs + [
    "".join(draw.choices(pieces, k=_PIECES)) for _ in range(_TEXTS)
  ]


def _text(piece: bytes) -> str:
  try:
    return piece.decode()
  except UnicodeDecodeError:  # a part of a character
    return ""


# MARK: the kinds


def _bytes(tokenizer: Tokenizer) -> dict[str, Any]:
  del tokenizer  # all are the same
  symbols = {b[0]: symbol for symbol, b in byte_pairs.byte_symbols().items()}
  vocab = {symbols[i]: i for i in range(256)}
  return _byte_level(vocab, [], words=False)


def _gpt2(tokenizer: Tokenizer) -> dict[str, Any]:
  symbols = {b: symbol for symbol, b in byte_pairs.byte_symbols().items()}
  name = lambda piece: "".join(symbols[bytes([byte])] for byte in piece)
  vocab = {name(p): i for i, p in enumerate(tokenizer.pieces) if p}
  return _byte_level(vocab, json.loads(tokenizer.content)["merges"], words=True)


def _byte_level(vocab, merges, words: bool) -> dict[str, Any]:
  rule = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": words,
  }
  model = {"type": "BPE", "vocab": vocab, "merges": merges}
  return {"pre_tokenizer": rule, "decoder": rule, "model": model}


def _characters(tokenizer: Tokenizer) -> dict[str, Any]:
  vocab = {f"<0x{i:02X}>": i for i in range(256)}
  for i, piece in enumerate(tokenizer.pieces):
    if i >= 256 and piece:
      vocab[piece.decode()] = i
  model = {
    "type": "BPE",
    "vocab": vocab,
    "merges": [],  # so every character is a token, or its bytes are
    "byte_fallback": True,
  }
  return {"decoder": _FALLBACK, "model": model}


def _sentencepiece(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
  """Returns a unigram model with spaces in place of SentencePiece's symbol.

  So that symbol in a text is unknown, and becomes bytes as with us. The text is
  cut as we cut it: then all optima are of the same chunks.
  """
  scores = tokenizer.scores()
  pieces = []
  for piece, score, is_byte in scores:
    if is_byte:
      pieces.append([f"<0x{piece[0]:02X}>", _NEVER])
    else:
      pieces.append([piece.decode(), score])
  # Unknown characters need an id, but byte fallback leaves none of them.
  unknown = next(i for i, (_, _, is_byte) in enumerate(scores) if is_byte)
  model = {
    "type": "Unigram",
    "unk_id": unknown,
    "vocab": pieces,
    "byte_fallback": True,
  }
  cuts = [
    {
      "type": "Split",
      "pattern": {"Regex": pattern},
      "behavior": behavior,
      "invert": False,
    }
    for pattern, behavior in (
      (CHUNK, "Isolated"),
      (_NAME_OF_A_BYTE, "MergedWithPrevious"),
    )
  ]
  cut = {"type": "Sequence", "pretokenizers": cuts}
  return {"pre_tokenizer": cut, "decoder": _FALLBACK, "model": model}


_FALLBACK = {
  "type": "Sequence",
  "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}],
}
_RULES = {
  "byte": _bytes,
  "char": _characters,
  "sentencepiece": _sentencepiece,
  "gpt2": _gpt2,
}
