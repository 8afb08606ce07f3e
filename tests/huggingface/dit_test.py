"""MDLM's DiT becomes a plain transformer: sizes, mask, and what is folded.

peer_test.py compares the logits with PyTorch's.
"""

import json

import huggingface_harness as harness
import jax
import numpy as np
import pytest

from mdm_jax.core.errors import UserError
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data import huggingface_tokenizer
from mdm_jax.huggingface import dit, safetensors
from mdm_jax.huggingface.families import architecture
from mdm_jax.huggingface.folder import open_folder
from mdm_jax.huggingface.parameters import read_params
from mdm_jax.model.config import ModelConfig
from mdm_jax.model.denoiser import Denoiser

D, C, IDS = 16, 8, 259  # width, of the condition, ids with the mask
CONFIG = {
  "model_type": "mdlm",
  "vocab_size": IDS,
  "model_length": 32,
  "hidden_dim": D,
  "cond_dim": C,
  "n_blocks": 2,
  "n_heads": 2,
  "time_conditioning": False,
  "eos_token_id": 256,
}
SHAPES = {
  "vocab_embed.embedding": (IDS, D),
  "sigma_map.mlp.0.weight": (C, 256),
  "sigma_map.mlp.0.bias": (C,),
  "sigma_map.mlp.2.weight": (C, C),
  "sigma_map.mlp.2.bias": (C,),
  "output_layer.norm_final.weight": (D,),
  "output_layer.linear.weight": (IDS, D),
  "output_layer.linear.bias": (IDS,),
  "output_layer.adaLN_modulation.weight": (2 * D, C),
  "output_layer.adaLN_modulation.bias": (2 * D,),
} | {
  f"blocks.{i}.{name}": shape
  for i in range(2)
  for name, shape in {
    "norm1.weight": (D,),
    "attn_qkv.weight": (3 * D, D),
    "attn_out.weight": (D, D),
    "norm2.weight": (D,),
    "mlp.0.weight": (4 * D, D),
    "mlp.0.bias": (4 * D,),
    "mlp.2.weight": (D, 4 * D),
    "mlp.2.bias": (D,),
    "adaLN_modulation.weight": (6 * D, C),
    "adaLN_modulation.bias": (6 * D,),
  }.items()
}


def weights():
  draw = np.random.default_rng(0)
  return {
    f"backbone.{name}": draw.normal(size=shape).astype(np.float32)
    for name, shape in SHAPES.items()
  }


def read(tensors, size=IDS, fresh=()):
  found = architecture(CONFIG, "config.json")
  denoiser = Denoiser(found.model, Vocabulary(size))
  return read_params(tensors, found, denoiser, fresh)


def test_its_sizes_are_those_of_a_gelu_block():
  found = architecture(CONFIG, "config.json")
  assert found.model == ModelConfig(
    num_layers=2,
    embed_dim=D,
    num_heads=2,
    mlp_dim=4 * D,
    block="gelu",
    qk_norm=False,
    norm_eps=1e-5,
    tie_embeddings=False,
  )
  assert (found.rows, found.context, found.causal) == (IDS, 32, False)
  with pytest.raises(UserError, match="time_conditioning=True is not supp"):
    architecture(CONFIG | {"time_conditioning": True}, "config.json")


def test_the_mask_is_the_last_row_as_it_was_trained(tmp_path, any_mesh):
  """Padding gets a new one behind it."""
  (tmp_path / "config.json").write_text(json.dumps(CONFIG))
  harness.tokenizer().save(str(tmp_path / "tokenizer.json"))
  safetensors.write(tmp_path / "model.safetensors", weights())
  folder = open_folder(f"hf:{tmp_path}")
  found = huggingface_tokenizer.from_folder(folder)
  vocab = found.vocab
  assert (vocab.mask, vocab.pad, vocab.size) == (IDS - 1, IDS, 384)
  assert vocab.forbidden == ((258, 384),) and found.fresh == (IDS,)
  params = read(folder.tensors(), vocab.size, found.fresh)
  for ours, theirs in {
    "embedding": "vocab_embed.embedding",
    "head": "output_layer.linear.weight",
    "head_bias": "output_layer.linear.bias",
  }.items():
    got, tensor = np.asarray(params[ours]), weights()[f"backbone.{theirs}"]
    np.testing.assert_array_equal(got[:IDS], tensor)
    mean = np.broadcast_to(tensor.mean(axis=0), (384 - IDS, *tensor.shape[1:]))
    np.testing.assert_allclose(got[IDS:], mean, atol=1e-6)


def test_gates_scales_and_shifts_are_folded_in(mesh):
  """A condition of zero leaves the modulation's biases, which are given."""
  tensors = weights()
  for part in ("weight", "bias"):
    tensors[f"backbone.sigma_map.mlp.2.{part}"] *= 0
  parts = np.arange(1.0, 7, dtype=np.float32)
  tensors["backbone.blocks.1.adaLN_modulation.bias"] = np.repeat(parts, D)
  tensors["backbone.output_layer.adaLN_modulation.bias"][D:] = 3
  params = jax.device_get(read(tensors))
  block = lambda name: tensors[f"backbone.blocks.1.{name}"]
  got = params["blocks"]
  same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6)
  same(got["attention_norm"]["bias"][1], np.full(D, 1))
  same(got["attention_norm"]["scale"][1], block("norm1.weight") * 3)
  out = got["attention"]["out"][1].reshape(D, D)
  same(out, block("attn_out.weight").T * 3)
  same(got["mlp_norm"]["bias"][1], np.full(D, 4))
  same(got["mlp_norm"]["scale"][1], block("norm2.weight") * 6)
  same(got["mlp"]["down"][1], block("mlp.2.weight").T * 6)
  same(got["mlp"]["down_bias"][1], block("mlp.2.bias") * 6)
  value = got["attention"]["value"][1].reshape(D, D)
  same(value, block("attn_qkv.weight")[2 * D :].T)
  final = tensors["backbone.output_layer.norm_final.weight"]
  same(params["final_norm"]["scale"], final * 4)


def test_a_tensor_that_is_missing_is_named(mesh):
  for name in ("blocks.1.adaLN_modulation.bias", "sigma_map.mlp.0.weight"):
    tensors = weights()
    del tensors[f"backbone.{name}"]
    with pytest.raises(UserError, match=f"backbone.{name} is missing"):
      dit.folded(tensors)
  tensors = weights()
  del tensors["backbone.blocks.0.mlp.0.bias"]
  with pytest.raises(UserError, match="mlp.0.bias is missing from"):
    read(tensors)


def test_a_bd3lm_without_modulation_is_the_same_with_none(mesh):
  """And is read with one; its limits of mask rates are left out."""
  bd3lm = CONFIG | {"model_type": "bd3lm", "block_size": 4}
  found = architecture(bd3lm, "config.json")
  assert found.block == 4 and found.model == architecture(CONFIG, "").model
  limits = {"sampling_eps_min": np.float32(0), "sampling_eps_max": np.ones(1)}
  tensors = weights()
  plain = {
    name: tensor
    for name, tensor in tensors.items()
    if "adaLN" not in name and "sigma_map" not in name
  }
  for name in set(tensors) - set(plain):
    tensors[name] *= 0
  for i in range(2):  # gates of 1
    bias = tensors[f"backbone.blocks.{i}.adaLN_modulation.bias"]
    bias.reshape(6, D)[[2, 5]] = 1
  modulated, without = (
    jax.device_get(read(one | limits)) for one in (tensors, plain)
  )
  jax.tree.map(np.testing.assert_array_equal, modulated, without)
  with pytest.raises(UserError, match="config.json has no block_size"):
    architecture(bd3lm | {"block_size": None}, "config.json")
