"""Reads GGUF files of the Llama architecture, as llama.cpp uses them.

What such a file says is returned in the form of a Hugging Face folder: a
config.json, weights by Llama's names, and a tokenizer.json. Quantized weights
are dequantized by the package `gguf`. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import importlib
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mdm_jax.core.errors import UserError, nearest

SUFFIX = ".gguf"
_ARCHITECTURES = ("llama",)
_SIZES = {
  "num_hidden_layers": "block_count",
  "hidden_size": "embedding_length",
  "intermediate_size": "feed_forward_length",
  "num_attention_heads": "attention.head_count",
  "num_key_value_heads": "attention.head_count_kv",
  "head_dim": "attention.key_length",
  "rms_norm_eps": "attention.layer_norm_rms_epsilon",
  "max_position_embeddings": "context_length",
  "rope_theta": "rope.freq_base",
}
_SPECIAL = {"eos": "eos", "bos": "bos", "pad": "padding", "mask": "mask"}
_NAMES = {
  "token_embd": "model.embed_tokens",
  "output_norm": "model.norm",
  "output": "lm_head",
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(\w+)")
_CONTROL = 3  # type of tokens that are no text
# Rules that split text into words before the merges, by llama.cpp's name.
_BYTE_LEVEL = {
  "type": "ByteLevel",
  "add_prefix_space": False,
  "trim_offsets": True,
  "use_regex": True,
}
_DIGITS = {"type": "Digits", "individual_digits": True}
_SPLITS = {"gpt-2": [_BYTE_LEVEL], "smollm": [_DIGITS, _BYTE_LEVEL]}


class GGUF:
  """A GGUF file in the form of a Hugging Face folder.

  Attributes:
    config: what config.json would say.
    files: the text of other files, by name.
    tensors: the weights by their names in a Llama of Hugging Face.
  """

  def __init__(self, path: pathlib.Path):
    """Reads a file's metadata; weights are read where they are used.

    Raises:
      UserError: the file is damaged, of another architecture, or has a
        tokenizer that is not byte-level BPE; or the package is missing.
    """
    self._path, self._reader = path, _open(path)
    self.tensors = _Weights(self._reader)
    kind = self._get("general.architecture")
    if kind not in _ARCHITECTURES:
      raise UserError(
        f"{path}: general.architecture={kind!r} is not supported;"
        f" {nearest(str(kind), _ARCHITECTURES)}"
      )
    self.config = self._config(kind)
    self.tensors.heads = {
      "attn_q": self.config["num_attention_heads"],
      "attn_k": self.config["num_key_value_heads"],
    }
    template = self._get("tokenizer.chat_template")
    self.files = {
      "tokenizer.json": self._tokenizer(),
      "tokenizer_config.json": json.dumps({"chat_template": template}),
    }

  def _config(self, kind: str) -> dict[str, Any]:
    found = {ours: self._get(f"{kind}.{key}") for ours, key in _SIZES.items()}
    heads = found["num_attention_heads"]
    if found["num_key_value_heads"] is None:
      found["num_key_value_heads"] = heads
    scaling = self._get(f"{kind}.rope.scaling.type")
    if scaling not in (None, "none"):
      found["rope_scaling"] = {"rope_type": scaling}
    rows = self.tensors.shapes.get("model.embed_tokens.weight", (0,))[0]
    special = {
      f"{name}_token_id": self._get(f"tokenizer.ggml.{key}_token_id")
      for name, key in _SPECIAL.items()
    }
    tied = "lm_head.weight" not in self.tensors.shapes
    more = {"vocab_size": int(rows), "tie_word_embeddings": tied}
    found |= special | more | {"model_type": kind}
    return {name: v for name, v in found.items() if v is not None}

  def _tokenizer(self) -> str:
    """Returns the tokenizer as a tokenizer.json."""
    kind = self._get("tokenizer.ggml.model")
    rule = self._get("tokenizer.ggml.pre") or "gpt-2"
    tokens = self._get("tokenizer.ggml.tokens") or []
    merges = self._get("tokenizer.ggml.merges") or []
    if kind != "gpt2" or rule not in _SPLITS:
      raise UserError(
        f"{self._path}: its tokenizer (tokenizer.ggml.model={kind!r},"
        f" tokenizer.ggml.pre={rule!r}) is not supported; supported: gpt2 with"
        f" {' or '.join(_SPLITS)}"
      )
    types = self._get("tokenizer.ggml.token_type") or []
    rules = {"single_word": False, "lstrip": False, "rstrip": False}
    control = [
      {"id": i, "content": tokens[i], "normalized": False, "special": True}
      | rules
      for i, kind in enumerate(types)
      if kind == _CONTROL
    ]
    model = {
      "type": "BPE",
      "vocab": {token: i for i, token in enumerate(tokens)},
      "merges": merges,
    }
    split = {"type": "Sequence", "pretokenizers": _SPLITS[rule]}
    return json.dumps(
      {
        "version": "1.0",
        "added_tokens": control,
        "pre_tokenizer": split,
        "decoder": _BYTE_LEVEL,
        "model": model,
      }
    )

  def _get(self, key: str) -> Any:
    field = self._reader.get_field(key)
    return None if field is None else field.contents()


class _Weights(Mapping[str, Any]):
  """The weights of a file; each is dequantized whenever it is looked up.

  Attributes:
    shapes: the shape of each.
    heads: number of heads of the weights whose rows llama.cpp interleaves.
  """

  def __init__(self, reader: Any):
    self._tensors = {_theirs(t.name): t for t in reader.tensors}
    # Shapes are stored from the last axis to the first.
    self.shapes = {
      name: tuple(map(int, reversed(t.shape)))
      for name, t in self._tensors.items()
    }
    self.heads: dict[str, int] = {}

  def __iter__(self) -> Iterator[str]:
    return iter(self._tensors)

  def __len__(self) -> int:
    return len(self._tensors)

  def __getitem__(self, name: str) -> np.ndarray:
    tensor = self._tensors[name]
    quants = importlib.import_module("gguf.quants")
    try:
      values = quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
      raise UserError(
        f"{tensor.name} has type {tensor.tensor_type.name}, which the package"
        " gguf can't dequantize"
      ) from None
    values = values.reshape(self.shapes[name])
    block = _BLOCK.fullmatch(tensor.name)
    heads = self.heads.get(block[2]) if block else None
    return values if heads is None else _halves(values, heads)


def _halves(rows: np.ndarray, heads: int) -> np.ndarray:
  """Puts the rotary pairs of each head K/2 rows apart, not next to each other.

  llama.cpp rotates entries 2i and 2i + 1 of a head, Hugging Face and we entries
  i and i + K/2.
  """
  size, width = rows.shape
  pairs = rows.reshape(heads, size // heads // 2, 2, width)
  return pairs.swapaxes(1, 2).reshape(size, width)


def _theirs(name: str) -> str:
  """Returns a tensor's name in a Llama of Hugging Face."""
  block = _BLOCK.fullmatch(name)
  if block and block[2] in _NAMES:
    return f"model.layers.{block[1]}.{_NAMES[block[2]]}.{block[3]}"
  stem, _, kind = name.partition(".")
  return f"{_NAMES[stem]}.{kind}" if stem in _NAMES else name


def _open(path: pathlib.Path) -> Any:
  try:
    gguf = importlib.import_module("gguf")
  except ImportError:
    raise UserError(
      f"{path} needs the Python package 'gguf'; run: pip install -e"
      " '.[huggingface]'"
    ) from None
  try:
    return gguf.GGUFReader(path)
  except Exception as error:  # of many types, where a file is damaged
    line = str(error).partition("\n")[0]
    raise UserError(f"{path} is not a whole GGUF file: {line}") from None
