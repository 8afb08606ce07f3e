"""Loads a model that another library trained: hf:FOLDER.

  model = load_imported("hf:~/SmolLM2-135M")

The folder gives the sizes, the weights and the tokenizer; nothing is
downloaded. docs/huggingface.md lists the families.
"""

import dataclasses

import jax

from mdm_jax.config import Config
from mdm_jax.data import huggingface_tokenizer
from mdm_jax.data.config import StageConfig
from mdm_jax.huggingface.families import Architecture
from mdm_jax.huggingface.folder import Folder, open_folder
from mdm_jax.huggingface.sizes import FREE
from mdm_jax.model.config import ModelConfig
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.model.placement import check_vocabulary, mesh_for_use
from mdm_jax.objectives.config import (
  AutoregressiveConfig,
  BlockConfig,
  MaskedConfig,
  ObjectiveConfig,
)
from mdm_jax.trained_model import TrainedModel
from mdm_jax.weights import architecture_of, imported_params

_LONGEST = 1024  # tokens per row, where the model would allow more


def load_imported(source: str, config: Config | None = None) -> TrainedModel:
  """Loads a model onto the devices of this machine.

  Args:
    source: hf:FOLDER.
    config: settings for it, with the sizes of the folder's model (None: those
      of `config_of`).

  Raises:
    UserError: the folder holds no model of a known family, or is damaged.
  """
  folder = open_folder(source)
  config = config or _config_of(folder, source)
  tokenizer = huggingface_tokenizer.from_folder(folder)
  denoiser = Denoiser(config.model, tokenizer.vocab)
  mesh = mesh_for_use(config.mesh, config.model)
  with jax.set_mesh(mesh):
    check_vocabulary(tokenizer.vocab.size, mesh)
    params = imported_params(source, denoiser, tokenizer.fresh)
  return TrainedModel(config, tokenizer, denoiser, mesh, params, step=0)


def config_of(source: str) -> Config:
  """Returns a config for using a folder's model as it was trained.

  A causal model gets the autoregressive objective, one of blocks that of block
  diffusion with these blocks, any other the masked one; rows are as long as the
  model allows, up to 1,024 tokens.

  Raises:
    UserError: the folder holds no model of a known family.
  """
  return _config_of(open_folder(source), source)


def model_of(source: str) -> ModelConfig:
  """Returns the sizes of a folder's model.

  Raises:
    UserError: the folder holds no model of a known family.
  """
  return architecture_of(open_folder(source)).model


def with_sizes(settings: ModelConfig, sizes: ModelConfig) -> ModelConfig:
  """Returns settings of a model, such as its dtype, with sizes of another."""
  kept = {name: getattr(settings, name) for name in FREE}
  # A model of next tokens may be trained on with shifted outputs; one that was
  # trained with them has no other way.
  shift = settings.shift_outputs or sizes.shift_outputs
  return dataclasses.replace(sizes, **kept, shift_outputs=shift)


def _config_of(folder: Folder, source: str) -> Config:
  found = architecture_of(folder)
  return Config(
    name=folder.path.name or "imported",
    init_from=source,
    model=found.model,
    objective=_objective(found),
    stages=(StageConfig(length=min(found.context or _LONGEST, _LONGEST)),),
  )


def _objective(found: Architecture) -> ObjectiveConfig:
  if found.block:
    return BlockConfig(name="block", block_length=found.block)
  if found.causal:
    return AutoregressiveConfig(name="autoregressive")
  return MaskedConfig()
