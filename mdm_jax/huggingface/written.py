"""Describes a model of ours as a Hugging Face folder does.

A description is right if it is read back as the same model: whatever a family
can't hold is found by that, also a field that this module doesn't know.
"""

from typing import Any

import jax
import numpy as np

from mdm_jax.core import distributed, trees
from mdm_jax.core.errors import UserError, nearest
from mdm_jax.huggingface import gguf_written
from mdm_jax.huggingface.families import FAMILIES, Architecture, architecture
from mdm_jax.huggingface.parameters import Leaf
from mdm_jax.huggingface.safetensors import Unread
from mdm_jax.huggingface.sizes import differences
from mdm_jax.model.config import ModelConfig
from mdm_jax.model.denoiser import Params
from mdm_jax.model.rope_scaling import grown

# The families of each --format, the first that fits is taken, and the class
# that loads them.
FORMATS = {
  "transformers": ("llama", "qwen2", "qwen3"),
  "llada": ("llada",),
  "gguf": ("llama", "qwen2", "qwen3"),
}
CLASSES = {
  "llama": "LlamaForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "qwen3": "Qwen3ForCausalLM",
  "llada": "LLaDAModelLM",
}
# Keys of rope_parameters: our fields, and those of each kind.
_SCALING = {
  "factor": "factor",
  "original_max_position_embeddings": "original_length",
  "low_freq_factor": "low_freq_factor",
  "high_freq_factor": "high_freq_factor",
  "beta_fast": "beta_fast",
  "beta_slow": "beta_slow",
  "attention_factor": "attention_factor",
  "truncate": "truncate",
}
_SCALED_BY = {
  "default": (),
  "linear": ("factor",),
  "llama3": tuple(_SCALING)[:4],
  "yarn": (*tuple(_SCALING)[:2], *tuple(_SCALING)[4:]),
}
_WHERE = "the exported config.json"


def describe(
  model: ModelConfig, rows: int, context: int, causal: bool, kind: str
) -> tuple[dict[str, Any], Architecture]:
  """Returns a config.json, and what it is read as.

  Args:
    model: the sizes.
    rows: of the embedding.
    context: tokens per row that the model was trained on.
    causal: whether a position attends only to those before it.
    kind: a name in `FORMATS`.

  Raises:
    UserError: no family of this format computes the same.
  """
  if kind not in FORMATS:
    raise UserError(f"--format={kind}: {nearest(kind, FORMATS)}")
  tried = []
  for name in FORMATS[kind]:
    config = _config(model, rows, context, causal, name)
    found = architecture(config, _WHERE)
    differs = list(differences(model, found.model))
    if found.causal != causal:
      wanted = "a masked" if causal else "an autoregressive"
      raise UserError(
        f"--format={kind} can't hold {'a causal' if causal else 'a masked'}"
        f" model; nearest: --format=transformers, or {wanted} objective"
      )
    if not differs:
      if kind == "gguf":
        gguf_written.check(config)
      return config, found
    tried.append(differs)
  field, ours, theirs = min(tried, key=len)[0]
  raise UserError(
    f"model.{field}={ours!r} can't be exported with --format={kind}; nearest:"
    f" model.{field}={theirs!r}"
  )


def _config(
  model: ModelConfig, rows: int, context: int, causal: bool, name: str
) -> dict[str, Any]:
  family = FAMILIES[name]
  sizes = {
    "vocab_size": rows,
    "hidden_size": model.embed_dim,
    "intermediate_size": model.mlp_size,
    "num_hidden_layers": model.num_layers,
    "num_attention_heads": model.num_heads,
    "num_key_value_heads": model.num_kv_heads or model.num_heads,
    "head_dim": model.head_size,
    "max_position_embeddings": context,
    "rms_norm_eps": model.norm_eps,
    "tie_word_embeddings": model.tie_embeddings,
  }
  sizes = {family.keys.get(key, key): value for key, value in sizes.items()}
  config = {"architectures": [CLASSES[name]], "model_type": name}
  config |= sizes | dict(family.assumed) | {"dtype": "float32"}
  if name == "llada":
    # It knows no other attention than the bidirectional one.
    return config | {"vocab_size": rows, "rope_theta": model.rope_theta}
  config["rope_parameters"] = _rope(model)
  flags = {k: getattr(model, name) for name, k in family.flags.items()}
  config |= {key: value for key, value in flags.items() if value}
  return config | {"is_causal": causal, "use_cache": causal}


def _rope(model: ModelConfig) -> dict[str, Any]:
  scaling = model.rope_scaling
  values = {key: getattr(scaling, ours) for key, ours in _SCALING.items()}
  values["attention_factor"] = values["attention_factor"] or grown(
    scaling.factor
  )
  found = {"rope_type": scaling.kind, "rope_theta": model.rope_theta}
  return found | {key: values[key] for key in _SCALED_BY[scaling.kind]}


def tensors(params: Params, found: Architecture) -> dict[str, Unread]:
  """Returns the weights by name; each is fetched only when it is written.

  In a run of several processes, all have to fetch them, in the same order.

  Args:
    params: our parameters, on any mesh.
    found: the architecture that they have.
  """
  leaves = [
    (Leaf(path, found.family.names[path], found), leaf)
    for path, leaf in trees.by_path(params).items()
  ]
  made = {
    leaf.names[0]: _unread(leaf, array)
    for leaf, array in leaves
    if not leaf.is_stacked
  }
  # Layer by layer, as other programs write them: then a shard is some layers.
  for i in range(found.model.num_layers):
    for leaf, array in leaves:
      if leaf.is_stacked:
        made[leaf.names[i]] = _unread(leaf, array, i)
  return made | _zeros(found)


def _unread(leaf: Leaf, array: jax.Array, layer: int | None = None) -> Unread:
  shape = array.shape if layer is None else array.shape[1:]

  def read() -> np.ndarray:
    # One layer of all devices at a time, never the whole parameter.
    part = array if layer is None else array[layer]
    return leaf.tensor(np.asarray(distributed.fetch(part)))

  return Unread(leaf.theirs(shape), np.dtype(array.dtype), read)


def _zeros(found: Architecture) -> dict[str, Unread]:
  shape, dtype = (found.model.embed_dim,), np.dtype(np.float32)
  return {
    name: Unread(shape, dtype, lambda: np.zeros(shape, dtype))
    for name in found.zeros
  }
