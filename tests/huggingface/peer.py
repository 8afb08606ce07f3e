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
  # Counted from the start of each text.
  places = lambda row: [row[:i].count(row[i]) for i in range(LENGTH)]
  positions = torch.tensor([places(row) for row in SEGMENTS.tolist()])
  with torch.no_grad():
    return model(ids, attention_mask=mask, position_ids=positions).logits


def save(folder, model, shards=False):
  model.save_pretrained(folder, max_shard_size="20KB" if shards else "5GB")
  ids = torch.randint(0, ROWS, SEGMENTS.shape)
  expected = {"ids": ids, "segments": SEGMENTS, "logits": logits(model, ids)}
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
  assert (folder / "shards" / "model.safetensors.index.json").exists()
  judged(folder / "judged")
  print(json.dumps({"transformers": transformers.__version__}))


if __name__ == "__main__":
  if len(sys.argv) == 3:
    passage(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
  else:
    main(pathlib.Path(sys.argv[1]))
