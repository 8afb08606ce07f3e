"""Writes GGUF files, which llama.cpp loads.

A file is a header, metadata by key, the name, shape and place of each tensor,
and the tensors' values in float32. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import json
import math
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from mdm_jax.core.errors import UserError
from mdm_jax.huggingface.gguf_file import (
  ARCHITECTURES,
  BYTE_LEVEL,
  CONTROL,
  INTERLEAVED,
  NAMES,
  NORMAL,
  OWN,
  SHIFTED,
  SIZES,
  SPECIAL,
  SPLITS,
  UNUSED,
  WHOLE_WORDS,
)
from mdm_jax.huggingface.safetensors import Unread

FILE = "model.gguf"
_VERSION, _ALIGNMENT, _FLOAT32 = 3, 32, 0
_UINT32, _INT32, _FLOAT, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_FORMATS = {bool: (_BOOL, "?"), int: (_UINT32, "I"), float: (_FLOAT, "f")}
# Settings of a BPE model of tokenizer.json that llama.cpp does not have.
_SETTINGS = (
  *("dropout", "unk_token", "byte_fallback", "fuse_unk"),
  *("continuing_subword_prefix", "end_of_word_suffix"),
)
_NONE = "model.gguf has no tokenizer, give llama.cpp ids: "


def architecture_of(config: Mapping[str, Any]) -> str | None:
  """Returns llama.cpp's name of a config.json's model; None: it has none."""
  wanted = config["model_type"], config["is_causal"]
  return next(
    (k for k, found in ARCHITECTURES.items() if found == wanted), None
  )


def check(config: Mapping[str, Any]) -> None:
  """Raises UserError if llama.cpp can't compute what a config.json describes.

  Args:
    config: config.json, with Llama's keys.
  """
  kind, family = architecture_of(config), config["model_type"]
  scaling = config["rope_parameters"]["rope_type"]
  if kind is None:
    raise _refused(
      "qk_norm=True",
      "its masked models have no norms of queries and keys",
      "train with model.qk_norm=False",
    )
  if family == "qwen3" and config.get("attention_bias"):
    raise _refused("qkv_bias=True", "it has no such model with model.qk_norm")
  size, heads = config["hidden_size"], config["num_attention_heads"]
  if family == "qwen2" and config["head_dim"] * heads != size:
    raise _refused(
      f"head_dim={config['head_dim']}",
      f"with model.qkv_bias its heads have the size {size} / {heads}",
    )
  if config["is_causal"] and config.get("shift_outputs"):
    raise _refused("shift_outputs=True", "its causal models are not shifted")
  if scaling not in ("default", "linear"):
    raise _refused(
      f"rope_scaling.kind={scaling!r}",
      "only 'default' and 'linear' are written",
    )


def _refused(field: str, why: str, other: str = "") -> UserError:
  return UserError(
    f"model.{field} can't be exported with --format=gguf, for llama.cpp: {why};"
    f" use --format=transformers{', or ' if other else ''}{other}"
  )


def metadata(config: Mapping[str, Any], name: str) -> dict[str, Any]:
  """Returns what a file says about its model, without the tokenizer.

  Args:
    config: config.json, with Llama's keys.
    name: of the model.
  """
  kind, rope = architecture_of(config), config["rope_parameters"]
  sizes = dict(config) | {"rope_theta": rope["rope_theta"]}
  found = {f"{kind}.{key}": sizes[ours] for ours, key in SIZES.items()}
  found |= {
    "general.architecture": kind,
    "general.name": name,
    "general.file_type": _FLOAT32,
    f"{kind}.vocab_size": config["vocab_size"],
    f"{kind}.attention.value_length": config["head_dim"],
    f"{kind}.rope.dimension_count": config["head_dim"],
  }
  if rope["rope_type"] == "linear":
    found[f"{kind}.rope.scaling.type"] = "linear"
    found[f"{kind}.rope.scaling.factor"] = rope["factor"]
  if not config["is_causal"]:
    found[f"{kind}.attention.causal"] = False
    found[SHIFTED] = config.get("shift_outputs", False)
  return found


def tokenizer(
  config: Mapping[str, Any], file: str | None, template: str
) -> tuple[dict[str, Any], str]:
  """Returns what a file says about its tokenizer, and what is inexact, or "".

  Args:
    config: config.json.
    file: the text of tokenizer.json, None if there is none.
    template: of conversations (Jinja), or "".
  """
  rules = json.loads(file) if file else {}
  rule, why = _rule(rules)
  if rule is None:
    return {"tokenizer.ggml.model": "none"}, why
  tokens, types = _tokens(rules, config)
  pairs = rules["model"]["merges"]
  special = {
    f"tokenizer.ggml.{there}_token_id": config[f"{here}_token_id"]
    for here, there in SPECIAL.items()
    if f"{here}_token_id" in config
  }
  spans = config["mdm_jax"]["forbidden"]
  found = special | {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": rule,
    "tokenizer.ggml.tokens": tokens,
    "tokenizer.ggml.token_type": types,
    "tokenizer.ggml.merges": [
      pair if isinstance(pair, str) else " ".join(pair) for pair in pairs
    ],
    # As in training; without the key llama.cpp decides by the rule's name.
    "tokenizer.ggml.add_bos_token": "bos_token_id" in config,
    "tokenizer.ggml.add_eos_token": False,
    "tokenizer.ggml.suppress_tokens": [
      i for first, past in spans for i in range(first, past)
    ],
  }
  found |= {"tokenizer.chat_template": template} if template else {}
  return found, why


def tensors(
  weights: Mapping[str, Unread], config: Mapping[str, Any]
) -> dict[str, Unread]:
  """Returns weights by llama.cpp's names, with its order of rotary pairs.

  Args:
    weights: by Llama's names.
    config: config.json.
  """
  heads = {}
  if architecture_of(config) in INTERLEAVED:
    heads["attn_q"] = config["num_attention_heads"]
    heads["attn_k"] = config["num_key_value_heads"]
  stems = {theirs: ours for ours, theirs in NAMES.items()}
  found = {}
  for name, weight in weights.items():
    stem, _, kind = name.removeprefix("model.layers.").rpartition(".")
    layer, dot, rest = stem.partition(".")
    if name.startswith("model.layers."):
      ours = stems[rest]
      name = f"blk.{layer}.{ours}.{kind}"
      weight = _interleaved(weight, heads[ours]) if ours in heads else weight
    else:
      name = f"{stems[layer + dot + rest]}.{kind}"
    found[name] = weight
  return found


def write(
  path: pathlib.Path,
  fields: Mapping[str, Any],
  weights: Mapping[str, Unread],
) -> None:
  """Writes a file, one tensor after the other.

  Args:
    path: the file.
    fields: metadata: numbers, flags, texts, and lists of texts or of ids.
    weights: by llama.cpp's names.
  """
  counts = struct.pack("<IQQ", _VERSION, len(weights), len(fields))
  parts = [b"GGUF", counts]
  for key, value in fields.items():
    kind, data = _value(value)
    parts += [_text(key), struct.pack("<I", kind), data]
  place = 0
  for name, weight in weights.items():
    # From the last axis to the first.
    axes = len(weight.shape)
    shape = struct.pack(f"<I{axes}Q", axes, *reversed(weight.shape))
    parts += [_text(name), shape, struct.pack("<IQ", _FLOAT32, place)]
    place += _size(weight) + -_size(weight) % _ALIGNMENT
  head = b"".join(parts)
  with path.open("wb") as file:
    file.write(head + bytes(-len(head) % _ALIGNMENT))
    for weight in weights.values():
      values = np.ascontiguousarray(weight.read(), "<f4")
      file.write(values.reshape(-1).view(np.uint8).data)
      file.write(bytes(-_size(weight) % _ALIGNMENT))


def _value(value: Any) -> tuple[int, bytes]:
  """Returns a value's type, and its bytes."""
  if isinstance(value, str):
    return _STRING, _text(value)
  if isinstance(value, list):
    ids = bool(value) and isinstance(value[0], int)
    kind = struct.pack("<IQ", _INT32 if ids else _STRING, len(value))
    if ids:
      return _ARRAY, kind + np.array(value, "<i4").tobytes()
    return _ARRAY, kind + b"".join(map(_text, value))
  kind, letter = _FORMATS[type(value)]
  return kind, struct.pack(f"<{letter}", value)


def _text(text: str) -> bytes:
  data = text.encode()
  return struct.pack("<Q", len(data)) + data


def _size(weight: Unread) -> int:
  return 4 * math.prod(weight.shape)


def _interleaved(weight: Unread, heads: int) -> Unread:
  """Puts rotary pairs next to each other; `gguf_file` does the opposite."""

  def read() -> np.ndarray:
    rows = weight.read()
    size, width = rows.shape
    halves = rows.reshape(heads, 2, size // heads // 2, width)
    return halves.swapaxes(1, 2).reshape(size, width)

  return dataclasses.replace(weight, read=read)


def _rule(rules: Mapping[str, Any]) -> tuple[str | None, str]:
  """Returns llama.cpp's name of the split into words, and what is inexact."""
  model = rules.get("model", {})
  if model.get("type") != "BPE" or any(model.get(key) for key in _SETTINGS):
    return None, _NONE + "of tokenizers it has byte-level BPE only, exactly"
  steps = _steps(rules.get("pre_tokenizer"))
  # Without merges, every byte is a token however text is split.
  if not model["merges"] and steps == _steps(
    {**BYTE_LEVEL, "use_regex": False}
  ):
    steps = _steps(BYTE_LEVEL)
  whole = bool(model.get("ignore_merges"))
  for name, known in SPLITS.items():
    if steps == _steps(known) and whole == (name in WHOLE_WORDS):
      why = ""
      if normalizer := rules.get("normalizer"):
        kind = normalizer["type"]
        why = f"llama.cpp does not change text as the tokenizer does ({kind})"
      return name, why
  return None, f"{_NONE}its splits into words are {', '.join(SPLITS)}"


def _steps(rule: Any) -> list[dict[str, Any]]:
  """Returns the steps of a pre_tokenizer, with what does not change ids."""
  if isinstance(rule, dict):
    rule = rule["pretokenizers"] if rule["type"] == "Sequence" else [rule]
  whole = {"trim_offsets": True}
  return [
    whole
    | ({"use_regex": True} if s["type"] == "ByteLevel" else {})
    | s
    | whole
    for s in rule or ()
  ]


def _tokens(
  rules: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[list[str], list[int]]:
  """Returns a name for every row of the embedding, and its type."""
  found = {i: (name, NORMAL) for name, i in rules["model"]["vocab"].items()}
  for token in rules.get("added_tokens", ()):
    kind = CONTROL if token["special"] else OWN
    found[token["id"]] = token["content"], kind
  names = {name for name, _ in found.values()}
  roles = {config.get(f"{role}_token_id"): role for role in ("pad", "mask")}
  for i in range(config["vocab_size"]):
    if i not in found:
      # llama.cpp wants a name for each, and no name twice.
      name = f"<|{roles[i]}|>" if i in roles else f"<|unused {i}|>"
      while name in names:
        name += "_"
      names.add(name)
      found[i] = name, CONTROL if i in roles else UNUSED
  tokens = [found[i] for i in range(config["vocab_size"])]
  return [name for name, _ in tokens], [kind for _, kind in tokens]
