"""A GGUF file is the model that its folder is."""

import json

import gguf
import huggingface_harness as harness
import jax
import numpy as np
import pytest

from mdm_jax import imported_model
from mdm_jax.core.errors import UserError
from mdm_jax.huggingface import gguf_file
from mdm_jax.huggingface.folder import open_folder

TIED = {"tie_word_embeddings": True}


def _interleaved(rows, heads):
  """Rows as llama.cpp has them: the entries of a rotary pair side by side."""
  size = len(rows) // heads
  order = np.arange(size).reshape(2, size // 2).T.ravel()
  return rows.reshape(heads, size, -1)[:, order].reshape(rows.shape)


def write(path, config=harness.CONFIG, **more):
  """Writes a Llama's random weights and a tokenizer as GGUF; returns both."""
  config = config | TIED
  tensors = harness.weights(config)
  file = gguf.GGUFWriter(path, more.get("architecture", "llama"))
  file.add_block_count(config["num_hidden_layers"])
  file.add_context_length(config["max_position_embeddings"])
  file.add_embedding_length(config["hidden_size"])
  file.add_feed_forward_length(config["intermediate_size"])
  file.add_head_count(config["num_attention_heads"])
  file.add_head_count_kv(config["num_key_value_heads"])
  file.add_layer_norm_rms_eps(config["rms_norm_eps"])
  file.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
  rules = json.loads(harness.tokenizer().to_str())["model"]
  tokens = sorted(rules["vocab"], key=rules["vocab"].get)
  tokens += [f"<unused{i}>" for i in range(harness.ROWS - len(tokens))]
  types = [3 if token[:1] == "<" != token else 1 for token in tokens]
  file.add_tokenizer_model(more.get("tokenizer", "gpt2"))
  file.add_token_list(tokens)
  file.add_token_types(types)
  file.add_token_merges(["t h"])
  file.add_eos_token_id(256)
  file.add_chat_template("{{ messages }}")
  theirs = {there: here for here, there in gguf_file.NAMES.items()}
  for name, tensor in tensors.items():
    stem, _, kind = name.rpartition(".")
    layer = stem.split(".")[2] if stem.startswith("model.layers.") else None
    stem = stem if layer is None else stem.split(".", 3)[3]
    heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(stem)
    here = theirs[stem] if layer is None else f"blk.{layer}.{theirs[stem]}"
    file.add_tensor(
      f"{here}.{kind}", _interleaved(tensor, heads) if heads else tensor
    )
  file.write_header_to_file()
  file.write_kv_data_to_file()
  file.write_tensors_to_file()
  file.close()
  return config, tensors


def test_it_has_the_weights_and_sizes_of_its_folder(tmp_path, mesh):
  config, tensors = write(tmp_path / "model.gguf")
  harness.save(tmp_path / "folder", config, tensors)
  found = [
    imported_model.load_imported(f"hf:{tmp_path / name}")
    for name in ("model.gguf", "folder")
  ]
  one, other = (model.params for model in found)
  # The file's tokens fill all rows, so a mask needs another one.
  assert (len(one["embedding"]), len(other["embedding"])) == (384, 300)
  first = [np.asarray(p.pop("embedding"))[:258] for p in (one, other)]
  np.testing.assert_array_equal(*first)
  jax.tree.map(np.testing.assert_array_equal, one, other)
  assert found[0].config.stages == found[1].config.stages


def test_its_tokenizer_has_its_ids(tmp_path):
  write(tmp_path / "model.gguf")
  model = imported_model.load_imported(f"hf:{tmp_path / 'model.gguf'}")
  text = "the caf\u00e9 <end> th"
  assert model.tokenizer.encode("th").tolist() == [257]
  assert model.tokenizer.decode(model.tokenizer.encode(text)) == text
  assert model.tokenizer.vocab.end == 256
  assert model.tokenizer.chat_template == "{{ messages }}"


def test_quantized_weights_are_what_the_package_makes_of_them(tmp_path):
  path, draw = tmp_path / "model.gguf", np.random.default_rng(0)
  values = draw.normal(size=(4, 64)).astype(np.float32)
  kind = gguf.GGMLQuantizationType.Q8_0
  file = gguf.GGUFWriter(path, "llama")
  packed = gguf.quants.quantize(values, kind)
  file.add_tensor("blk.0.ffn_up.weight", packed, raw_dtype=kind)
  for step in ("header", "kv_data", "tensors"):
    getattr(file, f"write_{step}_to_file")()
  file.close()
  found = gguf_file._Weights(gguf.GGUFReader(path))
  got = found["model.layers.0.mlp.up_proj.weight"]
  np.testing.assert_allclose(got, values, atol=0.02)
  assert got.dtype == np.float32


WRONG = {
  "architecture": ({"architecture": "mamba"}, "'mamba' is not supported"),
  "tokenizer": ({"tokenizer": "llama"}, "tokenizer.ggml.model='llama'"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_not_supported_is_named(tmp_path, what):
  more, message = WRONG[what]
  write(tmp_path / "model.gguf", **more)
  with pytest.raises(UserError, match=message) as error:
    open_folder(f"hf:{tmp_path / 'model.gguf'}")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [0, 3, 100, 3000, 20_000])
def test_a_damaged_file_is_refused_in_one_line(tmp_path, size):
  path = tmp_path / "model.gguf"
  write(path)
  path.write_bytes(path.read_bytes()[:size])
  with pytest.raises(UserError, match="is not a whole GGUF file") as error:
    open_folder(f"hf:{path}")
  assert "\n" not in str(error.value)
