"""llama.cpp and transformers compute from a GGUF file of ours what we do.

llama.cpp runs in an environment that has `pip install -e '.[llamacpp]'`, whose
interpreter LLAMA_CPP_PYTHON names (else one is made, and llama.cpp compiled);
transformers in that of peer_test.py.
"""

import dataclasses
import json
import pathlib
import pydoc_data.topics
import random
import subprocess

import huggingface_harness as harness
import numpy as np
import pytest
import scripts_harness
from apart_harness import python_with
from export_harness import TINY, logits, model_of
from tokenizers import Tokenizer, models, trainers

from mdm_jax import imported_model
from mdm_jax.data import tokenizer as tokenizers
from mdm_jax.data.config import TokenizerConfig
from mdm_jax.export import export_model
from mdm_jax.huggingface.gguf_file import SPLITS, WHOLE_WORDS
from mdm_jax.model.context import CAUSAL, FULL
from mdm_jax.model.rope_scaling import RopeScaling
from mdm_jax.objectives.config import AutoregressiveConfig

HERE = pathlib.Path(__file__).parent
IDS = np.random.default_rng(0).integers(0, 256, (2, 12))
NEXT = {"objective": AutoregressiveConfig(name="autoregressive")}
PLAIN = {"qk_norm": False}
BIASED = PLAIN | {"qkv_bias": True}
LINEAR = {"rope_scaling": RopeScaling(kind="linear", factor=4.0)}
# Sizes by llama.cpp's name of the architecture.
MASKED = {
  "llada": PLAIN | LINEAR | {"num_kv_heads": 2, "head_dim": 6},
  "dream": BIASED | {"shift_outputs": True, "tie_embeddings": False},
}
TRAINED_AS_CAUSAL = {
  "llama": PLAIN | {"num_kv_heads": 2, "head_dim": 6, "rope_theta": 500.0},
  "qwen2": BIASED | {"norm_eps": 1e-5},
  "qwen3": {"num_kv_heads": 2, "tie_embeddings": False},
}


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory):
  folder = tmp_path_factory.mktemp("llamacpp")
  return python_with(folder, "llamacpp", "LLAMA_CPP_PYTHON")


@pytest.fixture(scope="module")
def transformers(tmp_path_factory):
  return python_with(tmp_path_factory.mktemp("peer"), "peer", "PEER_PYTHON")


def ask(python, script, source, folder, **asked):
  request, answer = folder / "request.json", folder / "answer.npz"
  request.write_text(json.dumps(asked))
  command = [python, HERE / script, source, request, answer]
  done = subprocess.run(command, capture_output=True, text=True, timeout=900)
  assert done.returncode == 0, done.stderr
  return np.load(answer, allow_pickle=False)


def exported(folder, sizes, **fields):
  model = model_of(dataclasses.replace(TINY, **sizes), scale=0.2, **fields)
  export_model(model, str(folder / "out"), "gguf")
  return model, folder / "out" / "model.gguf"


def check(theirs, ours):
  real = np.isfinite(ours)
  assert np.abs(ours[real]).max() > 1
  np.testing.assert_allclose(theirs[real], ours[real], atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED_AS_CAUSAL)
def test_causal_logits_are_ours(llama_cpp, transformers, tmp_path, mesh, name):
  model, file = exported(tmp_path, TRAINED_AS_CAUSAL[name], **NEXT)
  ours, asked = logits(model, IDS, CAUSAL), {"ids": IDS.tolist()}
  found = ask(llama_cpp, "llama_cpp_peer.py", file, tmp_path, **asked)
  check(found["logits"], ours)
  if name != "qwen3":  # it does not read that file's size of heads
    found = ask(
      transformers, "export_peer.py", file.parent, tmp_path, gguf=True, **asked
    )
    check(found["logits"], ours)


@pytest.mark.slow
@pytest.mark.parametrize("name", MASKED)
def test_masked_logits_are_ours(llama_cpp, tmp_path, mesh, name):
  model, file = exported(tmp_path, MASKED[name])
  ids = IDS.tolist()
  found = ask(llama_cpp, "llama_cpp_peer.py", file, tmp_path, ids=ids)
  theirs, ours = found["logits"], logits(model, IDS, FULL)
  if model.denoiser.config.shift_outputs:
    theirs, ours = theirs[:, :-1], ours[:, 1:]
  check(theirs, ours)


# MARK: tokenizers


def real_texts():
  pages = [text for _, text in sorted(pydoc_data.topics.topics.items())][:20]
  draw = random.Random(0)
  kinds = "chinese", "hindi", "arabic", "thai", "english"
  texts = [getattr(scripts_harness, kind)(draw, 30) for kind in kinds]
  odd = "It's  12345 <|mask|>\n\n\n x\r\n\t'LL \u00a0 e\u0301\u2028\U0001f600 "
  return [*pages, *texts, odd]


def byte_pairs(name, texts):
  """A tokenizer.json of byte-level BPE with a rule of llama.cpp."""
  steps = {"type": "Sequence", "pretokenizers": SPLITS[name]}
  empty = json.loads(Tokenizer(models.BPE()).to_str())
  empty["pre_tokenizer"], empty["decoder"] = steps, SPLITS["gpt-2"][0]
  made = Tokenizer.from_str(json.dumps(empty))
  alphabet = sorted(json.loads(harness.tokenizer().to_str())["model"]["vocab"])
  alphabet = [symbol for symbol in alphabet if len(symbol) == 1]
  trainer = trainers.BpeTrainer(
    vocab_size=1500, initial_alphabet=alphabet, show_progress=False
  )
  made.train_from_iterator(texts, trainer)
  made.add_special_tokens(["<end>"])
  rules = json.loads(made.to_str())
  rules["model"]["ignore_merges"] = name in WHOLE_WORDS
  return rules


def imported(folder, rules):
  """A causal model with this tokenizer."""
  rows = len(rules["model"]["vocab"]) + 1
  config = harness.CONFIG | {"vocab_size": rows, "eos_token_id": rows - 1}
  harness.save(folder, config, harness.weights(config, rows=rows))
  (folder / "tokenizer.json").write_text(json.dumps(rules))
  return imported_model.load_imported(f"hf:{folder}")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SPLITS, "byte", "gpt2"])
def test_llama_cpp_encodes_text_as_we_do(llama_cpp, tmp_path, mesh, name):
  texts = real_texts()
  if name in SPLITS:
    model = imported(tmp_path / "in", byte_pairs(name, texts[::2]))
  else:
    merges = byte_pairs("gpt-2", texts[::2])["model"]["merges"]
    (tmp_path / "merges.txt").write_text("\n".join(map(" ".join, merges)))
    config = TokenizerConfig(kind=name, path=str(tmp_path / "merges.txt"))
    tokenizer = tokenizers.build(config, texts[::2])
    model = model_of(dataclasses.replace(TINY, **PLAIN), tokenizer, **NEXT)
  export_model(model, str(tmp_path / "out"), "gguf")
  file = tmp_path / "out" / "model.gguf"
  found = ask(llama_cpp, "llama_cpp_peer.py", file, tmp_path, texts=texts)
  for i, text in enumerate(texts):
    wanted = [model.tokenizer.vocab.end, *model.tokenizer.encode(text)]
    np.testing.assert_array_equal(found[f"text{i}"], wanted, str(i))
    assert bytes(found[f"back{i}"]).decode() == text
