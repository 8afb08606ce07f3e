"""MDLM's DiT (Sahoo et al. 2024, arXiv 2406.07524), without its conditioning.

BD3-LM (Arriola et al. 2025, arXiv 2503.09573) has the same. Published models
modulate every block by the noise level, which is always set to 0, or not at
all. So shift, scale and gate are constants, which `folded` multiplies into the
weights beside them. What is left is a plain transformer (`model.block` "gelu").
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from mdm_jax.core.errors import UserError

_FEATURES = 256  # of the noise level: cosines, then sines
_TIME = "backbone.sigma_map.mlp"
_HEADS = "query", "key", "value"
_LIMITS = "sampling_eps_min", "sampling_eps_max"
_UNCHANGED = 0.0, 0.0, 1.0  # shift, scale, gate
# What a gate multiplies the rows of, and which part of the modulation it is.
_GATED = {"attn_out.weight": 2, "mlp.2.weight": 5, "mlp.2.bias": 5}

NAMES = {
  "embedding": "backbone.vocab_embed.embedding",
  "final_norm/scale": "backbone.output_layer.norm_final.weight",
  "final_norm/bias": "backbone.output_layer.norm_final.bias",
  "head": "backbone.output_layer.linear.weight",
  "head_bias": "backbone.output_layer.linear.bias",
} | {
  f"blocks/{ours}": f"backbone.blocks.{{}}.{theirs}"
  for ours, theirs in {
    "attention_norm/scale": "norm1.weight",
    "attention_norm/bias": "norm1.bias",
    "attention/query": "query.weight",
    "attention/key": "key.weight",
    "attention/value": "value.weight",
    "attention/out": "attn_out.weight",
    "mlp_norm/scale": "norm2.weight",
    "mlp_norm/bias": "norm2.bias",
    "mlp/up": "mlp.0.weight",
    "mlp/up_bias": "mlp.0.bias",
    "mlp/down": "mlp.2.weight",
    "mlp/down_bias": "mlp.2.bias",
  }.items()
}


def folded(tensors: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the tensors that `NAMES` names, in float32 where they change.

  Tensors that it doesn't know stay as they are.

  Raises:
    UserError: one is missing that the others are folded with.
  """
  # BD3-LM's models have the limits of its mask rates among the weights.
  left = {n: x for n, x in tensors.items() if not n.endswith(_LIMITS)}

  def take(name: str) -> np.ndarray:
    if name not in left:
      raise UserError(f"{name} is missing from the weights")
    return np.asarray(left.pop(name)).astype(np.float32)

  modulated = any("adaLN_modulation" in name for name in left)
  condition = _condition(take) if modulated else None
  blocks = {n.split(".")[2] for n in left if n.startswith("backbone.blocks.")}
  for i in blocks:
    _fold_block(left, take, f"backbone.blocks.{i}", condition)
  at = "backbone.output_layer"
  parts = _modulation(take, at, condition, 2)
  _fold_norm(left, take, f"{at}.norm_final", *parts)
  return left


def _condition(take) -> Float[np.ndarray, "C"]:
  """Returns the embedding of the noise level 0."""
  cosines = np.arange(_FEATURES) < _FEATURES // 2
  h = cosines.astype(np.float32)  # cos(0), and sin(0)
  for layer in (0, 2):
    product = take(f"{_TIME}.{layer}.weight") @ h
    h = _silu(product + take(f"{_TIME}.{layer}.bias"))
  return h


def _silu(x: np.ndarray) -> np.ndarray:
  return x / (1 + np.exp(-x))


def _modulation(take, at: str, condition: np.ndarray | None, parts: int):
  if condition is None:  # BD3-LM's `adaln` is off
    return [np.float32(x) for x in (2 * _UNCHANGED)[:parts]]
  weight = take(f"{at}.adaLN_modulation.weight")
  bias = take(f"{at}.adaLN_modulation.bias")
  return np.split(weight @ condition + bias, parts)


def _fold_block(left, take, at: str, condition: np.ndarray | None) -> None:
  """Folds a block's shifts, scales and gates, and splits its q, k and v."""
  # Shift, scale and gate of attention, then of the MLP.
  parts = _modulation(take, at, condition, 6)
  _fold_norm(left, take, f"{at}.norm1", *parts[:2])
  _fold_norm(left, take, f"{at}.norm2", *parts[3:5])
  for name, gate in _GATED.items():
    rows = take(f"{at}.{name}")
    left[f"{at}.{name}"] = (rows.T * parts[gate]).T
  qkv = take(f"{at}.attn_qkv.weight")
  for name, part in zip(_HEADS, np.split(qkv, 3), strict=True):
    left[f"{at}.{name}.weight"] = part


def _fold_norm(left, take, norm: str, shift, scale) -> None:
  weight = take(f"{norm}.weight")
  left[f"{norm}.weight"] = weight * (1 + scale)
  left[f"{norm}.bias"] = np.broadcast_to(shift, weight.shape)
