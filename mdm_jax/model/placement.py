"""Checks that a model's sizes divide over a mesh, and falls back if not."""

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
from mdm_jax.model.kernels import KERNELS


def mesh_for_use(config: MeshConfig, model: ModelConfig) -> jax.sharding.Mesh:
  """Returns a mesh to sample or evaluate on, for any number of devices.

  This is the config's mesh if the model can be sharded over it. Otherwise it
  prints why, and returns a mesh on which every device holds the whole model and
  a part of the rows.

  Args:
    config: sizes of the mesh axes.
    model: the architecture.

  Raises:
    UserError: the product of the axis sizes is not the number of devices, or
      the attention kernel can't run here.
  """
  # A model may be used on other devices than it was trained on, so a mesh that
  # can't split it is no error here.
  mesh = make_mesh(config)
  try:
    check_model(model, mesh)
  except Unsplittable as error:
    console.print(
      f"every one of {mesh.size} devices holds the whole model: {error}",
      markup=False,
      soft_wrap=True,
    )
    # Pure data parallelism, which works for any model.
    return make_mesh(MeshConfig(replica=-1, fsdp=1, tensor=1))
  return mesh


def training_mesh(config: MeshConfig, model: ModelConfig) -> jax.sharding.Mesh:
  """Returns the config's mesh.

  Raises:
    UserError: the sizes don't fit the devices, or the model can't be sharded.
  """
  mesh = make_mesh(config)
  check_model(model, mesh)
  return mesh


def check_model(model: ModelConfig, mesh: AnyMesh) -> None:
  """Raises UserError if the model can't run on, or be sharded over, a mesh.

  Args:
    model: the architecture.
    mesh: real devices, or an abstract mesh.
  """
  # An abstract mesh stands for other devices than this process has.
  here = isinstance(mesh, jax.sharding.Mesh)
  backend = jax.default_backend()
  needs = None if model.attention == "auto" else KERNELS[model.attention].needs
  if here and needs not in (None, backend):
    raise UserError(
      f"model.attention={model.attention} needs a {needs.upper()}, this is a"
      f" {backend}; nearest valid: auto"
    )
  # Query heads are grouped by key/value head, so only the latter are split.
  heads = model.num_kv_heads or model.num_heads
  for what, size, axis in (
    ("key/value heads", heads, RULES.heads),
    ("model.embed_dim", model.embed_dim, RULES.embed),
    ("model.mlp_dim", model.mlp_size, RULES.mlp),
  ):
    check_splits(what, size, axis, mesh)


def check_vocabulary(size: int, mesh: AnyMesh) -> None:
  """Raises UserError if a vocabulary of `size` ids can't be sharded."""
  check_splits("the vocabulary's ids", size, RULES.vocab, mesh)
