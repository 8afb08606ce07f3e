"""Reads the weights of a Hugging Face folder into our parameter tree.

One leaf after the other goes from the memory-mapped files onto the devices, so
host memory holds the shards of one leaf at most, never the model.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from mdm_jax.core import trees
from mdm_jax.core.errors import UserError
from mdm_jax.huggingface.families import Architecture
from mdm_jax.model.denoiser import Denoiser, Params

Tensors = Mapping[str, Any]  # arrays by name

# How many leading axes of our weights are inputs. PyTorch stores
# [outputs, inputs], each as one axis.
_INPUTS = {
  **dict.fromkeys(("query", "key", "value", "gate", "up", "down"), 1),
  "out": 3,
}
_TABLES = "embedding", "head", "head_bias"  # a row for each id
# Constants that some versions of transformers saved along with the weights.
_CONSTANTS = re.compile(r"rotary_emb\.inv_freq$")
_CHUNK = 4096  # rows of a table read at once


def read_params(
  tensors: Tensors,
  found: Architecture,
  denoiser: Denoiser,
  fresh: Collection[int] = (),
) -> Params:
  """Returns parameters in float32, sharded over the current mesh.

  Rows of the embedding and the head that the folder does not have, and those of
  `fresh` ids, start at the mean of the others.

  Args:
    tensors: weights by name.
    found: the architecture that they belong to.
    denoiser: our model of this architecture.
    fresh: ids that the weights were not trained with, such as an added mask.

  Raises:
    UserError: tensors are missing, left over, of another shape or dtype.
  """
  shapes = jax.eval_shape(denoiser.init, jax.random.key(0))
  leaves = {
    path: Leaf(path, found.family.names.get(path, path), found)
    for path in trees.by_path(shapes)
  }
  if found.family.prepare:
    tensors = found.family.prepare(tensors)
  _check_names(tensors, leaves.values(), found)
  mesh = jax.sharding.get_mesh()

  def read(shape: jax.ShapeDtypeStruct, leaf: Leaf) -> jax.Array:
    fill = leaf.reader(tensors, shape, fresh)
    sharding = NamedSharding(mesh, shape.sharding.spec)
    array = jax.make_array_from_callback(shape.shape, sharding, fill)
    # Waits, so that the host memory of a leaf is free before the next is read.
    return jax.block_until_ready(array)

  tree = jax.tree.structure(shapes)
  return jax.tree.map(read, shapes, jax.tree.unflatten(tree, leaves.values()))


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One of our parameters, and the tensors that it is made of.

  Attributes:
    path: of the parameter in the tree, with slashes.
    name: of the tensor; {} stands for the layer's number.
    found: the architecture that the tensors belong to.
  """

  path: str
  name: str
  found: Architecture

  @property
  def names(self) -> list[str]:
    """The tensors: one for each layer, or a single one."""
    count = self.found.model.num_layers
    layers = range(count) if self.is_stacked else [0]
    return [self.name.format(layer) for layer in layers]

  @property
  def is_stacked(self) -> bool:
    """Whether the first axis of the parameter is the layer."""
    return self.path.startswith("blocks/")

  def theirs(self, ours: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of a tensor, given that of the parameter."""
    if self.path in _TABLES:
      return self.found.rows, *ours[1:]
    inputs, outputs = self._split(ours)
    sizes = [math.prod(outputs), math.prod(inputs)]
    return tuple(sizes) if inputs else tuple(sizes[:1])

  def ours(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns a view of a tensor in the axes of the parameter."""
    if self.path in _TABLES:
      return tensor
    inputs, outputs = self._split(shape)
    axes = np.roll(np.arange(len(shape)), len(inputs))
    return tensor.reshape(outputs + inputs).transpose(axes)

  def tensor(self, ours: np.ndarray) -> np.ndarray:
    """Returns a view of the parameter, or one of its layers, as a tensor."""
    if self.path in _TABLES:
      return ours
    inputs, _ = self._split(ours.shape)
    axes = np.roll(np.arange(ours.ndim), -len(inputs))
    return ours.transpose(axes).reshape(self.theirs(ours.shape))

  def reader(
    self,
    tensors: Tensors,
    shape: jax.ShapeDtypeStruct,
    fresh: Collection[int],
  ):
    """Returns a function of an index that reads that part of the parameter."""
    one = shape.shape[1:] if self.is_stacked else shape.shape
    views = [self._view(tensors, name, one) for name in self.names]
    if self.path in _TABLES:
      return _table(views[0], shape, fresh)
    if not self.is_stacked:
      return lambda index: views[0][index].astype(shape.dtype)

    def read(index: tuple[slice, ...]) -> np.ndarray:
      parts = [view[index[1:]] for view in views[index[0]]]
      result = np.empty((len(parts), *parts[0].shape), shape.dtype)
      for i, part in enumerate(parts):
        result[i] = part  # read from the file only here
      return result

    return read

  def _view(self, tensors: Tensors, name: str, one: tuple[int, ...]):
    tensor, wanted = tensors[name], self.theirs(one)
    if tensor.shape != wanted:
      raise UserError(
        f"{name} has shape {list(tensor.shape)}; config.json makes it"
        f" {list(wanted)}"
      )
    return self.ours(tensor, one)

  def _split(self, shape: tuple[int, ...]):
    count = _INPUTS.get(self.path.rpartition("/")[2], 0)
    return shape[:count], shape[count:]


def _table(
  rows: np.ndarray, shape: jax.ShapeDtypeStruct, fresh: Collection[int]
):
  """Returns a function of an index that reads that part of a table [V, ...].

  Rows past the tensor's, and `fresh` ones, are the mean of the others.
  """
  new = sorted(i for i in fresh if i < len(rows))
  mean = None
  if new or shape.shape[0] > len(rows):
    total = -rows[new].astype(np.float64).sum(axis=0)
    for start in range(0, len(rows), _CHUNK):
      total += rows[start : start + _CHUNK].astype(np.float64).sum(axis=0)
    mean = total / (len(rows) - len(new))

  def read(index: tuple[slice, ...]) -> np.ndarray:
    first, past, _ = index[0].indices(shape.shape[0])
    part = rows[first:past, *index[1:]].astype(shape.dtype)
    if mean is None:
      return part
    row = np.asarray(mean[*index[1:]]).astype(shape.dtype)
    more = np.broadcast_to(row, (past - first - len(part), *row.shape))
    result = np.concatenate([part, more])
    result[[i - first for i in new if first <= i < past]] = row
    return result

  return read


def _check_names(
  tensors: Tensors, leaves: Collection[Leaf], found: Architecture
) -> None:
  """Raises UserError unless there is a tensor for each leaf, and no other."""
  wanted = {name for leaf in leaves for name in leaf.names} | {*found.zeros}
  if missing := sorted(wanted - set(tensors)):
    raise UserError(f"{_few(missing)} missing from the weights")
  left = {n for n in tensors if not _CONSTANTS.search(n)} - wanted
  names = found.family.names
  if found.model.tie_embeddings and names["head"] in left:
    # Some files hold a tied head as well. It must be the embedding.
    _check_tied(tensors[names["head"]], tensors[names["embedding"]], names)
    left.remove(names["head"])
  if left:
    raise UserError(
      f"{_few(sorted(left))} left over: a model of config.json has no such"
      " weights"
    )
  _check_zeros(tensors, found.zeros)


def _check_zeros(tensors: Tensors, names: Collection[str]) -> None:
  for name in names:
    if np.any(tensors[name]):
      raise UserError(
        f"{name} is not 0, but our attention has biases on queries, keys and"
        " values only"
      )


def _check_tied(
  head: np.ndarray, embedding: np.ndarray, names: Mapping[str, str]
) -> None:
  same = head.shape == embedding.shape and all(
    np.array_equal(head[i : i + _CHUNK], embedding[i : i + _CHUNK])
    for i in range(0, len(head), _CHUNK)
  )
  if not same:
    raise UserError(
      f"{names['head']} differs from {names['embedding']}, but config.json says"
      " that they are tied"
    )


def _few(names: list[str]) -> str:
  rest = len(names) - 3
  shown = ", ".join(names[:3])
  verb = "is" if len(names) == 1 else "are"
  return f"{shown} and {rest} more {verb}" if rest > 0 else f"{shown} {verb}"
