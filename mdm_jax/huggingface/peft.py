"""Reads and writes LoRA adapters in PEFT's format.

An adapter is a folder with adapter_config.json and adapter_model.safetensors.
To a module with weight W [outputs, inputs] it adds scale B A, from the tensors
base_model.model.MODULE.lora_A.weight [rank, inputs] and lora_B.weight
[outputs, rank]. Format: https://github.com/huggingface/peft
"""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mdm_jax.core import distributed, safe_files, trees
from mdm_jax.core.errors import UserError
from mdm_jax.huggingface import safetensors
from mdm_jax.model.config import LoraConfig

CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
# Settings that make an adapter something else than LoRA's products.
_PLAIN = {
  "peft_type": "LORA",
  "bias": "none",
  **dict.fromkeys(("fan_in_fan_out", "use_dora", "use_qalora", "lora_bias")),
  **dict.fromkeys(("alpha_pattern", "modules_to_save", "layer_replication")),
  **dict.fromkeys(("target_parameters", "trainable_token_indices")),
}
# Ways to start A and B that leave the weights beside them as they are.
_STARTS = True, False, "gaussian", "eva", "orthogonal", None


def base_of(folder: pathlib.Path) -> pathlib.Path:
  """Returns the folder of the model that an adapter adds to.

  Raises:
    UserError: it is not on this machine.
  """
  name = _config(folder).get("base_model_name_or_path") or ""
  given = pathlib.Path(str(name)).expanduser()
  # From here, as transformers reads it; or from the adapter.
  for path in (given, folder / given) if name else ():
    if path.exists():
      return path
  raise UserError(
    f"{folder / CONFIG}: base_model_name_or_path={name!r} is no folder of this"
    " machine, and nothing is downloaded; give the path of the model that the"
    " adapter was trained on"
  )


class Adapted(Mapping[str, Any]):
  """A model's tensors with an adapter's products added, as they are read."""

  def __init__(self, base: Mapping[str, Any], folder: pathlib.Path):
    """Reads what the adapter adds to.

    Raises:
      UserError: the adapter is damaged, no LoRA, or of another model.
    """
    self._base, self._scale = base, _scale(folder)
    self._added = _pairs(safetensors.Tensors(folder / FILE), folder / FILE)
    for name, (a, b) in self._added.items():
      wanted = getattr(base.get(name), "shape", None)
      if wanted != (b.shape[0], a.shape[1]) or a.shape[0] != b.shape[1]:
        raise UserError(
          f"{folder / FILE} adds {list(b.shape)} x {list(a.shape)} to {name},"
          + (f" which is {list(wanted)}" if wanted else " which is not there")
        )

  def __iter__(self) -> Iterator[str]:
    return iter(self._base)

  def __len__(self) -> int:
    return len(self._base)

  def __getitem__(self, name: str) -> np.ndarray:
    weight = self._base[name]
    if name not in self._added:
      return weight
    a, b = (np.asarray(part, np.float32) for part in self._added[name])
    return np.asarray(weight, np.float32) + self._scale(len(a)) * (b @ a)


def _pairs(tensors: Mapping[str, Any], where: pathlib.Path):
  """Returns (A, B) by the name of the weight that they add to."""
  modules = {
    name.removeprefix(_PREFIX).removesuffix(end)
    for name in tensors
    for end in (_A, _B)
    if name.startswith(_PREFIX) and name.endswith(end)
  }
  pairs = {m: (f"{_PREFIX}{m}{_A}", f"{_PREFIX}{m}{_B}") for m in modules}
  wanted = {name for pair in pairs.values() for name in pair}
  if odd := sorted(wanted ^ set(tensors)):
    state = "left over" if odd[0] in tensors else "missing"
    raise UserError(f"{where}: {odd[0]} is {state}; nearest: LoRA's A and B")
  return {
    f"{m}.weight": tuple(tensors[name] for name in pair)
    for m, pair in pairs.items()
  }


def _scale(folder: pathlib.Path):
  """Returns the factor on the products, a function of their rank."""
  config = _config(folder)
  alpha = config.get("lora_alpha")
  if type(alpha) not in (int, float):
    raise UserError(f"{folder / CONFIG}: lora_alpha={alpha!r} is no number")
  power = 0.5 if config.get("use_rslora") else 1.0
  return lambda rank: np.float32(alpha / rank**power)


def _config(folder: pathlib.Path) -> dict[str, Any]:
  path = folder / CONFIG
  config = safe_files.read_json(path)
  if not isinstance(config, dict):
    raise UserError(f"{path} is not a JSON object")
  for name, plain in _PLAIN.items():
    # Empty dicts and lists mean that nothing was set.
    if (config.get(name) or None) not in (plain, None):
      raise UserError(
        f"{path}: {name}={config[name]!r} is not supported; nearest:"
        f" {plain or False!r}"
      )
  start = config.get("init_lora_weights")
  if start not in _STARTS:
    raise UserError(
      f"{path}: init_lora_weights={start!r} changes the model that it adds to;"
      " nearest: an adapter that was converted to plain LoRA"
    )
  return config


# MARK: out


def written(
  trained: Mapping[str, Any], lora: LoraConfig, names: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Returns an adapter's config, and its tensors by name on the host.

  In a run of several processes, all have to call it.

  Args:
    trained: LoRA's parameters, stacked over layers.
    lora: the run's settings.
    names: of the model's weights; see `families.Family`.
  """
  tensors = {}
  for path, leaf in trees.by_path(trained).items():
    weight, part = path.split("_lora/")
    module = _PREFIX + names[weight].removesuffix(".weight")
    for layer, value in enumerate(np.asarray(distributed.fetch(leaf))):
      # PyTorch stores [outputs, inputs], and heads as one axis.
      if part == "a":
        matrix, end = value.reshape(-1, lora.rank).T, _A
      else:
        matrix, end = value.reshape(lora.rank, -1).T, _B
      tensors[module.format(layer) + end] = matrix
  modules = {n.rpartition(".lora_")[0].rpartition(".")[2] for n in tensors}
  config = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "",
    "r": lora.rank,
    "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
    "lora_dropout": lora.dropout,
    "target_modules": sorted(modules),
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
  }
  return config, tensors
