"""What a family of models is, and how its config.json is read."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from mdm_jax.core.errors import UserError
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
    blocks: whether they are a block diffusion model's; `block_size`, by Llama's
      names, is then the number of tokens per block.
    mask: id of the mask, where no file says it.
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
  blocks: bool = False
  mask: int | None = None


class Reader:
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
