"""A trained model out of a run's folder: the one way to load it.

  model = load_model(Workdir("runs/quickstart"))
  with jax.set_mesh(model.mesh):
    denoiser, params = model.denoiser, model.params

Whatever else parameters may come from is to be made a `TrainedModel` here: then
it samples and is measured like any other.
"""

import contextlib
import dataclasses

import jax

from mdm_jax import config as config_lib
from mdm_jax.checkpoints.checkpoint import Checkpoints
from mdm_jax.config import Config
from mdm_jax.data.tokenizer import Tokenizer, load_tokenizer
from mdm_jax.model.denoiser import Denoiser, Params
from mdm_jax.model.placement import mesh_for_use
from mdm_jax.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class TrainedModel:
  """A denoiser with its parameters, and what its token ids mean.

  Attributes:
    config: of the run that trained it, or with other settings.
    tokenizer: text to ids and back.
    denoiser: the pure functions of the network.
    mesh: the devices that hold the parameters; make it the current one.
    params: averaged over the training's updates.
    step: the update they are of.
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
  """Returns the model of a run, on the devices of this machine.

  Args:
    workdir: the run's folder.
    config: other settings than the saved ones, of the same model.
    step: of the checkpoint (None: the best one).
    checkpoints: of the folder, if they are open already.

  Raises:
    UserError: there is no run or no such checkpoint, or it has another model.
    StorageError: what was saved is damaged.
  """
  if config is None:
    config = config_lib.from_dict(workdir.read_config_dict())
  tokenizer = load_tokenizer(workdir.path)
  workdir.check_tokenizer(tokenizer.sha256)
  vocab = tokenizer.vocab
  denoiser = Denoiser(config.model, vocab)
  mesh = mesh_for_use(config.mesh, config.model)
  with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
    if checkpoints is None:
      checkpoints = stack.enter_context(Checkpoints(workdir.path))
    step, params = averaged_params(checkpoints, denoiser, step)
  return TrainedModel(config, tokenizer, denoiser, mesh, params, step)


def averaged_params(
  checkpoints: Checkpoints, denoiser: Denoiser, step: int | None = None
) -> tuple[int, Params]:
  """Returns a step and its averaged parameters, on the current mesh.

  Args:
    checkpoints: of a run.
    denoiser: whose parameters they are.
    step: which to read (None: the best one).

  Raises:
    UserError: there is no such checkpoint, or it has another model.
    StorageError: what was saved is damaged.
  """
  like = {"ema_params": jax.eval_shape(denoiser.init, jax.random.key(0))}
  if step is None:
    step, found = checkpoints.restore_best_part(like)
  else:
    checkpoints.check_has(step)
    found = checkpoints.restore_part(step, like)
  return step, found["ema_params"]
