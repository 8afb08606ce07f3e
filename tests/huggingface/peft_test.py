"""PEFT's adapters: read, written, and refused where they are something else."""

import dataclasses
import functools
import json

import huggingface_harness as harness
import jax
import numpy as np
import pytest

from mdm_jax import imported_model
from mdm_jax.core.errors import UserError
from mdm_jax.huggingface import peft, safetensors
from mdm_jax.huggingface.families import FAMILIES
from mdm_jax.model import lora
from mdm_jax.model.config import LoraConfig
from mdm_jax.model.denoiser import Denoiser

CONFIG = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "bias": "none"}
RANK = 3


def adapter(folder, base, tensors, **fields):
  """Saves an adapter as PEFT would; returns its name here."""
  folder.mkdir()
  config = CONFIG | {"base_model_name_or_path": str(base)} | fields
  (folder / peft.CONFIG).write_text(json.dumps(config))
  safetensors.write(folder / peft.FILE, tensors)
  return f"hf:{folder}"


def additions(weights, modules, seed=0):
  """Random A and B for modules of a model, by PEFT's names."""
  draw, found = np.random.default_rng(seed), {}
  for module in modules:
    outputs, inputs = weights[f"{module}.weight"].shape
    name = f"base_model.model.{module}"
    shapes = {"A": (RANK, inputs), "B": (outputs, RANK)}
    for part, shape in shapes.items():
      values = draw.normal(size=shape).astype(np.float32)
      found[f"{name}.lora_{part}.weight"] = values
  return found


MODULES = [
  "model.layers.0.self_attn.q_proj",
  "model.layers.1.self_attn.k_proj",
  "model.layers.1.self_attn.o_proj",
  "model.layers.0.mlp.down_proj",
]


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_is_a_model_with_its_products_added(tmp_path, mesh, rslora):
  weights = harness.save(tmp_path / "base", {})
  added = additions(weights, MODULES)
  # Named from the adapter's own place.
  name = adapter(tmp_path / "one", "../base", added, use_rslora=rslora)
  scale = 6 / np.sqrt(3) if rslora else 2.0
  by_hand = dict(weights)
  for module in MODULES:
    a, b = (
      added[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB"
    )
    by_hand[f"{module}.weight"] = weights[f"{module}.weight"] + scale * (b @ a)
  harness.save(tmp_path / "merged", {}, by_hand)
  found = imported_model.load_imported(name)
  wanted = imported_model.load_imported(f"hf:{tmp_path / 'merged'}")
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
    *(found.params, wanted.params),
  )
  assert found.tokenizer.sha256 == wanted.tokenizer.sha256


def _counted(x):
  steps = 0.01 * np.arange(x.size, dtype=np.float32).reshape(x.shape) / x.size
  return x + jax.device_put(steps, x.sharding)


@pytest.mark.parametrize("products", [(), ("value", "out", "gate")])
def test_what_was_trained_here_comes_back(tmp_path, products):
  harness.save(tmp_path / "base", harness.QWEN3)
  base = imported_model.load_imported(f"hf:{tmp_path / 'base'}")
  settings = LoraConfig(rank=RANK, alpha=4.5, products=products)
  sizes = dataclasses.replace(base.config.model, lora=settings)
  with jax.set_mesh(base.mesh):  # of all eight devices
    draw = jax.jit(Denoiser(sizes, base.tokenizer.vocab).init)
    trained, _ = lora.split(draw(jax.random.key(1)))
    # B starts at zero, which would hide an exchange of its entries.
    trained = jax.tree.map(_counted, trained)
    wanted = lora.merged(settings, base.params, trained)
  config, tensors = peft.written(trained, settings, FAMILIES["qwen3"].names)
  assert config["lora_alpha"] / config["r"] == settings.scale
  kinds = {"v_proj", "o_proj", "gate_proj"} if products else set()
  assert set(config["target_modules"]) >= kinds
  del config["base_model_name_or_path"]
  name = adapter(tmp_path / "one", tmp_path / "base", tensors, **config)
  found = imported_model.load_imported(name).params
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
    *(found, wanted),
  )


@pytest.mark.parametrize(
  "fields, words",
  [
    ({"peft_type": "IA3"}, "peft_type='IA3' is not supported; nearest: 'LORA'"),
    ({"use_dora": True}, "use_dora=True is not supported; nearest: False"),
    ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern="),
    ({"init_lora_weights": "pissa"}, "changes the model that it adds to"),
    ({"lora_alpha": "6"}, "lora_alpha='6' is no number"),
    (
      {"base_model_name_or_path": "org/name"},
      "'org/name' is no folder of this",
    ),
  ],
)
def test_what_is_no_plain_lora_is_refused(tmp_path, mesh, fields, words):
  weights = harness.save(tmp_path / "base", {})
  added = additions(weights, MODULES)
  name = adapter(tmp_path / "one", tmp_path / "base", added, **fields)
  with pytest.raises(UserError, match=words) as told:
    imported_model.load_imported(name)
  assert "\n" not in str(told.value)


def _without_b(added):
  del added[f"base_model.model.{MODULES[0]}.lora_B.weight"]


def _with_a_magnitude(added):
  added["base_model.model.x.lora_magnitude_vector"] = np.ones(3, np.float32)


def _to_another_model(added):
  module = "model.layers.7.mlp.up_proj"
  added |= additions({f"{module}.weight": np.ones((4, 5))}, [module])


def _of_another_size(added):
  name = f"base_model.model.{MODULES[0]}.lora_A.weight"
  added[name] = added[name][:, 1:]


@pytest.mark.parametrize(
  "change, words",
  [
    (_without_b, "q_proj.lora_B.weight is missing"),
    (_with_a_magnitude, "lora_magnitude_vector is left over"),
    (_to_another_model, r"layers.7.mlp.up_proj.weight, which is not there"),
    (_of_another_size, r"\[16, 3\] x \[3, 15\] .* which is \[16, 16\]"),
  ],
)
def test_a_damaged_adapter_names_the_tensor(tmp_path, mesh, change, words):
  weights = harness.save(tmp_path / "base", {})
  added = additions(weights, MODULES)
  change(added)
  name = adapter(tmp_path / "one", tmp_path / "base", added)
  with pytest.raises(UserError, match=words) as told:
    imported_model.load_imported(name)
  assert "\n" not in str(told.value)
