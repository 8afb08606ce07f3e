"""The device mesh and the one table from logical axes to mesh axes."""

import dataclasses

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mdm_jax.core.config import Config, MeshConfig, ModelConfig
from mdm_jax.core.errors import UserError

AXES = ("replica", "fsdp", "tensor")
BATCH_AXES = ("replica", "fsdp")

Axis = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class ShardingRules:
  """Which mesh axis every logical axis of an array is split over."""

  batch: Axis = BATCH_AXES
  length: Axis = None
  embed: Axis = "fsdp"
  heads: Axis = "tensor"
  mlp: Axis = "tensor"
  vocab: Axis = "tensor"

  def spec(self, *names: str | None) -> P:
    """Returns the PartitionSpec of an array with these logical axes.

    Raises:
      ValueError: one mesh axis would split two axes of the same array.
    """
    axes = [None if name is None else getattr(self, name) for name in names]
    used = [a for axis in axes if axis for a in _as_tuple(axis)]
    if len(used) != len(set(used)):
      raise ValueError(f"{names} use a mesh axis twice: {axes}")
    return P(*axes)


RULES = ShardingRules()


def make_mesh(config: MeshConfig) -> jax.sharding.Mesh:
  """Returns the mesh; a size of -1 takes the devices that are left.

  Raises:
    UserError: the sizes do not multiply to the number of devices.
  """
  sizes = [config.replica, config.fsdp, config.tensor]
  total = jax.device_count()
  if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
    raise UserError(
      f"mesh sizes {dict(zip(AXES, sizes, strict=True))}: use"
      " positive numbers and at most one -1"
    )
  if -1 in sizes:
    known = -sizes[0] * sizes[1] * sizes[2]
    sizes[sizes.index(-1)] = max(total // known, 1)
  if sizes[0] * sizes[1] * sizes[2] != total:
    text = " x ".join(f"{n}={s}" for n, s in zip(AXES, sizes, strict=True))
    raise UserError(f"mesh {text} does not fit {total} device(s)")
  return jax.make_mesh(tuple(sizes), AXES)


def training_mesh(config: Config) -> jax.sharding.Mesh:
  """Returns a config's mesh, checked to split its batches and its model."""
  mesh = make_mesh(config.mesh)
  check_divides("data.batch_size", config.data.batch_size, mesh)
  check_divides("eval.batch_size", config.eval.batch_size, mesh)
  check_model(config.model, mesh)
  return mesh


def data_shards(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> int:
  """Returns the number of shards a batch is split into."""
  return mesh.shape["replica"] * mesh.shape["fsdp"]


def check_divides(what: str, rows: int, mesh: jax.sharding.Mesh) -> None:
  """Raises UserError if rows can't be split evenly over the data shards."""
  shards = data_shards(mesh)
  if rows % shards:
    near = sorted(
      {max(rows // shards, 1) * shards, -(-rows // shards) * shards}
    )
    raise UserError(
      f"{what}={rows} does not split over {shards} data shards"
      f" (replica x fsdp); nearest valid: {' or '.join(map(str, near))}"
    )


def check_model(model: ModelConfig, mesh: jax.sharding.Mesh) -> None:
  """Raises UserError if the model can't be computed on the mesh's devices."""
  backend = jax.default_backend()
  if model.attention == "cudnn" and backend != "gpu":
    raise UserError(
      f"model.attention=cudnn needs a GPU, this is a {backend}; nearest valid:"
      " auto"
    )
  heads = model.num_kv_heads or model.num_heads
  for what, size, axis in (
    ("key/value heads", heads, "tensor"),
    ("model.embed_dim", model.embed_dim, "fsdp"),
  ):
    if size % mesh.shape[axis]:
      raise UserError(
        f"{what}={size} does not split over mesh.{axis}={mesh.shape[axis]}"
      )


def batch_sharding(mesh: jax.sharding.Mesh, rank: int, axis: int = 0):
  """Returns the sharding of a rank-`rank` array split over rows at `axis`."""
  names = ["batch" if i == axis else None for i in range(rank)]
  return NamedSharding(mesh, RULES.spec(*names))


def _as_tuple(axis: str | tuple[str, ...]) -> tuple[str, ...]:
  return (axis,) if isinstance(axis, str) else axis
