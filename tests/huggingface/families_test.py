"""A config.json becomes our sizes, or one line says why not."""

import math

import huggingface_harness as harness
import pytest

from mdm_jax.core.errors import UserError
from mdm_jax.huggingface.families import architecture
from mdm_jax.model.config import ModelConfig
from mdm_jax.model.rope_scaling import RopeScaling

LLADA = {
  "model_type": "llada",
  "d_model": 4096,
  "n_layers": 32,
  "n_heads": 32,
  "n_kv_heads": 32,
  "mlp_hidden_size": 12288,
  "embedding_size": 126464,
  "max_sequence_length": 4096,
  "rope_theta": 500000.0,
  "weight_tying": False,
}


def test_a_llama_has_its_sizes():
  found = architecture(harness.CONFIG, "config.json")
  assert found.model == ModelConfig(
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=24,
    qk_norm=False,
    norm_eps=1e-5,
    rope_theta=500.0,
    tie_embeddings=False,
  )
  assert (found.rows, found.context, found.causal) == (300, 48, True)


def test_llada_8b_has_the_published_sizes():
  found = architecture(LLADA, "config.json")
  model = found.model
  assert (model.num_layers, model.embed_dim, model.mlp_dim) == (32, 4096, 12288)
  assert (model.head_size, model.num_kv_heads) == (128, None)
  assert (model.norm_eps, model.rope_theta) == (1e-5, 500_000)
  assert (found.rows, found.context, found.causal) == (126464, 4096, False)


@pytest.mark.parametrize(
  "kind, keys, block, shift",
  [
    ("Fast_dLLM_Qwen", {}, 32, True),
    ("Fast_dLLM_Qwen", {"bd_size": 8}, 8, True),
    ("sdar", {}, 4, False),
    ("sdar", {"block_size": 16, "head_dim": 128}, 16, False),
  ],
)
def test_models_of_blocks_say_how_long_they_are(kind, keys, block, shift):
  found = architecture(harness.CONFIG | {"model_type": kind} | keys, "x")
  assert (found.block, found.causal) == (block, False)
  assert found.model.shift_outputs == shift
  assert (found.model.qkv_bias, found.model.qk_norm) == (shift, not shift)
  assert architecture(harness.CONFIG, "x").block is None


def _scaling(**keys):
  return architecture(harness.CONFIG | keys, "config.json").model.rope_scaling


def test_scaled_positions_are_read_in_both_forms():
  llama3 = {"factor": 32, "low_freq_factor": 1, "high_freq_factor": 4}
  llama3["original_max_position_embeddings"] = 8192
  new = _scaling(rope_parameters={"rope_type": "llama3", **llama3})
  old = {"rope_parameters": None, "rope_scaling": {"type": "llama3", **llama3}}
  assert _scaling(**old) == new == RopeScaling(kind="llama3", factor=32.0)
  linear = {"rope_type": "linear", "factor": 2}
  assert _scaling(rope_parameters=linear).factor == 2
  yarn = {"rope_type": "yarn", "original_max_position_embeddings": 12}
  found = _scaling(rope_parameters=yarn)
  # The context of 48 tokens says how far it has grown.
  assert (found.factor, found.original_length) == (4, 12)
  assert found.attention_factor == pytest.approx(0.1 * math.log(4) + 1)
  scales = {"mscale": 2.0, "mscale_all_dim": 1.0}
  found = _scaling(rope_parameters=yarn | scales).attention_factor
  by_hand = (0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1)
  assert found == pytest.approx(by_hand)


WRONG = {
  "an unknown family": ({"model_type": "quen3"}, "did you mean 'qwen3'"),
  "no family": ({"model_type": None}, "model_type=None is not supported"),
  "positions scaled by the length": (
    {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
    "rope_type='dynamic' is not supported; valid: 'default', 'linear'",
  ),
  "no factor": (
    {"rope_parameters": {"rope_type": "linear"}},
    "rope_type='linear' needs a number factor above 0",
  ),
  "a factor that is no number": (
    {"rope_parameters": {"rope_type": "linear", "factor": math.nan}},
    "needs a number factor above 0",
  ),
  "a length that is no number": (
    {
      "rope_parameters": {
        "rope_type": "yarn",
        "original_max_position_embeddings": math.inf,
      }
    },
    "needs a number original_max_position_embeddings above 0",
  ),
  "a scale that is text": (
    {
      "rope_parameters": {
        "rope_type": "yarn",
        "factor": 2,
        "mscale": "x",
        "mscale_all_dim": 1,
      }
    },
    "needs a number mscale above 0",
  ),
  "a factor on rotations that is text": (
    {
      "rope_parameters": {
        "rope_type": "yarn",
        "factor": 2,
        "attention_factor": "x",
      }
    },
    "needs a number attention_factor above 0",
  ),
  "nothing between": (
    {
      "rope_parameters": {
        "rope_type": "llama3",
        "factor": 2,
        "low_freq_factor": 4,
        "high_freq_factor": 4,
      }
    },
    "model.rope_scaling.high_freq_factor=4 must exceed 4",
  ),
  "biases": ({"attention_bias": True}, "attention_bias=True is not supported"),
  "a window": ({"layer_types": ["sliding_attention"]}, "sliding_attention"),
  "quantized": ({"quantization_config": {"bits": 4}}, "quantized weights"),
  "no size": ({"hidden_size": None}, "has no hidden_size"),
  "a wrong type": ({"hidden_size": "16"}, "hidden_size='16' is no int"),
  "a wrong size": ({"num_hidden_layers": 0}, "config.json: model.num_layers=0"),
  "an odd head": ({"head_dim": 5}, "odd"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_our_model_does_not_compute_is_refused(what):
  fields, message = WRONG[what]
  with pytest.raises(UserError, match=message) as error:
    architecture(harness.CONFIG | fields, "config.json")
  assert "\n" not in str(error.value)
