"""Whether a model can be split over a mesh, and the mesh where it can't."""

import jax

from mdm_jax.core.errors import UserError
from mdm_jax.core.progress import console
from mdm_jax.core.sharding import (
  RULES,
  AnyMesh,
  MeshConfig,
  Unsplittable,
  check_splits,
  make_mesh,
)
from mdm_jax.model.config import ModelConfig


def mesh_for_use(config: MeshConfig, model: ModelConfig) -> jax.sharding.Mesh:
  """Returns a mesh to sample or evaluate on, whatever number of devices it is.

  The config's, if the model splits over it; else every device has the whole
  model and a part of the rows, which is said.

  Raises:
    UserError: the config's sizes do not multiply to the number of devices.
  """
  mesh = make_mesh(config)
  try:
    check_model(model, mesh)
  except Unsplittable as error:
    console.print(
      f"every one of {mesh.size} devices holds the whole model: {error}",
      markup=False,
      soft_wrap=True,
    )
    return make_mesh(MeshConfig(replica=-1, fsdp=1, tensor=1))
  return mesh


def training_mesh(config: MeshConfig, model: ModelConfig) -> jax.sharding.Mesh:
  """Returns a config's mesh, checked to split its model."""
  mesh = make_mesh(config)
  check_model(model, mesh)
  return mesh


def check_model(model: ModelConfig, mesh: AnyMesh) -> None:
  """Raises UserError if the model can't be computed on the mesh's devices."""
  here = isinstance(mesh, jax.sharding.Mesh)
  if here and model.attention == "cudnn" and jax.default_backend() != "gpu":
    raise UserError(
      "model.attention=cudnn needs a GPU, this is a"
      f" {jax.default_backend()}; nearest valid: auto"
    )
  heads = model.num_kv_heads or model.num_heads
  for what, size, axis in (
    ("key/value heads", heads, RULES.heads),
    ("model.embed_dim", model.embed_dim, RULES.embed),
    ("model.mlp_dim", model.mlp_size, RULES.mlp),
  ):
    check_splits(what, size, axis, mesh)


def check_vocabulary(size: int, mesh: AnyMesh) -> None:
  """Raises UserError if the rows of the vocabulary's table can't be split."""
  check_splits("the vocabulary's ids", size, RULES.vocab, mesh)
