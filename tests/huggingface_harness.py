"""Tiny folders as Hugging Face's libraries save them, and what they compute."""

import json
import pathlib

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mdm_jax.huggingface import safetensors

ROWS = 300  # of the embedding, more than the tokenizer has ids
CONFIG = {
  "model_type": "llama",
  "vocab_size": ROWS,
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 48,
  "rms_norm_eps": 1e-5,
  "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
  "tie_word_embeddings": False,
  "eos_token_id": 256,
}
QWEN3 = {
  "model_type": "qwen3",
  "head_dim": 6,
  "tie_word_embeddings": True,
  "is_causal": False,
}
QWEN2 = {"model_type": "qwen2", "num_key_value_heads": 4}


def weights(
  config: dict, seed: int = 0, rows: int = ROWS
) -> dict[str, np.ndarray]:
  """Returns random weights of a Llama, Qwen2 or Qwen3, by their names."""
  draw = np.random.default_rng(seed)
  d, f = config["hidden_size"], config["intermediate_size"]
  k = config.get("head_dim") or d // config["num_attention_heads"]
  q = config["num_attention_heads"] * k
  kv = config["num_key_value_heads"] * k
  shapes = {"model.embed_tokens.weight": (rows, d), "model.norm.weight": (d,)}
  if not config["tie_word_embeddings"]:
    shapes["lm_head.weight"] = (rows, d)
  of_layer = {
    "input_layernorm.weight": (d,),
    "post_attention_layernorm.weight": (d,),
    "self_attn.q_proj.weight": (q, d),
    "self_attn.k_proj.weight": (kv, d),
    "self_attn.v_proj.weight": (kv, d),
    "self_attn.o_proj.weight": (d, q),
    "mlp.gate_proj.weight": (f, d),
    "mlp.up_proj.weight": (f, d),
    "mlp.down_proj.weight": (d, f),
  }
  if config["model_type"] == "qwen3":
    of_layer |= {f"self_attn.{n}_norm.weight": (k,) for n in "qk"}
  if config["model_type"] in ("qwen2", "Dream"):
    sizes = {"q": q, "k": kv, "v": kv}
    of_layer |= {f"self_attn.{n}_proj.bias": (sizes[n],) for n in sizes}
  for i in range(config["num_hidden_layers"]):
    shapes |= {f"model.layers.{i}.{n}": shape for n, shape in of_layer.items()}
  return {
    name: (draw.normal(size=shape) * 0.3 + ("norm" in name)).astype(np.float32)
    for name, shape in shapes.items()
  }


def save(folder: pathlib.Path, config: dict, tensors: dict | None = None):
  """Saves a model and a tokenizer into a folder; returns the weights."""
  config = CONFIG | config
  tensors = weights(config) if tensors is None else tensors
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(config))
  safetensors.write(folder / "model.safetensors", tensors)
  tokenizer().save(str(folder / "tokenizer.json"))
  return tensors


def save_shards(folder: pathlib.Path, tensors: dict) -> None:
  """Replaces a folder's weights by two files and an index of them."""
  (folder / "model.safetensors").unlink(missing_ok=True)
  files = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
  of = {name: files[i % 2] for i, name in enumerate(tensors)}
  for file in files:
    part = {name: tensors[name] for name in tensors if of[name] == file}
    safetensors.write(folder / file, part)
  index = json.dumps({"metadata": {"total_size": 0}, "weight_map": of})
  (folder / "model.safetensors.index.json").write_text(index)


def tokenizer() -> Tokenizer:
  """Returns a byte-level tokenizer: 256 bytes, <end>, and a merge."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  ids = {symbol: i for i, symbol in enumerate(alphabet)}
  ids |= {"<end>": 256, "th": 257}
  found = Tokenizer(models.BPE(vocab=ids, merges=[("t", "h")]))
  found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  found.decoder = decoders.ByteLevel()
  found.add_special_tokens(["<end>"])
  return found


def logits(config: dict, tensors: dict, ids: np.ndarray) -> np.ndarray:
  """Returns a model's logits [L, V], written out with NumPy in float64."""
  c = CONFIG | config
  w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
  heads, groups = c["num_attention_heads"], c["num_key_value_heads"]
  causal = c.get("is_causal", True)
  x = w["model.embed_tokens.weight"][ids]
  for i in range(c["num_hidden_layers"]):
    part = lambda name, i=i: w.get(f"model.layers.{i}.{name}")
    h = _norm(x, part("input_layernorm.weight"), c)
    q, k, v = (
      _heads(h, part, name, number, c)
      for name, number in (("q", heads), ("k", groups), ("v", groups))
    )
    mixed = []
    for head in range(heads):
      group = head // (heads // groups)
      scores = q[:, head] @ k[:, group].T / np.sqrt(q.shape[-1])
      if causal:
        scores = np.where(np.tri(len(ids), dtype=bool), scores, -np.inf)
      share = np.exp(scores - scores.max(-1, keepdims=True))
      mixed.append(share / share.sum(-1, keepdims=True) @ v[:, group])
    x = x + np.concatenate(mixed, -1) @ part("self_attn.o_proj.weight").T
    h = _norm(x, part("post_attention_layernorm.weight"), c)
    gate = h @ part("mlp.gate_proj.weight").T
    up = h @ part("mlp.up_proj.weight").T
    x = x + (gate / (1 + np.exp(-gate)) * up) @ part("mlp.down_proj.weight").T
  table = "lm_head.weight"
  table = table if table in w else "model.embed_tokens.weight"
  return _norm(x, w["model.norm.weight"], c) @ w[table].T


def _norm(x, scale, config):
  square = (x**2).mean(-1, keepdims=True)
  return x / np.sqrt(square + config["rms_norm_eps"]) * scale


def _heads(h, part, name, number, config):
  heads = h @ part(f"self_attn.{name}_proj.weight").T
  bias = part(f"self_attn.{name}_proj.bias")
  heads = (heads if bias is None else heads + bias).reshape(len(h), number, -1)
  if name == "v":
    return heads
  scale = part(f"self_attn.{name}_norm.weight")
  heads = heads if scale is None else _norm(heads, scale, config)
  half = heads.shape[-1] // 2
  theta = config["rope_parameters"]["rope_theta"]
  angles = np.arange(len(h))[:, None] * theta ** -(np.arange(half) / half)
  cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
  left, right = heads[..., :half], heads[..., half:]
  turned = left * cos - right * sin, right * cos + left * sin
  return np.concatenate(turned, -1)
