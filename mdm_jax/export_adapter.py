"""Writes LoRA's additions alone, as a folder that PEFT loads.

The model that they add to is another folder: the one that was imported, or an
export of the run that they were trained from.
"""

from typing import Any

import jax

from mdm_jax.checkpoints.checkpoint import Checkpoints
from mdm_jax.config import Config
from mdm_jax.core import distributed
from mdm_jax.core.errors import UserError
from mdm_jax.core.progress import console
from mdm_jax.data.tokenizer import load_tokenizer
from mdm_jax.export import filling, new_folder, write_json
from mdm_jax.huggingface import folder as folders
from mdm_jax.huggingface import peft, safetensors
from mdm_jax.huggingface.families import FAMILIES
from mdm_jax.huggingface.family import Family
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.model.placement import mesh_for_use
from mdm_jax.weights import architecture_of, averaged_params
from mdm_jax.workdir import Workdir


def export_workdir(
  config: Config, workdir: Workdir, out: str | None
) -> dict[str, Any]:
  """Exports LoRA of a run's best checkpoint, and prints what was written.

  Args:
    config: the run's config.
    workdir: the run's folder.
    out: the folder to make.

  Raises:
    UserError: the folder is there already, or the run has no LoRA, or one that
      PEFT's format has no names for.
    StorageError: it can't be written, or what was saved is damaged.
  """
  target, lora = new_folder(out), config.model.lora
  if not lora.rank:
    raise UserError(
      f"--format=peft writes LoRA's additions, and {workdir.path} has none;"
      " nearest: --format=transformers"
    )
  base, family = _base(config)
  denoiser = Denoiser(config.model, load_tokenizer(workdir.path).vocab)
  with (
    jax.set_mesh(mesh_for_use(config.mesh, config.model)),
    Checkpoints(workdir.path) as checkpoints,
  ):
    step, trained = averaged_params(checkpoints, denoiser)
    settings, tensors = peft.written(trained, lora, family.names)
    with filling(target) as folder:
      if distributed.is_first():
        settings["base_model_name_or_path"] = base
        write_json(folder / peft.CONFIG, settings)
        safetensors.write(folder / peft.FILE, tensors)
  where = base or f"an export of {config.init_from}: name it in {peft.CONFIG}"
  console.print(
    f"exported LoRA of update {step:,} to {target}: {len(tensors)} tensors of"
    f" rank {lora.rank}; they add to {where}",
    markup=False,
    soft_wrap=True,
  )
  return {"out": str(target), "step": step, "base": base}


def _base(config: Config) -> tuple[str, Family]:
  """Returns the folder of the model that LoRA adds to, and its names."""
  source = config.init_from
  # A run's model gets Llama's names when it is exported.
  base, family = "", FAMILIES["llama"]
  if folders.is_named(source):
    folder = folders.open_folder(source)
    base, family = str(folder.path.absolute()), architecture_of(folder).family
    if folder.adapters:
      base = str(folder.adapters[-1].absolute())
  if config.model.block == "gelu" or family.prepare:
    raise UserError(
      "--format=peft has no names for products of model.block=gelu; nearest:"
      " --format=transformers"
    )
  return base, family
