"""Model families of Hugging Face: their config.json and the names of weights.

A family says how its config.json becomes a `ModelConfig`, and which tensor each
of our parameters comes from. An own one is registered under its `model_type`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mdm_jax.core import fields
from mdm_jax.core.errors import UserError, nearest
from mdm_jax.core.registry import Registry
from mdm_jax.huggingface import dit
from mdm_jax.huggingface.family import Family, Reader
from mdm_jax.model.config import ModelConfig

FAMILIES: Registry[Family] = Registry("model_type", "config.json: model_type")

_LLAMA_NAMES = {
  "embedding": "model.embed_tokens.weight",
  "final_norm/scale": "model.norm.weight",
  "head": "lm_head.weight",
} | {
  f"blocks/{ours}": f"model.layers.{{}}.{theirs}"
  for ours, theirs in {
    "attention_norm/scale": "input_layernorm.weight",
    "attention/query": "self_attn.q_proj.weight",
    "attention/key": "self_attn.k_proj.weight",
    "attention/value": "self_attn.v_proj.weight",
    "attention/out": "self_attn.o_proj.weight",
    "attention/query_bias": "self_attn.q_proj.bias",
    "attention/key_bias": "self_attn.k_proj.bias",
    "attention/value_bias": "self_attn.v_proj.bias",
    "attention/query_norm/scale": "self_attn.q_norm.weight",
    "attention/key_norm/scale": "self_attn.k_norm.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    "mlp/gate": "mlp.gate_proj.weight",
    "mlp/up": "mlp.up_proj.weight",
    "mlp/down": "mlp.down_proj.weight",
  }.items()
}
_LLAMA_DEFAULTS = {
  "rms_norm_eps": 1e-6,
  "tie_word_embeddings": False,
  "num_key_value_heads": None,
  "head_dim": None,
}
_LLAMA = Family(
  names=_LLAMA_NAMES,
  assumed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
  defaults=_LLAMA_DEFAULTS,
  fields={"qk_norm": False},
)
FAMILIES.register("llama", _LLAMA)
_QWEN2 = Family(
  names=_LLAMA_NAMES,
  assumed={"hidden_act": "silu", "use_sliding_window": False},
  defaults=_LLAMA_DEFAULTS,
  fields={"qk_norm": False, "qkv_bias": True},
)
FAMILIES.register("qwen2", _QWEN2)
FAMILIES.register(
  "Dream",
  dataclasses.replace(
    _QWEN2,
    fields=_QWEN2.fields | {"shift_outputs": True},
    causal=False,
  ),
)
_QWEN3 = Family(
  names=_LLAMA_NAMES,
  assumed=_QWEN2.assumed,
  defaults=_LLAMA_DEFAULTS | {"head_dim": 128},
  fields={"qk_norm": True},
  flags=_QWEN2.flags | {"qkv_bias": "attention_bias"},
  zeros=("model.layers.{}.self_attn.o_proj.bias",),
)
FAMILIES.register("qwen3", _QWEN3)
# Fast-dLLM v2 (arXiv 2509.26328). The ids of masks are those of its code.
FAMILIES.register(
  "Fast_dLLM_Qwen",
  dataclasses.replace(
    _QWEN2,
    keys={"block_size": "bd_size"},
    defaults=_LLAMA_DEFAULTS | {"block_size": 32},
    fields=_QWEN2.fields | {"shift_outputs": True},
    causal=False,
    blocks=True,
    mask=151665,
  ),
)
# SDAR (arXiv 2510.06303) and TraDo.
FAMILIES.register(
  "sdar",
  dataclasses.replace(
    _QWEN3,
    defaults=_QWEN3.defaults | {"block_size": 4},
    causal=False,
    blocks=True,
    mask=151669,
  ),
)
FAMILIES.register(
  "llada",
  Family(
    names={
      "embedding": "model.transformer.wte.weight",
      "final_norm/scale": "model.transformer.ln_f.weight",
      "head": "model.transformer.ff_out.weight",
    }
    | {
      f"blocks/{ours}": f"model.transformer.blocks.{{}}.{theirs}.weight"
      for ours, theirs in {
        "attention_norm/scale": "attn_norm",
        "attention/query": "q_proj",
        "attention/key": "k_proj",
        "attention/value": "v_proj",
        "attention/out": "attn_out",
        "mlp_norm/scale": "ff_norm",
        "mlp/gate": "ff_proj",
        "mlp/up": "up_proj",
        "mlp/down": "ff_out",
      }.items()
    },
    keys={
      "hidden_size": "d_model",
      "num_hidden_layers": "n_layers",
      "num_attention_heads": "n_heads",
      "num_key_value_heads": "n_kv_heads",
      "intermediate_size": "mlp_hidden_size",
      "tie_word_embeddings": "weight_tying",
      "vocab_size": "embedding_size",
      "max_position_embeddings": "max_sequence_length",
    },
    assumed={
      "block_type": "llama",
      "activation_type": "silu",
      "layer_norm_type": "rms",
      "include_bias": False,
      "include_qkv_bias": False,
      "attention_layer_norm": False,
      "input_emb_norm": False,
      "scale_logits": False,
      "alibi": False,
      "rope": True,
    },
    defaults=_LLAMA_DEFAULTS | {"rms_norm_eps": 1e-5},
    fields={"qk_norm": False},
    causal=False,
  ),
)
_MDLM = Family(
  names=dit.NAMES,
  keys={
    "hidden_size": "hidden_dim",
    "num_hidden_layers": "n_blocks",
    "num_attention_heads": "n_heads",
    "max_position_embeddings": "model_length",
  },
  assumed={"time_conditioning": False},
  defaults=_LLAMA_DEFAULTS | {"rms_norm_eps": 1e-5},
  fields={"block": "gelu", "qk_norm": False},
  mlp_ratio=4,
  ends_with_mask=True,
  prepare=dit.folded,
  causal=False,
)
FAMILIES.register("mdlm", _MDLM)
# BD3-LM (arXiv 2503.09573).
FAMILIES.register(
  "bd3lm",
  dataclasses.replace(
    _MDLM, assumed=_MDLM.assumed | {"causal": False}, blocks=True
  ),
)


@dataclasses.dataclass(frozen=True)
class Architecture:
  """What a config.json describes.

  Attributes:
    family: how its weights are named.
    model: the sizes.
    rows: rows of the embedding.
    context: tokens that it was trained on at most, None if not said.
    causal: whether a position attends only to those before it.
    block: tokens per block of a block diffusion model; None for others.
  """

  family: Family
  model: ModelConfig
  rows: int
  context: int | None
  causal: bool
  block: int | None = None

  @property
  def zeros(self) -> list[str]:
    """The tensors that have to be 0."""
    layers = range(self.model.num_layers if self.model.qkv_bias else 0)
    return [name.format(i) for i in layers for name in self.family.zeros]


def architecture(config: Mapping[str, Any], where: str) -> Architecture:
  """Returns what a config.json describes.

  Args:
    config: its content.
    where: its path, for messages.

  Raises:
    UserError: the family is unknown, a size is missing or invalid, or a setting
      is one that our model does not compute.
  """
  kind = config.get("model_type")
  if kind not in FAMILIES:
    raise UserError(
      f"{where}: model_type={kind!r} is not supported;"
      f" {nearest(str(kind), FAMILIES)}"
    )
  family = FAMILIES[kind]
  read = Reader(config, family, where)
  read.check_assumed()
  heads = read("num_attention_heads", int)
  width = read("hidden_size", int)
  head_dim = read("head_dim", int)
  kv_heads = read("num_key_value_heads", int)
  theta, scaling = read.rope()
  model = ModelConfig(
    num_layers=read("num_hidden_layers", int),
    embed_dim=width,
    num_heads=heads,
    num_kv_heads=None if kv_heads == heads else kv_heads,
    head_dim=None if head_dim and head_dim * heads == width else head_dim,
    mlp_dim=family.mlp_ratio * width
    if family.mlp_ratio
    else read("intermediate_size", int),
    norm_eps=float(read("rms_norm_eps", float)),
    rope_theta=float(theta),
    rope_scaling=scaling,
    tie_embeddings=read("tie_word_embeddings", bool),
    **family.fields | read.flags(),
  )
  try:
    fields.check(model, "model")
  except UserError as error:
    raise UserError(f"{where}: {error}") from None
  return Architecture(
    family,
    model,
    rows=read("vocab_size", int),
    context=read("max_position_embeddings", int, None),
    causal=read("is_causal", bool, family.causal),
    block=read("block_size", int) if family.blocks else None,
  )
