"""Reads GGUF files of Llama's, Qwen's and LLaDA's architectures.

llama.cpp uses such files. What one says is returned in the form of a Hugging
Face folder: a config.json, weights by Llama's names, and a tokenizer.json.
Quantized weights are dequantized by the package `gguf`. Format:
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
# The model_type that computes the same as an architecture of llama.cpp, and
# whether a position attends only to those before it.
ARCHITECTURES = {
  "llama": ("llama", True),
  "qwen2": ("qwen2", True),
  "qwen3": ("qwen3", True),
  "llada": ("llama", False),
  "dream": ("qwen2", False),
}
# Those whose rotary pairs are next to each other in a head.
INTERLEAVED = "llama", "llada"
SIZES = {
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
SPECIAL = {
  **{"eos": "eos", "bos": "bos", "pad": "padding", "mask": "mask"},
  "sep": "seperator",  # llama.cpp's spelling
}
SHIFTED = "diffusion.shift_logits"
NAMES = {
  "token_embd": "model.embed_tokens",
  "output_norm": "model.norm",
  "output": "lm_head",
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "attn_q_norm": "self_attn.q_norm",
  "attn_k_norm": "self_attn.k_norm",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(\w+)")
NORMAL, CONTROL, OWN, UNUSED = 1, 3, 4, 5  # types of tokens
# Rules that split text into words before the merges, by llama.cpp's name.
BYTE_LEVEL = {
  "type": "ByteLevel",
  "add_prefix_space": False,
  "trim_offsets": True,
  "use_regex": True,
}
_DIGITS = {"type": "Digits", "individual_digits": True}


def _words(digits: str) -> list[dict[str, Any]]:
  """Returns the rule of Llama 3 and Qwen2, which differ in numbers."""
  pattern = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    rf"{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
  )
  split = {
    "type": "Split",
    "pattern": {"Regex": pattern},
    "behavior": "Isolated",
    "invert": False,
  }
  return [split, BYTE_LEVEL | {"use_regex": False}]


SPLITS = {
  "gpt-2": [BYTE_LEVEL],
  "smollm": [_DIGITS, BYTE_LEVEL],
  "qwen2": _words(r"\p{N}"),
  "llama-bpe": _words(r"\p{N}{1,3}"),
}
# Those where a word that is a token is not put together by merges.
WHOLE_WORDS = ("llama-bpe",)


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
    if kind not in ARCHITECTURES:
      raise UserError(
        f"{path}: general.architecture={kind!r} is not supported;"
        f" {nearest(str(kind), ARCHITECTURES)}"
      )
    self.config = self._config(kind)
    if kind in INTERLEAVED:
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
    found = {ours: self._get(f"{kind}.{key}") for ours, key in SIZES.items()}
    heads = found["num_attention_heads"]
    if found["num_key_value_heads"] is None:
      found["num_key_value_heads"] = heads
    scaling = self._get(f"{kind}.rope.scaling.type")
    if scaling not in (None, "none"):
      factor = self._get(f"{kind}.rope.scaling.factor")
      found["rope_scaling"] = {"rope_type": scaling, "factor": factor}
    rows = self.tensors.shapes.get("model.embed_tokens.weight", (0,))[0]
    special = {
      f"{name}_token_id": self._get(f"tokenizer.ggml.{key}_token_id")
      for name, key in SPECIAL.items()
    }
    tied = "lm_head.weight" not in self.tensors.shapes
    more = {"vocab_size": int(rows), "tie_word_embeddings": tied}
    model_type, causal = ARCHITECTURES[kind]
    more |= {"model_type": model_type, "is_causal": causal}
    if not causal:
      # Files without the key are Dream's.
      more["shift_outputs"] = self._get(SHIFTED) is not False
    found |= special | more
    return {name: v for name, v in found.items() if v is not None}

  def _tokenizer(self) -> str:
    """Returns the tokenizer as a tokenizer.json."""
    kind = self._get("tokenizer.ggml.model")
    rule = self._get("tokenizer.ggml.pre") or "gpt-2"
    tokens = self._get("tokenizer.ggml.tokens") or []
    merges = self._get("tokenizer.ggml.merges") or []
    if kind != "gpt2" or rule not in SPLITS:
      raise UserError(
        f"{self._path}: its tokenizer (tokenizer.ggml.model={kind!r},"
        f" tokenizer.ggml.pre={rule!r}) is not supported; supported: gpt2 with"
        f" {' or '.join(SPLITS)}"
      )
    types = self._get("tokenizer.ggml.token_type") or []
    rules = {"single_word": False, "lstrip": False, "rstrip": False}
    control = [
      {"id": i, "content": tokens[i], "normalized": False, "special": True}
      | rules
      for i, kind in enumerate(types)
      if kind == CONTROL
    ]
    unused = {i for i, kind in enumerate(types) if kind == UNUSED}
    model = {
      "type": "BPE",
      "vocab": {t: i for i, t in enumerate(tokens) if i not in unused},
      "merges": merges,
      "ignore_merges": rule in WHOLE_WORDS,
    }
    split = {"type": "Sequence", "pretokenizers": SPLITS[rule]}
    return json.dumps(
      {
        "version": "1.0",
        "added_tokens": control,
        "pre_tokenizer": split,
        "decoder": BYTE_LEVEL,
        "model": model,
      }
    )

  def _get(self, key: str) -> Any:
    field = self._reader.get_field(key)
    found = None if field is None else field.contents()
    if type(found) is not float or float(np.float32(found)) != found:
      return found
    # The number that was meant: 1e-6, not the float32 next to it.
    return float(str(np.float32(found)))


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
  if block and block[2] in NAMES:
    return f"model.layers.{block[1]}.{NAMES[block[2]]}.{block[3]}"
  stem, _, kind = name.partition(".")
  return f"{NAMES[stem]}.{kind}" if stem in NAMES else name


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
