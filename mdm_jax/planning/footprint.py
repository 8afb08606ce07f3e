"""What a device of a mesh holds of a run, from shapes and shardings alone.

The state and what is kept for the backward pass are read off the traced update,
to the byte. What an update needs at once beside them is an estimate of its two
largest parts: how a compiler lays them out is its own affair.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, Literal
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mdm_jax.core.sharding import RULES, data_shards, padded_rows
from mdm_jax.data.batches import Batch
from mdm_jax.model.denoiser import compute_dtype
from mdm_jax.objectives import cross_entropy
from mdm_jax.training.curriculum import StagePlan
from mdm_jax.training.trainer import Recipe

_FLOAT32 = 4
# Arrays as large as attention's scores that a block's backward pass has at
# once, by what XLA took for TPUs: docs/scaling.md.
_SCORES = {"none": 5, "dots": 5, "full": 9}


@dataclasses.dataclass(frozen=True)
class Layout:
  """An array, and how it lies on a mesh.

  Attributes:
    name: its path in the state, or of what computes it.
    shape: of the whole array.
    dtype: of its entries.
    shards: how many parts each axis is split in.
  """

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  shards: tuple[int, ...]

  @property
  def bytes(self) -> int:
    """Bytes a device."""
    return math.prod(self.shape) // math.prod(self.shards) * self.dtype.itemsize

  def __str__(self) -> str:
    """As `4096/64 x 14336/4`: sizes, and what they are divided by."""
    parts = zip(self.shape, self.shards, strict=True)
    text = " x ".join(f"{n}/{k}" if k > 1 else str(n) for n, k in parts)
    return text or "scalar"


@dataclasses.dataclass(frozen=True)
class Footprint:
  """What a device holds.

  Attributes:
    params: every parameter; its average, moments and gradient lie as it does.
    kept: what the forward pass of the costliest stage leaves to the backward
      pass, all layers together.
    held: bytes from the first update to the last.
    passing: bytes for a part of an update.
  """

  params: tuple[Layout, ...]
  kept: tuple[Layout, ...]
  held: dict[str, int]
  passing: dict[str, int]

  @property
  def total(self) -> int:
    """Bytes at the worst moment of an update."""
    head, block = self.passing["head"], self.passing["block"]
    passing = sum(self.passing.values()) - min(head, block)
    return sum(self.held.values()) + passing


def footprint(run: Recipe, mesh: AbstractMesh) -> Footprint:
  """Returns what a device of the mesh holds in the run's costliest stage."""
  with jax.sharding.use_abstract_mesh(mesh):
    stages = [_of_stage(run, stage, mesh) for stage in run.curriculum.stages]
  return max(stages, key=lambda found: found.total)


def _of_stage(run: Recipe, stage: StagePlan, mesh: AbstractMesh) -> Footprint:
  state = run.abstract()
  params = layouts(state.params, mesh)
  size = sum(p.bytes for p in params)
  kept = kept_for_backward(run, stage, mesh)
  microbatches = run.accumulation
  return Footprint(
    params=params,
    kept=kept,
    held={
      "parameters": size,
      "their average": sum(p.bytes for p in layouts(state.ema_params, mesh)),
      "optimizer's state": sum(p.bytes for p in layouts(state.opt_state, mesh)),
    },
    passing={
      "gradients": size * min(microbatches, 2),
      "kept for the backward pass": sum(k.bytes for k in kept),
      "head": _head_bytes(run, stage, mesh),
      "block": _block_bytes(run, stage, params, mesh),
    },
  )


def layouts(tree: Any, mesh: AbstractMesh) -> tuple[Layout, ...]:
  """Returns how every array of a tree of shapes lies."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return tuple(
    _layout(jax.tree_util.keystr(path, simple=True, separator="/"), leaf, mesh)
    for path, leaf in leaves
  )


def _layout(name: str, value: Any, mesh: AbstractMesh) -> Layout:
  spec = value.sharding.spec if value.sharding else P(*[None] * value.ndim)
  axes = (a if isinstance(a, tuple) else (a,) if a else () for a in spec)
  shards = tuple(math.prod(mesh.shape[a] for a in axis) for axis in axes)
  return Layout(name, value.shape, np.dtype(value.dtype), shards)


# MARK: the traced update


def abstract_batch(run: Recipe, stage: StagePlan, mesh: AbstractMesh) -> Batch:
  """Returns the shapes of an update's rows."""
  sharding = NamedSharding(mesh, RULES.spec(None, "batch", None))
  shape = (
    run.accumulation,
    padded_rows(run.batch_size, mesh),
    stage.config.length,
  )
  rows = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
  return Batch(rows, rows)


def kept_for_backward(
  run: Recipe, stage: StagePlan, mesh: AbstractMesh
) -> tuple[Layout, ...]:
  """Returns what the blocks' forward passes leave to their backward passes.

  An objective may call the model more than once; all calls of a microbatch are
  held at the same time.
  """
  batch = abstract_batch(run, stage, mesh)
  traced = run.step(stage).trace(run.abstract(), batch)
  loops = filter(_is_forward, _equations(traced.jaxpr.jaxpr))
  return tuple(layout for loop in loops for layout in _stacked(loop, mesh))


def _is_forward(eqn: Any) -> bool:
  """Whether it is a loop over the layers: only there products have names.

  On the way back they have them inside what is computed again, or not at all.
  """
  return eqn.primitive.name == "scan" and any(
    inner.primitive.name == "name" for inner in eqn.params["jaxpr"].eqns
  )


def _stacked(loop: Any, mesh: AbstractMesh) -> Iterator[Layout]:
  """Yields what a loop over the layers returns of each of them."""
  body, length = loop.params["jaxpr"].jaxpr, loop.params["length"]
  names: dict[Any, str] = {}
  for eqn in body.eqns:
    if eqn.primitive.name == "name":
      names |= dict.fromkeys(eqn.outvars, eqn.params["name"])
    elif eqn.primitive.name == "reduce_precision":  # what is kept is rounded
      names[eqn.outvars[0]] = names.get(eqn.invars[0], "other")
  made = {var for eqn in body.eqns for var in eqn.outvars}
  for inner, outer in zip(body.outvars, loop.outvars, strict=True):
    # What goes on to the next layer is not stacked.
    stacked = outer.aval.shape == (length, *inner.aval.shape)
    if stacked and not isinstance(inner, Literal):
      name = names.get(inner, "other" if inner in made else "block input")
      yield _layout(name, outer.aval, mesh)


def _equations(jaxpr: Jaxpr) -> Iterator[Any]:
  """Yields all equations, an inner one after the one it is in."""
  for eqn in jaxpr.eqns:
    yield eqn
    for value in jax.tree.leaves(list(eqn.params.values())):
      inner = getattr(value, "jaxpr", value)
      if isinstance(inner, Jaxpr):
        yield from _equations(inner)


# MARK: at once


def _head_bytes(run: Recipe, stage: StagePlan, mesh: AbstractMesh) -> int:
  """The table of a tensor shard, its gradient, and a chunk of logits."""
  config = run.denoiser.config
  capacity = run.objective(stage).cost().asked
  width = config.embed_dim
  chunks = cross_entropy.num_chunks(capacity, width, run.denoiser.vocab)
  rows = -(-capacity // chunks)
  ids = run.denoiser.vocab.size // mesh.shape[RULES.vocab]
  table = ids * width * (compute_dtype(config).itemsize + _FLOAT32)
  return table + rows * ids * _FLOAT32


def _block_bytes(
  run: Recipe,
  stage: StagePlan,
  params: tuple[Layout, ...],
  mesh: AbstractMesh,
) -> int:
  """A layer's parameters, their gradient, and attention's scores."""
  config = run.denoiser.config
  weights = sum(
    p.bytes // p.dtype.itemsize * mesh.shape[RULES.embed]
    for p in params
    if p.name.startswith("blocks/") and len(p.shape) > 2
    if not p.name.endswith("bias")  # not split over it, and small
  )
  weights //= config.num_layers
  rows = padded_rows(run.batch_size, mesh) // data_shards(mesh)
  heads = config.num_heads // mesh.shape[RULES.heads]
  reads = run.objective(stage).cost().reads
  pairs = max(queries * keys for queries, keys in reads)
  scores = rows * heads * pairs * _FLOAT32
  size = compute_dtype(config).itemsize + _FLOAT32
  return weights * size + scores * _SCORES[config.remat]
