"""The device mesh, and the mapping from logical axes to mesh axes."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mdm_jax.core.accelerators import Accelerator
from mdm_jax.core.errors import UserError
from mdm_jax.core.fields import field

AXES = ("replica", "fsdp", "tensor")
BATCH_AXES = ("replica", "fsdp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Devices along each mesh axis; one of them may be -1 (what is left)."""

  replica: int = field(
    1, "data parallel, parameters replicated", "-1 or [1, 1048576]"
  )
  fsdp: int = field(
    -1, "data parallel, parameters sharded", "-1 or [1, 1048576]"
  )
  tensor: int = field(
    1, "heads, mlp and vocabulary split", "-1 or [1, 1048576]"
  )


class Unsplittable(UserError):
  """A size of the model is not divisible by the mesh axis that splits it."""


Axis = str | tuple[str, ...] | None
AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh

_EXPLICIT = (AxisType.Explicit,) * len(AXES)


@dataclasses.dataclass(frozen=True)
class ShardingRules:
  """The mesh axes that each logical axis of an array is sharded over."""

  batch: Axis = BATCH_AXES
  length: Axis = None
  embed: Axis = "fsdp"
  heads: Axis = "tensor"
  mlp: Axis = "tensor"
  vocab: Axis = "tensor"

  def spec(self, *names: str | None) -> P:
    """Returns the PartitionSpec of an array with these logical axes.

    Inside a `shard_map` the mesh axes that it maps over are left out.

    Args:
      *names: one per axis of the array; None for an axis that isn't split.

    Raises:
      ValueError: one mesh axis would split two axes of the same array.

    Example:

      RULES.spec("batch", "length")  # P(("replica", "fsdp"), None)
    """
    axes = [None if name is None else getattr(self, name) for name in names]
    for i, axis in enumerate(axes):
      for earlier in range(i):
        for twice in _as_set(axis) & _as_set(axes[earlier]):
          raise ValueError(
            f"{names[earlier]} and {names[i]} of one array are both split over"
            f" the mesh axis {twice!r}, which can split only one of them"
          )
    manual = set(jax.sharding.get_abstract_mesh().manual_axes)
    return P(*(None if _as_set(axis) <= manual else axis for axis in axes))


RULES = ShardingRules()


def make_mesh(config: MeshConfig) -> jax.sharding.Mesh:
  """Returns the mesh over all devices; a size of -1 takes those left over.

  On TPUs devices are ordered by interconnect topology (ICI), elsewhere by
  process. The order determines which process reads which rows of a batch, never
  the content of the batch.

  Raises:
    UserError: the sizes don't multiply to the number of devices.
  """
  sizes = mesh_sizes(config, jax.device_count())
  if jax.process_count() == 1 or jax.default_backend() == "tpu":
    return jax.make_mesh(sizes, AXES)
  devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
  return jax.sharding.Mesh(np.array(devices).reshape(sizes), AXES, _EXPLICIT)


def planned_mesh(
  config: MeshConfig, device: Accelerator | None = None
) -> jax.sharding.AbstractMesh:
  """Returns an abstract mesh, to plan for devices that don't exist here.

  Args:
    config: sizes of the mesh axes.
    device: the GPU that programs are traced for; None for no device in
      particular.

  Raises:
    UserError: a size is not positive.
  """
  sizes = dataclasses.astuple(config)
  kind = device and jax.sharding.AbstractDevice(device.kind, None, "gpu")
  return jax.sharding.AbstractMesh(
    *(mesh_sizes(config, math.prod(sizes)), AXES, _EXPLICIT),
    abstract_device=kind,
  )


def parse_mesh(text: str) -> MeshConfig:
  """Parses "FSDP", "FSDPxTENSOR" or "REPLICAxFSDPxTENSOR", such as "64x4".

  Raises:
    UserError: the text has another form.
  """
  parts = text.lower().split("x")
  if len(parts) > 3 or not all(p.isdecimal() for p in parts):
    raise UserError(
      f"mesh {text!r}: write FSDP, FSDPxTENSOR or REPLICAxFSDPxTENSOR, as 8,"
      " 64x4 or 2x64x4"
    )
  n = list(map(int, parts))
  replica, fsdp, tensor = {1: [1, *n, 1], 2: [1, *n], 3: n}[len(n)]
  return MeshConfig(replica=replica, fsdp=fsdp, tensor=tensor)


def mesh_sizes(config: MeshConfig, devices: int) -> tuple[int, int, int]:
  """Returns the sizes of the mesh axes, with -1 replaced.

  Raises:
    UserError: their product isn't the number of devices; the message has the
      arithmetic and the nearest valid sizes.
  """
  sizes = dataclasses.astuple(config)
  if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
    raise UserError(
      f"mesh sizes {dict(zip(AXES, sizes, strict=True))}: use"
      " positive numbers and at most one -1"
    )
  known = math.prod(s for s in sizes if s != -1)
  left, rest = divmod(devices, known)
  if rest or (left != 1 and -1 not in sizes):
    raise UserError(_misfit(sizes, known, devices))
  replica, fsdp, tensor = (left if s == -1 else s for s in sizes)
  return replica, fsdp, tensor


def _misfit(sizes: tuple[int, ...], known: int, devices: int) -> str:
  """Returns why sizes don't fit, and the valid values of each single size."""
  text = " x ".join(
    f"{name}={size}" for name, size in zip(AXES, sizes, strict=True)
  )
  if -1 in sizes:
    free = AXES[sizes.index(-1)]
    why = f"{devices} / {known} is not a whole number for mesh.{free}"
  else:
    why = f"that is {known}"
  valid = []
  for name, size in zip(AXES, sizes, strict=True):
    others, rest = divmod(known, size) if size != -1 else (known, 0)
    if size != -1 and not devices % others:
      room = devices // others
      fits = [room] if -1 not in sizes else _divisors(room)
      valid += [f"mesh.{name}={n}" for n in _nearest(fits, size)]
  return (
    f"mesh {text} does not fit {devices} device(s): {why}; nearest valid:"
    f" {' or '.join(valid) or 'mesh.fsdp=-1 and 1 for the others'}"
  )


def _divisors(number: int) -> list[int]:
  return [n for n in range(1, number + 1) if number % n == 0]


def _nearest(values: list[int], to: int) -> list[int]:
  """Returns the closest values below and above a number."""
  below = [max(v for v in values if v < to)] if min(values) < to else []
  above = [min(v for v in values if v > to)] if max(values) > to else []
  return below + above


def data_shards(mesh: AnyMesh) -> int:
  """Returns the number of shards that a batch is split into."""
  return mesh.shape["replica"] * mesh.shape["fsdp"]


def check_splits(what: str, size: int, axis: str, mesh: AnyMesh) -> None:
  """Raises Unsplittable if a mesh axis doesn't divide a size of the model.

  Args:
    what: name of the size, for the message.
    size: the size.
    axis: the mesh axis that splits it.
    mesh: the mesh.
  """
  shards = mesh.shape[axis]
  if size % shards:
    near = [f"mesh.{axis}={n}" for n in _nearest(_divisors(size), shards)]
    if axis == RULES.embed:  # copies instead of shards fit any device count
      near = ["mesh.replica=-1 with mesh.fsdp=1", *near]
    raise Unsplittable(
      f"{what}={size} does not split over mesh.{axis}={shards}: {size} /"
      f" {shards} = {size / shards:.4g}; nearest valid: {' or '.join(near)}, or"
      f" a multiple of {shards} for {what}"
    )


def gathered(spec: P) -> P:
  """Returns a parameter's spec after gathering it over data shards.

  Only the tensor axis stays split, as the matrix products need it.
  """
  split = lambda axis: bool(_as_set(axis) - set(BATCH_AXES))
  return P(*(axis if split(axis) else None for axis in spec))


def vocab_ids(width: int) -> jax.Array:
  """Returns the token ids along a vocabulary axis of size `width`.

  Inside a `shard_map` over the vocabulary these are the ids of this tensor
  shard, elsewhere 0 to width - 1.
  """
  ids = jnp.arange(width)
  if RULES.vocab in jax.sharding.get_abstract_mesh().manual_axes:
    ids = ids + jax.lax.axis_index(RULES.vocab) * width
  return ids


def sum_over_shards(values: jax.Array, spec: P) -> jax.Array:
  """Sums an array over data shards, keeping this one's part (reduce-scatter).

  To be called inside a `shard_map`.

  Args:
    values: this shard's summand, of the full size.
    spec: how the result is sharded.
  """
  for axis in BATCH_AXES:
    if axis not in spec:
      values = jax.lax.psum(values, axis)
    # Not over one device: there XLA would transpose the array for nothing.
    elif jax.lax.axis_size(axis) > 1:
      at = list(spec).index(axis)
      values = jax.lax.psum_scatter(
        values, axis, scatter_dimension=at, tiled=True
      )
  return values


def padded_rows(rows: int, mesh: AnyMesh) -> int:
  """Returns the number of rows rounded up to a multiple of the data shards."""
  shards = data_shards(mesh)
  return -(-rows // shards) * shards


def batch_sharding(mesh: AnyMesh, rank: int, axis: int = 0):
  """Returns the sharding of an array of rank `rank` with its rows at `axis`."""
  names = ["batch" if i == axis else None for i in range(rank)]
  return NamedSharding(mesh, RULES.spec(*names))


def put(tree: Any, sharding: NamedSharding) -> Any:
  """Puts a tree of host arrays on the devices.

  In a multi-process run every process must have all of their values.
  """
  if sharding.is_fully_addressable:
    return jax.device_put(tree, sharding)

  def place(values: np.ndarray) -> jax.Array:
    read = lambda index: np.asarray(values)[index]
    return jax.make_array_from_callback(np.shape(values), sharding, read)

  return jax.tree.map(place, tree)


def _as_set(axis: Axis) -> set[str]:
  return {axis} if isinstance(axis, str) else set(axis or ())
