"""Compares the sizes of models, whatever stands for their defaults."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from mdm_jax.model.config import ModelConfig
from mdm_jax.model.rope_scaling import RopeScaling, grown

# Fields of `ModelConfig` that don't change what the model computes.
FREE = frozenset(
  {"dropout", "remat", "layer_loop", "dtype", "attention", "lora"}
)
_SIZES = [
  field.name
  for field in dataclasses.fields(ModelConfig)
  if field.name not in FREE | {"rope_scaling"}
]


def differences(
  ours: ModelConfig, theirs: ModelConfig
) -> Iterator[tuple[str, Any, Any]]:
  """Yields (field, ours, theirs) of the sizes that differ."""
  yield from _unequal(_plain(ours), _plain(theirs), _SIZES)
  scaling = (
    _plain_scaling(ours.rope_scaling),
    _plain_scaling(theirs.rope_scaling),
  )
  names = [field.name for field in dataclasses.fields(RopeScaling)]
  for name, a, b in _unequal(*scaling, names):
    yield f"rope_scaling.{name}", a, b


def _unequal(
  one: Any, other: Any, names: Iterable[str]
) -> Iterator[tuple[str, Any, Any]]:
  for name in names:
    a, b = getattr(one, name), getattr(other, name)
    if a != b:
      yield name, a, b


def _plain(model: ModelConfig) -> ModelConfig:
  """Returns a config with the sizes that None stands for."""
  return dataclasses.replace(
    model,
    num_kv_heads=model.num_kv_heads or model.num_heads,
    head_dim=model.head_size,
    mlp_dim=model.mlp_size,
  )


def _plain_scaling(scaling: RopeScaling) -> RopeScaling:
  if scaling.kind != "yarn" or scaling.attention_factor is not None:
    return scaling
  return dataclasses.replace(scaling, attention_factor=grown(scaling.factor))
