"""Loads a trained model from a run's folder.

  model = load_model(Workdir("runs/quickstart"))
  with jax.set_mesh(model.mesh):
    denoiser, params = model.denoiser, model.params

Sampling and evaluation take a `TrainedModel`: an importer of other checkpoints
belongs here and returns one.
"""

import contextlib
import dataclasses

import jax

from mdm_jax.checkpoints.checkpoint import Checkpoints
from mdm_jax.config import Config
from mdm_jax.data.tokenizer import Tokenizer, load_tokenizer
from mdm_jax.model.denoiser import Denoiser, Params
from mdm_jax.model.placement import mesh_for_use
from mdm_jax.weights import run_params
from mdm_jax.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class TrainedModel:
  """A denoiser with its parameters and its tokenizer.

  Attributes:
    config: of the run that trained it, perhaps with other settings.
    tokenizer: text to ids and back.
    denoiser: the pure functions of the network.
    mesh: the devices that hold the parameters; use with `jax.set_mesh`.
    params: the parameters averaged over updates (EMA).
    step: the update that they were saved after.
  """

  config: Config
  tokenizer: Tokenizer
  denoiser: Denoiser
  mesh: jax.sharding.Mesh
  params: Params
  step: int


def load_model(
  workdir: Workdir,
  config: Config | None = None,
  step: int | None = None,
  checkpoints: Checkpoints | None = None,
) -> TrainedModel:
  """Loads the model of a run onto the devices of this machine.

  Args:
    workdir: the run's folder.
    config: a config with other settings for the same model (None: the saved
      one).
    step: update of the checkpoint (None: the best checkpoint).
    checkpoints: the run's checkpoints, if they are open already.

  Raises:
    UserError: there is no run or no such checkpoint, or its model is another.
    StorageError: what was saved is damaged.
  """
  if config is None:
    config = workdir.read_config()
  # LoRA is merged into the parameters.
  config = config.without_lora()
  tokenizer = load_tokenizer(workdir.path)
  workdir.check_tokenizer(tokenizer.sha256)
  vocab = tokenizer.vocab
  denoiser = Denoiser(config.model, vocab)
  # Not the training's mesh: this machine may have other devices.
  mesh = mesh_for_use(config.mesh, config.model)
  # The stack closes checkpoints only if they are opened here.
  with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
    if checkpoints is None:
      checkpoints = stack.enter_context(Checkpoints(workdir.path))
    step, params = run_params(
      *(workdir, denoiser, tokenizer, step, checkpoints), config.init_from
    )
  return TrainedModel(config, tokenizer, denoiser, mesh, params, step)
