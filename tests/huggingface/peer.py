"""Saves small random models of transformers, and what they compute.

  python peer.py FOLDER

runs in an environment with torch and transformers. Each model's folder gets
expected.npz: rows of ids, their texts and positions, and the logits.
"""

import json
import pathlib
import sys

import torch
import transformers

ROWS, LENGTH = 64, 12
CONTEXT = 24
TEXTS = "a cat", "the cat sat on the mat", "12 dogs and a cat. " * 5
SIZES = {
  "vocab_size": ROWS,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "initializer_range": 0.2,
}
BOTH_WAYS = {"is_causal": False}
# Wavelengths of 6 to 200 tokens: scaling divides some and keeps others.
ROPE = {"rope_theta": 100.0, "factor": 3.0}
MODELS = {
  "llama": ("Llama", {}),
  "llama_tied": ("Llama", {"tie_word_embeddings": True, "head_dim": 16}),
  "llama_both_ways": ("Llama", BOTH_WAYS),
  "qwen2": ("Qwen2", {}),
  "qwen2_both_ways": ("Qwen2", BOTH_WAYS),
  "qwen3": ("Qwen3", {"head_dim": 10}),
  "linear": ("Llama", {"rope_parameters": ROPE | {"rope_type": "linear"}}),
  "llama3": (
    "Llama",
    {
      "rope_parameters": ROPE
      | {
        "rope_type": "llama3",
        "original_max_position_embeddings": 32,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
      }
    },
  ),
  "yarn": (
    "Qwen2",
    {
      "rope_parameters": ROPE
      | {
        "rope_type": "yarn",
        "original_max_position_embeddings": 32,
        "beta_fast": 4,
        "truncate": False,
      }
    },
  ),
  "qwen3_both_ways": ("Qwen3", BOTH_WAYS | {"tie_word_embeddings": True}),
}
# Texts of each row: two packed, one alone, one before padding.
SEGMENTS = torch.tensor(
  [[1] * 5 + [2] * 7, [1] * LENGTH, [1] * 8 + [0] * (LENGTH - 8)]
)


def make(kind, fields):
  torch.manual_seed(0)
  config = getattr(transformers, f"{kind}Config")(**SIZES | fields)
  model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
  for name, value in model.named_parameters():
    if "norm" in name or "bias" in name:
      torch.nn.init.normal_(value, float("norm" in name), 0.3)
  return model


def logits(model, ids):
  """Logits of packed and padded rows, by a mask of all pairs."""
  causal = getattr(model.config, "is_causal", True)
  allowed = SEGMENTS[:, :, None] == SEGMENTS[:, None]
  if causal:
    allowed &= torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
  mask = torch.zeros(allowed.shape).masked_fill(~allowed, -1e30)[:, None]
  with torch.no_grad():
    return model(ids, attention_mask=mask, position_ids=place(SEGMENTS)).logits


def place(segments):
  """Positions, counted from the start of each text."""
  places = lambda row: [row[:i].count(row[i]) for i in range(LENGTH)]
  return torch.tensor([places(row) for row in segments.tolist()])


def save(folder, model, shards=False):
  model.save_pretrained(folder, max_shard_size="20KB" if shards else "5GB")
  ids = torch.randint(0, ROWS, SEGMENTS.shape)
  save_expected(folder, ids, logits(model, ids))


def save_expected(folder, ids, logits):
  expected = {"ids": ids, "segments": SEGMENTS, "logits": logits}
  import numpy as np

  arrays = {name: value.numpy() for name, value in expected.items()}
  np.savez(folder / "expected.npz", **arrays)


def judged(folder):
  """Saves a model with its tokenizer, and the nats of some texts."""
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers

  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocabulary = {symbol: i for i, symbol in enumerate([*alphabet, "<end>"])}
  tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(["<end>"])
  end = vocabulary["<end>"]
  sizes = {"vocab_size": 300, "eos_token_id": end, "bos_token_id": None}
  model = make("Llama", sizes | {"max_position_embeddings": CONTEXT})
  model.save_pretrained(folder)
  tokenizer.save(str(folder / "tokenizer.json"))
  nats = {}
  for text in TEXTS:
    ids = [end, *tokenizer.encode(text).ids]
    start = 0
    nats[text] = 0.0
    while start < len(ids) - 1:
      new = CONTEXT if start == 0 else CONTEXT // 2
      stop = min(start + new, len(ids) - 1)
      window = torch.tensor([ids[max(stop - CONTEXT, 0) : stop]])
      with torch.no_grad():
        logits = model(window).logits[0, start - stop :].double()
      nats[text] += torch.nn.functional.cross_entropy(
        logits, torch.tensor(ids[start + 1 : stop + 1]), reduction="sum"
      ).item()
      start = stop
  (folder / "nats.json").write_text(json.dumps(nats))


# MDLM's DiT, from the shapes and the forward pass of its published models. No
# package has it.
DIT = {
  "model_type": "mdlm",
  "vocab_size": ROWS,
  "model_length": LENGTH,
  "hidden_dim": 32,
  "cond_dim": 16,
  "n_blocks": 3,
  "n_heads": 4,
  "dropout": 0.1,
  "time_conditioning": False,
}


def dit_weights():
  d, c = DIT["hidden_dim"], DIT["cond_dim"]
  linear = lambda name, rows, columns: {
    f"{name}.weight": (rows, columns),
    f"{name}.bias": (rows,),
  }
  block = {
    "norm1.weight": (d,),
    "attn_qkv.weight": (3 * d, d),
    "attn_out.weight": (d, d),
    "norm2.weight": (d,),
    **linear("mlp.0", 4 * d, d),
    **linear("mlp.2", d, 4 * d),
    **linear("adaLN_modulation", 6 * d, c),
  }
  shapes = {
    "vocab_embed.embedding": (ROWS, d),
    **linear("sigma_map.mlp.0", c, 256),
    **linear("sigma_map.mlp.2", c, c),
    "output_layer.norm_final.weight": (d,),
    **linear("output_layer.linear", ROWS, d),
    **linear("output_layer.adaLN_modulation", 2 * d, c),
    "rotary_emb.inv_freq": (d // DIT["n_heads"] // 2,),
  }
  for i in range(DIT["n_blocks"]):
    shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
  torch.manual_seed(0)
  return {f"backbone.{n}": torch.randn(s) * 0.3 for n, s in shapes.items()}


def dit_logits(weights, ids):
  """The forward pass at noise level 0; texts don't attend to each other."""
  f = torch.nn.functional
  w = {name.removeprefix("backbone."): p for name, p in weights.items()}
  linear = lambda name, x: f.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])
  width, heads = DIT["hidden_dim"], DIT["n_heads"]

  def modulated(name, x, shift, scale):
    x = f.layer_norm(x, [width], w[f"{name}.weight"], eps=1e-5)
    return x * (1 + scale) + shift

  # Sines and cosines of 0 at all frequencies.
  features = torch.cat([torch.cos(torch.zeros(128)), torch.zeros(128)])
  h = f.silu(linear("sigma_map.mlp.0", features))
  condition = f.silu(linear("sigma_map.mlp.2", h))
  size = width // heads
  angles = place(SEGMENTS)[..., None] / 1e4 ** (torch.arange(0, size, 2) / size)
  cos, sin = (
    torch.cat([part(angles)] * 2, -1)[:, None]
    for part in (torch.cos, torch.sin)
  )

  def rotated(x):
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin

  allowed = (SEGMENTS[:, :, None] == SEGMENTS[:, None])[:, None]
  x = w["vocab_embed.embedding"][ids]
  for i in range(DIT["n_blocks"]):
    at = f"blocks.{i}"
    parts = linear(f"{at}.adaLN_modulation", condition).chunk(6)
    h = modulated(f"{at}.norm1", x, parts[0], parts[1])
    qkv = f.linear(h, w[f"{at}.attn_qkv.weight"])
    q, k, v = qkv.unflatten(-1, (3, heads, size)).permute(2, 0, 3, 1, 4)
    h = f.scaled_dot_product_attention(rotated(q), rotated(k), v, allowed)
    h = h.transpose(1, 2).flatten(2) @ w[f"{at}.attn_out.weight"].T
    x = x + parts[2] * h
    h = modulated(f"{at}.norm2", x, parts[3], parts[4])
    h = f.gelu(linear(f"{at}.mlp.0", h), approximate="tanh")
    x = x + parts[5] * linear(f"{at}.mlp.2", h)
  parts = linear("output_layer.adaLN_modulation", condition).chunk(2)
  x = modulated("output_layer.norm_final", x, *parts)
  return linear("output_layer.linear", x)


def save_dit(folder):
  from safetensors.torch import save_file

  folder.mkdir()
  weights = dit_weights()
  (folder / "config.json").write_text(json.dumps(DIT))
  save_file(weights, folder / "model.safetensors", {"format": "pt"})
  ids = torch.randint(0, ROWS, SEGMENTS.shape)
  save_expected(folder, ids, dit_logits(weights, ids))


def passage(file, ids):
  """Writes logits of a GGUF file's model for one row of ids."""
  import numpy as np

  model = transformers.AutoModelForCausalLM.from_pretrained(
    file.parent, gguf_file=file.name, dtype=torch.float32
  ).eval()
  with torch.no_grad():
    read = torch.tensor(np.load(ids, allow_pickle=False)).long()
    found = model(read[None]).logits[0]
  np.save(ids.with_name("logits.npy"), found.numpy())


def main(folder):
  for name, (kind, fields) in MODELS.items():
    save(folder / name, make(kind, fields))
  save(folder / "shards", make("Qwen3", {}), shards=True)
  save_dit(folder / "mdlm")
  assert (folder / "shards" / "model.safetensors.index.json").exists()
  judged(folder / "judged")
  print(json.dumps({"transformers": transformers.__version__}))


if __name__ == "__main__":
  if len(sys.argv) == 3:
    passage(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
  else:
    main(pathlib.Path(sys.argv[1]))
