"""The device mesh and the one table from logical axes to mesh axes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
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

    Inside a `shard_map` over some mesh axes, of what is left to split.

    Raises:
      ValueError: one mesh axis would split two axes of the same array.
    """
    axes = [None if name is None else getattr(self, name) for name in names]
    used = [a for axis in axes for a in _as_tuple(axis)]
    if len(used) != len(set(used)):
      raise ValueError(f"{names} use a mesh axis twice: {axes}")
    manual = set(jax.sharding.get_abstract_mesh().manual_axes)
    return P(*(None if _as_set(axis) <= manual else axis for axis in axes))


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
  if jax.process_count() == 1:
    return jax.make_mesh(tuple(sizes), AXES)
  return _mesh_by_process(tuple(sizes))


def _mesh_by_process(sizes: tuple[int, int, int]) -> jax.sharding.Mesh:
  """Returns a mesh in which each process's devices, so its rows, are a run.

  `jax.make_mesh` orders devices for the wires between them, and gives up where
  these are of several kinds; who reads which rows would follow from the wires.
  """
  local, tensor = jax.local_device_count(), sizes[2]
  if tensor % local and local % tensor:
    raise UserError(
      f"mesh.tensor={tensor} does not fit processes of {local} device(s): one"
      " must divide the other"
    )
  devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
  grid = np.array(devices).reshape(sizes)
  return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * 3)


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


def process_share(mesh: jax.sharding.Mesh) -> tuple[int, int]:
  """Returns which share of a batch's rows this process has, and of how many.

  Processes that one data shard is split over, by the tensor axis, have the same
  share.
  """
  processes = jax.process_count()
  together = max(mesh.shape["tensor"] * processes // mesh.size, 1)
  return jax.process_index() // together, processes // together


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


def gathered(spec: P) -> P:
  """Returns a parameter's spec once it is brought together for a product."""
  split = lambda axis: bool(_as_set(axis) - set(BATCH_AXES))
  return P(*(axis if split(axis) else None for axis in spec))


def vocab_ids(width: int) -> jax.Array:
  """Returns the ids of the vocabulary that are along an axis.

  All of them, but inside a `shard_map` only this tensor shard's.
  """
  ids = jnp.arange(width)
  if RULES.vocab in jax.sharding.get_abstract_mesh().manual_axes:
    ids = ids + jax.lax.axis_index(RULES.vocab) * width
  return ids


def sum_over_shards(values: jax.Array, spec: P) -> jax.Array:
  """Adds up what all data shards have, and leaves each the part `spec` says.

  For the inside of a `shard_map`.
  """
  for axis in BATCH_AXES:
    if axis in spec:
      at = list(spec).index(axis)
      values = jax.lax.psum_scatter(
        values, axis, scatter_dimension=at, tiled=True
      )
    else:
      values = jax.lax.psum(values, axis)
  return values


def batch_sharding(mesh: jax.sharding.Mesh, rank: int, axis: int = 0):
  """Returns the sharding of a rank-`rank` array split over rows at `axis`."""
  names = ["batch" if i == axis else None for i in range(rank)]
  return NamedSharding(mesh, RULES.spec(*names))


def put(tree: Any, sharding: NamedSharding) -> Any:
  """Puts arrays on the devices that every process has whole copies of."""
  if sharding.is_fully_addressable:
    return jax.device_put(tree, sharding)

  def place(values: np.ndarray) -> jax.Array:
    read = lambda index: np.asarray(values)[index]
    return jax.make_array_from_callback(np.shape(values), sharding, read)

  return jax.tree.map(place, tree)


def _as_tuple(axis: Axis) -> tuple[str, ...]:
  return (axis,) if isinstance(axis, str) else axis or ()


def _as_set(axis: Axis) -> set[str]:
  return set(_as_tuple(axis))
