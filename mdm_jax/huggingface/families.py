"""Model families of Hugging Face: their config.json and the names of weights.

A family says how its config.json becomes a `ModelConfig`, and which tensor each
of our parameters comes from. An own one is registered under its `model_type`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from mdm_jax.core import fields
from mdm_jax.core.errors import UserError, nearest
from mdm_jax.core.registry import Registry
from mdm_jax.huggingface import dit
from mdm_jax.model.config import ModelConfig
from mdm_jax.model.rope_scaling import RopeScaling, grown

_REQUIRED = object()
_SCALINGS = "default", "linear", "llama3", "yarn"  # of rotary frequencies


@dataclasses.dataclass(frozen=True)
class Family:
  """How models of one `model_type` are read.

  Attributes:
    names: the tensor of each parameter; {} stands for the number of the layer.
      Parameters are named as in the tree, with slashes; those that a model does
      not have are ignored.
    keys: where config.json has other keys than Llama's, the key by Llama's.
    assumed: keys with the only value that our model computes, which is also
      assumed if a key is missing.
    defaults: of keys that config.json may leave out.
    fields: fields of `ModelConfig` that the whole family has.
    mlp_ratio: hidden width of the MLP in widths of the model, where config.json
      does not have it.
    ends_with_mask: whether the last row of the embedding is the mask's.
    prepare: makes the tensors of `names` of those in the files.
    flags: keys of config.json that are fields of `ModelConfig`, by field; a
      missing key means what `fields` says, or else False.
    zeros: tensors of models with `qkv_bias` that have to be 0, as our model has
      no such bias; {} stands for the number of the layer.
    causal: whether the weights were trained to predict the next token from
      those before it. `is_causal` in config.json overrides it.
  """

  names: Mapping[str, str]
  keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
  assumed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  mlp_ratio: int | None = None
  ends_with_mask: bool = False
  prepare: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
  flags: Mapping[str, str] = dataclasses.field(
    # Our own key: transformers keeps it, and computes the same without it.
    default_factory=lambda: {"shift_outputs": "shift_outputs"}
  )
  zeros: tuple[str, ...] = ()
  causal: bool = True


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
FAMILIES.register(
  "qwen3",
  Family(
    names=_LLAMA_NAMES,
    assumed=_QWEN2.assumed,
    defaults=_LLAMA_DEFAULTS | {"head_dim": 128},
    fields={"qk_norm": True},
    flags=_QWEN2.flags | {"qkv_bias": "attention_bias"},
    zeros=("model.layers.{}.self_attn.o_proj.bias",),
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


FAMILIES.register(
  "mdlm",
  Family(
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
  """

  family: Family
  model: ModelConfig
  rows: int
  context: int | None
  causal: bool

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
  read = _Reader(config, family, where)
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
  )


class _Reader:
  """Reads keys of a config.json by Llama's names, with their types checked."""

  def __init__(self, config: Mapping[str, Any], family: Family, where: str):
    self._config, self._family, self._where = config, family, where

  def __call__(self, name: str, kind: type, default: Any = _REQUIRED) -> Any:
    key = self._family.keys.get(name, name)
    default = self._family.defaults.get(name, default)
    value = self._config.get(key)
    if value is None:
      value = default
    if value is _REQUIRED:
      raise UserError(f"{self._where} has no {key}")
    # A bool is an int, but no size.
    kinds = (int, float) if kind is float else (kind,)
    if value is not None and type(value) not in kinds:
      raise UserError(f"{self._where}: {key}={value!r} is no {kind.__name__}")
    return value

  def flags(self) -> dict[str, bool]:
    """Returns the fields of `ModelConfig` that keys switch on or off."""
    plain = self._family.fields
    return {
      name: self(key, bool, plain.get(name, False))
      for name, key in self._family.flags.items()
    }

  def check_assumed(self) -> None:
    """Raises UserError at a setting that changes what the model computes."""
    config = self._config
    for key, wanted in self._family.assumed.items():
      if config.get(key) not in (None, wanted):
        raise self._unsupported(key, config[key], wanted)
    layers = config.get("layer_types") or ()
    if other := [kind for kind in layers if kind != "full_attention"]:
      raise self._unsupported("layer_types", other[0], "full_attention")
    if config.get("quantization_config"):
      raise UserError(
        f"{self._where}: quantized weights (quantization_config) are not"
        " supported; use the model in bfloat16, float16 or float32"
      )

  def rope(self) -> tuple[int | float, RopeScaling]:
    """Returns the base of the rotary frequencies, and how they are scaled."""
    config = self._config
    rope = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or {}
    if not isinstance(rope, dict) or not isinstance(scaling, dict):
      raise UserError(f"{self._where}: rope_parameters is no object")
    both = scaling | rope
    if (share := both.get("partial_rotary_factor", 1.0)) != 1.0:
      raise self._unsupported("partial_rotary_factor", share, 1.0)
    theta = both.get("rope_theta", config.get("rope_theta", 10_000.0))
    if type(theta) not in (int, float):
      raise UserError(f"{self._where}: rope_theta={theta!r} is no number")
    return theta, self._scaling(both)

  def _scaling(self, given: dict[str, Any]) -> RopeScaling:
    """Returns how frequencies are scaled, with the keys of transformers."""
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in _SCALINGS:
      valid = "', '".join(_SCALINGS)
      raise UserError(
        f"{self._where}: rope_type={kind!r} is not supported; valid: '{valid}'"
      )

    def read(name: str, default: Any) -> float:
      # Zero stands for the default, as in transformers.
      value = given.get(name) or default
      number = type(value) in (int, float)
      if not number or not math.isfinite(value) or value <= 0:
        raise UserError(
          f"{self._where}: rope_type={kind!r} needs a number {name} above 0"
        )
      return float(value)

    context = self("max_position_embeddings", int, None)
    before = kind in ("llama3", "yarn") and int(
      read("original_max_position_embeddings", context)
    )
    found: dict[str, Any] = {"original_length": before} if before else {}
    if kind != "default":
      # YaRN may leave it out: then the context says how far it has grown.
      ratio = context / before if kind == "yarn" and context else None
      found["factor"] = read("factor", ratio)
    if kind == "llama3":
      names = "low_freq_factor", "high_freq_factor"
      found |= {name: read(name, None) for name in names}
    if kind == "yarn":
      growth = grown(found["factor"])
      if given.get("mscale") and given.get("mscale_all_dim"):
        growth = grown(found["factor"], read("mscale", None)) / grown(
          found["factor"], read("mscale_all_dim", None)
        )
      found |= {
        "beta_fast": read("beta_fast", 32),
        "beta_slow": read("beta_slow", 1),
        "truncate": bool(given.get("truncate", True)),
        "attention_factor": read("attention_factor", growth),
      }
    return RopeScaling(kind=kind, **found)

  def _unsupported(self, key: str, value: Any, wanted: Any) -> UserError:
    return UserError(
      f"{self._where}: {key}={value!r} is not supported; nearest: {wanted!r}"
    )
