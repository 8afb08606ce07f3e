"""Imported weights compute what their folder's model does."""

import huggingface_harness as harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.core.errors import UserError
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.huggingface.families import architecture
from mdm_jax.huggingface.folder import open_folder
from mdm_jax.huggingface.parameters import read_params
from mdm_jax.model.context import CAUSAL, FULL, row_context
from mdm_jax.model.denoiser import Denoiser

MODELS = {"llama": {}, "qwen2": harness.QWEN2, "qwen3": harness.QWEN3}
IDS = np.array([5, 70, 3, 3, 299, 41, 8])


def read(folder, size=harness.ROWS, fresh=()):
  """Reads a folder onto the current mesh."""
  found = open_folder(f"hf:{folder}")
  described = architecture(found.config, "config.json")
  denoiser = Denoiser(described.model, Vocabulary(size))
  params = read_params(found.tensors(), described, denoiser, fresh)
  return described, denoiser, params


def logits(described, denoiser, params, rows):
  tokens = jnp.tile(jnp.asarray(IDS, jnp.int32), (rows, 1))
  visibility = CAUSAL if described.causal else FULL
  context = row_context(jnp.ones_like(tokens), visibility=visibility)
  hidden = jax.jit(denoiser.hidden)(params, tokens, context)
  flat = hidden.reshape(-1, hidden.shape[-1])
  return np.asarray(jax.jit(denoiser.logits)(params, flat))[: len(IDS)]


@pytest.mark.parametrize("kind", MODELS)
def test_logits_are_the_models(tmp_path, mesh, kind):
  tensors = harness.save(tmp_path, MODELS[kind])
  wanted = harness.logits(MODELS[kind], tensors, IDS)
  got = logits(*read(tmp_path), rows=1)
  np.testing.assert_allclose(got, wanted, atol=2e-5)
  assert np.abs(wanted).max() > 2


def test_dreams_output_predicts_the_next_position(tmp_path, mesh):
  tensors = harness.save(tmp_path, harness.QWEN2 | {"model_type": "Dream"})
  bidirectional = harness.QWEN2 | {"is_causal": False}
  wanted = harness.logits(bidirectional, tensors, IDS)[
    [0, *range(len(IDS) - 1)]
  ]
  got = logits(*read(tmp_path), rows=1)
  np.testing.assert_allclose(got, wanted, atol=2e-5)


def test_shards_over_a_mesh_hold_the_same_values(tmp_path, any_mesh):
  tensors = harness.save(tmp_path, harness.QWEN3)
  harness.save_shards(tmp_path, tensors)
  _, denoiser, params = read(tmp_path)
  like = jax.eval_shape(denoiser.init, jax.random.key(0))
  specs = lambda tree: jax.tree.map(lambda leaf: leaf.sharding.spec, tree)
  assert specs(params) == specs(like)
  query = np.asarray(params["blocks"]["attention"]["query"])
  theirs = tensors["model.layers.1.self_attn.q_proj.weight"]
  # Head g * R + r, of size K.
  np.testing.assert_array_equal(query[1].reshape(16, -1), theirs.T)
  out = np.asarray(params["blocks"]["attention"]["out"])
  theirs = tensors["model.layers.1.self_attn.o_proj.weight"]
  np.testing.assert_array_equal(out[1].reshape(-1, 16), theirs.T)
  embedding = np.asarray(params["embedding"])
  np.testing.assert_array_equal(embedding, tensors["model.embed_tokens.weight"])


def test_new_rows_start_at_the_mean_of_the_others(tmp_path, any_mesh):
  tensors = harness.save(tmp_path, {})
  _, _, params = read(tmp_path, size=304, fresh=(7, 301))
  for name, theirs in (
    ("embedding", tensors["model.embed_tokens.weight"]),
    ("head", tensors["lm_head.weight"]),
  ):
    got, others = np.asarray(params[name]), np.delete(theirs, 7, axis=0)
    np.testing.assert_array_equal(np.delete(got[:300], 7, axis=0), others)
    mean = others.mean(axis=0, dtype=np.float64)
    for row in (7, 300, 301, 303):
      np.testing.assert_allclose(got[row], mean, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float64])
def test_other_dtypes_become_float32(tmp_path, mesh, dtype):
  tensors = harness.weights(harness.CONFIG | harness.QWEN3)
  cast = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
  harness.save(tmp_path, harness.QWEN3, cast)
  _, _, params = read(tmp_path)
  up = np.asarray(params["blocks"]["mlp"]["up"])
  assert up.dtype == np.float32
  theirs = cast["model.layers.0.mlp.up_proj.weight"].astype(np.float32)
  np.testing.assert_array_equal(up[0], theirs.T)


def test_a_head_beside_tied_embeddings_must_be_the_same(tmp_path, mesh):
  tied = {"tie_word_embeddings": True}
  tensors = harness.weights(harness.CONFIG | tied)
  same = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
  harness.save(tmp_path, tied, tensors | same)
  read(tmp_path)
  other = {"lm_head.weight": same["lm_head.weight"] + 1}
  harness.save(tmp_path, tied, tensors | other)
  with pytest.raises(UserError, match="lm_head.weight differs from"):
    read(tmp_path)


def test_biases_that_our_attention_lacks_have_to_be_zero(tmp_path, mesh):
  fields = harness.QWEN3 | {"attention_bias": True}
  tensors = harness.weights(harness.CONFIG | fields)
  sizes = {"q": 24, "k": 12, "v": 12, "o": 16}
  for i in range(2):
    for name, size in sizes.items():
      bias = np.full(size, float(name != "o"), np.float32)
      tensors[f"model.layers.{i}.self_attn.{name}_proj.bias"] = bias
  harness.save(tmp_path, fields, tensors)
  _, denoiser, params = read(tmp_path)
  assert denoiser.config.qkv_bias
  assert np.all(params["blocks"]["attention"]["query_bias"])
  tensors["model.layers.1.self_attn.o_proj.bias"][3] = 1
  harness.save(tmp_path, fields, tensors)
  with pytest.raises(UserError, match="1.self_attn.o_proj.bias is not 0"):
    read(tmp_path)


def _without(name):
  return lambda tensors: tensors.pop(name)


WRONG = {
  "missing": (
    _without("model.layers.1.mlp.up_proj.weight"),
    "model.layers.1.mlp.up_proj.weight is missing from the weights",
  ),
  "left over": (
    lambda t: t.update({"model.vision.weight": np.zeros(2, np.float32)}),
    "model.vision.weight is left over",
  ),
  "shape": (
    lambda t: t.update({"model.norm.weight": np.zeros(2, np.float32)}),
    r"model.norm.weight has shape \[2\]; config.json makes it \[16\]",
  ),
}


@pytest.mark.parametrize("what", WRONG)
def test_other_weights_are_refused_by_name(tmp_path, mesh, what):
  change, message = WRONG[what]
  tensors = harness.weights(harness.CONFIG)
  change(tensors)
  harness.save(tmp_path, {}, tensors)
  with pytest.raises(UserError, match=message) as error:
    read(tmp_path)
  assert "\n" not in str(error.value)
