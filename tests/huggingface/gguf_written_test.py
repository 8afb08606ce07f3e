"""A GGUF file that is written is the model that it was written from."""

import dataclasses
import json

import gguf
import huggingface_harness as harness
import numpy as np
import pytest
from export_harness import TINY, check_same, model_of
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from mdm_jax import imported_model
from mdm_jax.core.errors import UserError
from mdm_jax.core.progress import console
from mdm_jax.export import export_model
from mdm_jax.huggingface import gguf_written
from mdm_jax.huggingface.gguf_file import SPLITS
from mdm_jax.model.rope_scaling import RopeScaling
from mdm_jax.objectives.config import AutoregressiveConfig

CAUSAL = {"objective": AutoregressiveConfig(name="autoregressive")}
PLAIN = {"qk_norm": False}
BIASED = PLAIN | {"qkv_bias": True}
# Sizes and objective by llama.cpp's name of the architecture.
MODELS = {
  "llama": (PLAIN | {"num_kv_heads": 2, "head_dim": 6}, CAUSAL),
  "llada": (PLAIN | {"tie_embeddings": False, "rope_theta": 5e5}, {}),
  "dream": (BIASED | {"shift_outputs": True, "norm_eps": 1e-5}, {}),
  "qwen2": (BIASED, CAUSAL),
  "qwen3": ({"rope_scaling": RopeScaling(kind="linear", factor=2.0)}, CAUSAL),
}


def written(folder, sizes, kind="byte", **fields):
  """Exports a random model; returns it and the file."""
  model = model_of(dataclasses.replace(TINY, **sizes), kind=kind, **fields)
  export_model(model, str(folder / "out"), "gguf")
  return model, folder / "out" / "model.gguf"


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back(tmp_path, mesh, name):
  sizes, fields = MODELS[name]
  model, file = written(tmp_path, sizes, **fields)
  again = imported_model.load_imported(f"hf:{file}")
  check_same(model, again)
  assert again.config.stages[-1].length == 12
  for field in ("end", "separator", "pad", "mask", "size"):
    wanted = getattr(model.tokenizer.vocab, field)
    assert getattr(again.tokenizer.vocab, field) == wanted
  ids = np.arange(384)
  np.testing.assert_array_equal(
    *(m.tokenizer.vocab.is_predictable(ids) for m in (model, again))
  )
  text = "a caf\u00e9 <|mask|>\n"
  np.testing.assert_array_equal(
    *(m.tokenizer.encode(text) for m in (model, again))
  )
  reader = gguf.GGUFReader(file)
  kind = reader.get_field("general.architecture").contents()
  assert kind == name
  assert all(t.data_offset % 32 == 0 for t in reader.tensors)


def test_llama_cpp_is_told_what_it_cannot_guess(tmp_path, mesh):
  model, file = written(tmp_path, MODELS["llada"][0])
  reader = gguf.GGUFReader(file)
  get = lambda key: reader.get_field(key).contents()
  # The type of an array's elements, also of one without any.
  kind = lambda key: int(reader.get_field(key).parts[3][0])
  assert get("llada.attention.causal") is False
  assert get("diffusion.shift_logits") is False
  assert get("tokenizer.ggml.mask_token_id") == model.tokenizer.vocab.mask
  assert get("tokenizer.ggml.suppress_tokens") == list(range(258, 384))
  assert get("tokenizer.ggml.add_bos_token") is False
  tokens = get("tokenizer.ggml.tokens")
  assert len({*tokens}) == 384 and tokens[259] == "<|mask|>"
  assert kind("tokenizer.ggml.merges") == gguf.GGUFValueType.STRING
  assert kind("tokenizer.ggml.suppress_tokens") == gguf.GGUFValueType.INT32
  # Rows of a head: 0 and 2 are a rotary pair, and are put next to each other.
  ours = np.asarray(model.params["blocks"]["attention"]["query"][0])
  rows = ours.reshape(16, 16).T
  theirs = {t.name: t.data for t in reader.tensors}["blk.0.attn_q.weight"]
  np.testing.assert_array_equal(theirs[:4], rows[[0, 2, 1, 3]])


def test_the_card_says_how_to_run_it(tmp_path, mesh):
  with console.capture() as said:
    written(tmp_path, MODELS["llada"][0])
  warning = "llama.cpp has to attend to all positions, as its diffusion example"
  card = (tmp_path / "out" / "README.md").read_text()
  assert warning in said.get() and warning in card
  assert "as llama.cpp's llada" in said.get()
  assert "llama-diffusion-cli -m model.gguf" in card and "id 259" in card
  assert "transformers" not in card and "custom_generate" not in card
  names = {path.name for path in (tmp_path / "out").iterdir()}
  tokenizer = {"tokenizer.json", "tokenizer_config.json"}
  assert names == {"model.gguf", "README.md"} | tokenizer


def test_a_causal_models_texts_begin_as_in_training(tmp_path, mesh):
  model, file = written(tmp_path, *MODELS["llama"][:1], **CAUSAL)
  get = lambda key: gguf.GGUFReader(file).get_field(key).contents()
  assert get("tokenizer.ggml.add_bos_token") is True
  assert get("tokenizer.ggml.bos_token_id") == model.tokenizer.vocab.end
  card = (tmp_path / "out" / "README.md").read_text()
  assert "llama-cli -m" in card and "llama.cpp adds it" in card


REFUSED = {
  "masked with norms": ({}, {}, "model.qk_norm=True .* its masked models"),
  "norms and biases": ({"qkv_bias": True}, CAUSAL, "model.qkv_bias=True"),
  "heads": (BIASED | {"head_dim": 6}, {}, "model.head_dim=6 .* size 16 / 4"),
  "shifted": (PLAIN | {"shift_outputs": True}, CAUSAL, "shift_outputs=True"),
  "scaled": (
    PLAIN | {"rope_scaling": RopeScaling(kind="yarn", factor=2.0)},
    CAUSAL,
    "model.rope_scaling.kind='yarn' .* 'default' and 'linear'",
  ),
  "time": ({"time_conditioning": True}, {}, "time_conditioning=True can't"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_llama_cpp_cannot_compute_is_named(tmp_path, mesh, what):
  sizes, fields, message = REFUSED[what]
  with pytest.raises(UserError, match=message) as error:
    written(tmp_path, sizes, **fields)
  assert "\n" not in str(error.value)
  assert not any(tmp_path.iterdir())


# MARK: tokenizers

CONFIG = {"vocab_size": 300, "eos_token_id": 256, "mask_token_id": 299}
CONFIG |= {"mdm_jax": {"forbidden": [(299, 300)]}}


def rule_of(steps, **model):
  """What is written for the harness's tokenizer with other rules."""
  rules = json.loads(harness.tokenizer().to_str())
  rules["pre_tokenizer"] = steps
  rules["model"] |= model
  return gguf_written.tokenizer(CONFIG, json.dumps(rules), "{{ messages }}")


@pytest.mark.parametrize("name", SPLITS)
def test_a_split_into_words_has_its_name(name):
  steps = {"type": "Sequence", "pretokenizers": SPLITS[name]}
  found, why = rule_of(steps, ignore_merges=name == "llama-bpe")
  assert found["tokenizer.ggml.pre"] == name and not why
  assert found["tokenizer.ggml.merges"] == ["t h"]
  assert found["tokenizer.ggml.tokens"][256:260:3] == [
    "<end>",
    "<|unused 259|>",
  ]
  types = found["tokenizer.ggml.token_type"]
  assert [types[i] for i in (0, 256, 258, 299)] == [1, 3, 5, 3]
  assert found["tokenizer.chat_template"] == "{{ messages }}"
  # The name does not hide another rule about whole words.
  found, why = rule_of(steps, ignore_merges=name != "llama-bpe")
  assert found == {"tokenizer.ggml.model": "none"} and why


def test_other_splits_and_models_leave_the_tokenizer_out(tmp_path, mesh):
  split = pre_tokenizers.Split(Regex("x"), "isolated")
  other = Tokenizer(models.BPE())
  other.pre_tokenizer = split
  steps = json.loads(other.to_str())["pre_tokenizer"]
  found, why = rule_of(steps)
  assert found == {"tokenizer.ggml.model": "none"} and "gpt-2, smollm" in why
  found, why = rule_of(SPLITS["gpt-2"][0], byte_fallback=True)
  assert found == {"tokenizer.ggml.model": "none"} and "BPE only" in why
  with console.capture() as said:
    _, file = written(tmp_path, *MODELS["llama"][:1], kind="char", **CAUSAL)
  assert "model.gguf has no tokenizer, give llama.cpp ids" in said.get()
  with pytest.raises(UserError, match="tokenizer.ggml.model='none'"):
    imported_model.load_imported(f"hf:{file}")


def test_text_that_llama_cpp_leaves_as_it_is_is_said():
  rules = json.loads(harness.tokenizer().to_str())
  rules["normalizer"] = {"type": "NFC"}
  found, why = gguf_written.tokenizer(CONFIG, json.dumps(rules), "")
  assert found["tokenizer.ggml.pre"] == "gpt-2" and "(NFC)" in why
