"""Computes the memory a run needs per device, from shapes and shardings alone.

The training state and what a loop over the layers keeps for the backward pass
are read off the traced update, to the byte. Unrolled layers that keep
everything are counted by the arrays that XLA's GPU compiler keeps of them.
Temporaries beside them are an estimate, from the two largest parts of an
update: the compiler decides how they are laid out.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, Literal
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mdm_jax.core import hardware, trees
from mdm_jax.core.sharding import RULES, data_shards, padded_rows
from mdm_jax.data.batches import Batch
from mdm_jax.model import layer_loop
from mdm_jax.model.denoiser import compute_dtype
from mdm_jax.objectives import cross_entropy
from mdm_jax.training.curriculum import StagePlan
from mdm_jax.training.read_ahead import AHEAD
from mdm_jax.training.trainer import Recipe

_FLOAT32 = 4
# Arrays of the size of attention's scores that a block's backward pass holds at
# once, by `model.remat`; fitted to what XLA's TPU compiler allocated
# (docs/scaling.md).
_SCORES = {"none": 5, "dots": 5, "full": 9}

KEPT = "activations for the backward pass"
# Attention kernels that never hold the scores of all pairs of positions. Splash
# attention does not, either; but without scores 2.9 GiB would be planned for 8b
# on 64 x 4 TPUs, where libtpu assigned 5.5 (docs/scaling.md).
_WITHOUT_SCORES = {"cudnn", "cudnn_packed"}


@dataclasses.dataclass(frozen=True)
class Layout:
  """An array and its sharding on a mesh.

  Attributes:
    name: its path in the state, or the name of the operation that computes it.
    shape: of the whole array.
    dtype: of its elements.
    shards: number of parts that each axis is split into.
  """

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  shards: tuple[int, ...]

  @property
  def bytes(self) -> int:
    """Bytes per device."""
    return math.prod(self.shape) // math.prod(self.shards) * self.dtype.itemsize

  def __str__(self) -> str:
    """Formats as `4096/64 x 14336/4`: sizes, and what they are divided by."""
    parts = zip(self.shape, self.shards, strict=True)
    text = " x ".join(f"{n}/{k}" if k > 1 else str(n) for n, k in parts)
    return text or "scalar"


@dataclasses.dataclass(frozen=True)
class Footprint:
  """What a device holds.

  Attributes:
    params: every parameter; its average, moments and gradient have its
      sharding.
    kept: what the forward pass keeps for the backward pass in the stage that
      needs most, all layers together.
    held: bytes held during the whole run, by name.
    passing: bytes held during a part of an update, by name.
    unrolled: whether the layers are, so that what one of them keeps is freed
      once its gradients are computed.
  """

  params: tuple[Layout, ...]
  kept: tuple[Layout, ...]
  held: dict[str, int]
  passing: dict[str, int]
  unrolled: bool = False

  @property
  def total(self) -> int:
    """Bytes at the peak of an update."""
    # The head and a block are never at work at the same time, so only the
    # larger of the two counts.
    head, block = self.passing["head"], self.passing["block"]
    passing = sum(self.passing.values()) - min(head, block)
    if self.unrolled:
      # Gradients take the place of what is kept, layer by layer. A loop holds
      # its stacked arrays to its end.
      passing -= min(sum(p.bytes for p in self.params), self.passing[KEPT])
    return sum(self.held.values()) + passing


def footprint(
  run: Recipe, mesh: AbstractMesh, with_scores: bool = True
) -> Footprint:
  """Returns what a device of the mesh holds in the stage that needs most.

  Args:
    run: the run without rows and devices.
    mesh: axis sizes, and the kind of device if the plan is for one; no devices
      are needed.
    with_scores: whether attention holds scores, see `hold_scores`.
  """
  with jax.sharding.use_abstract_mesh(mesh):
    stages = [
      _of_stage(run, stage, mesh, with_scores)
      for stage in run.curriculum.stages
    ]
  return max(stages, key=lambda found: found.total)


def _of_stage(
  run: Recipe, stage: StagePlan, mesh: AbstractMesh, with_scores: bool
) -> Footprint:
  state = run.abstract()
  params = layouts(state.params, mesh)
  size = sum(p.bytes for p in params)
  loop = layer_loop.choose(run.denoiser.config, hardware.target())
  # Only without a loop: one copies whatever it keeps, so JAX decides what.
  everything = loop.unrolled and loop.remat == "none" and not with_scores
  keeps = unrolled_layers if everything else kept_for_backward
  kept = keeps(run, stage, mesh)
  if run.denoiser.config.attention == "xla" and not with_scores:
    # XLA's attention stands in for cuDNN's, which can't be traced here.
    kept += _kept_by_attention(run, stage, mesh) if loop.remat == "dots" else ()
  total = lambda tree: sum(array.bytes for array in layouts(tree, mesh))
  base = layouts(run.abstract_base(), mesh)
  beside = sum(p.bytes for p in base)
  rows = total(abstract_batch(run, stage, mesh))
  # One update is computed and one dispatched.
  updates = 2 + AHEAD
  return Footprint(
    params=params,
    kept=kept,
    held={
      "parameters": size,
      **({"parameters beside LoRA's": beside} if beside else {}),
      "averaged parameters (EMA)": total(state.ema_params),
      "optimizer state": total(state.opt_state),
      f"rows of {updates} updates, {AHEAD} of them read ahead": rows * updates,
    },
    passing={
      # With several microbatches, one's gradient is held beside the sum so far.
      "gradients": size * min(run.accumulation, 2),
      KEPT: sum(k.bytes for k in kept),
      "head": _head_bytes(run, stage, mesh),
      "block": _block_bytes(run, stage, base or params, mesh, with_scores),
    },
    unrolled=loop.unrolled,
  )


def hold_scores(kernels: Iterable[str]) -> bool:
  """Returns whether one of these kernels holds the scores of all pairs."""
  return not set(kernels) <= _WITHOUT_SCORES


def layouts(tree: Any, mesh: AbstractMesh) -> tuple[Layout, ...]:
  """Returns the layout of every array in a tree of shapes."""
  named = trees.by_path(tree).items()
  return tuple(_layout(name, leaf, mesh) for name, leaf in named)


def _layout(name: str, value: Any, mesh: AbstractMesh) -> Layout:
  spec = value.sharding.spec if value.sharding else P(*[None] * value.ndim)
  axes = (a if isinstance(a, tuple) else (a,) if a else () for a in spec)
  shards = tuple(math.prod(mesh.shape[a] for a in axis) for axis in axes)
  return Layout(name, value.shape, np.dtype(value.dtype), shards)


# MARK: the traced update


def abstract_batch(run: Recipe, stage: StagePlan, mesh: AbstractMesh) -> Batch:
  """Returns the shapes and shardings of one update's rows."""
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
  """Returns the arrays that the blocks keep for the backward pass.

  An objective may call the model more than once; the arrays of all calls of a
  microbatch are held at the same time.

  Args:
    run: the run without rows and devices.
    stage: whose update is traced.
    mesh: axis sizes.
  """
  batch = abstract_batch(run, stage, mesh)
  traced = run.step(stage).trace(run.abstract(), batch, run.abstract_base())
  loops = filter(_is_forward, _equations(traced.jaxpr.jaxpr))
  found = (layout for loop in loops for layout in _stacked(loop, mesh))
  # The last of unrolled layers stands behind the loop (`Network.unfinished`).
  layers = run.denoiser.config.num_layers
  all_layers = lambda shape: (layers, *shape[1:])
  return tuple(
    dataclasses.replace(layout, shape=all_layers(layout.shape))
    for layout in found
  )


def _is_forward(eqn: Any) -> bool:
  """Returns whether an equation is the forward loop over the layers.

  Only its products are named (`checkpoint_name`); the backward loop has the
  names inside what it recomputes, or not at all.
  """
  return eqn.primitive.name == "scan" and any(
    inner.primitive.name == "name" for inner in eqn.params["jaxpr"].eqns
  )


def _stacked(loop: Any, mesh: AbstractMesh) -> Iterator[Layout]:
  """Yields the arrays that a loop over the layers returns per layer."""
  body, length = loop.params["jaxpr"].jaxpr, loop.params["length"]
  names: dict[Any, str] = {}
  for eqn in body.eqns:
    if eqn.primitive.name == "name":
      names |= dict.fromkeys(eqn.outvars, eqn.params["name"])
    elif eqn.primitive.name == "reduce_precision":  # JAX rounds what it keeps
      names[eqn.outvars[0]] = names.get(eqn.invars[0], "other")
  made = {var for eqn in body.eqns for var in eqn.outvars}
  for inner, outer in zip(body.outvars, loop.outvars, strict=True):
    # The carry, passed to the next layer, has no axis of layers.
    stacked = outer.aval.shape == (length, *inner.aval.shape)
    if stacked and not isinstance(inner, Literal):
      name = names.get(inner, "other" if inner in made else "block input")
      yield _layout(name, outer.aval, mesh)


def _equations(jaxpr: Jaxpr) -> Iterator[Any]:
  """Yields all equations of a jaxpr, nested ones after their parents."""
  for eqn in jaxpr.eqns:
    yield eqn
    for value in jax.tree.leaves(list(eqn.params.values())):
      inner = getattr(value, "jaxpr", value)
      if isinstance(inner, Jaxpr):
        yield from _equations(inner)


def unrolled_layers(
  run: Recipe, stage: StagePlan, mesh: AbstractMesh
) -> tuple[Layout, ...]:
  """Returns what unrolled layers keep on a GPU if nothing is recomputed.

  XLA's GPU compiler keeps what products, attention, norms and rotation read or
  write; elementwise steps between them it fuses and computes again. So this is
  a count of such arrays; docs/performance.md compares it with that compiler's
  own numbers.

  Args:
    run: the run without rows and devices.
    stage: whose rows are counted.
    mesh: axis sizes.
  """
  config = run.denoiser.config
  dtype = np.dtype(compute_dtype(config))
  heads, groups = config.num_heads, config.num_kv_heads or config.num_heads
  split = mesh.shape[RULES.heads]
  sizes = {
    "block input": (1, config.embed_dim, 1),
    "norms": (2, config.embed_dim, 1),
    "query, rotated query": (2, heads * config.head_size, split),
    "key, rotated key": (2, groups * config.head_size, split),
    "value": (1, groups * config.head_size, split),
    "attention, transposed": (2, heads * config.head_size, split),
    "after attention": (1, config.embed_dim, 1),
    "gate_up": (2, config.mlp_size, mesh.shape[RULES.mlp]),
    "gated": (1, config.mlp_size, mesh.shape[RULES.mlp]),
  }
  tokens = _tokens(run, stage, mesh)
  return tuple(
    Layout(
      name,
      (config.num_layers, copies, tokens, width),
      dtype,
      (1, 1, data_shards(mesh), shards),
    )
    for name, (copies, width, shards) in sizes.items()
  )


def _kept_by_attention(
  run: Recipe, stage: StagePlan, mesh: AbstractMesh
) -> tuple[Layout, ...]:
  """Returns what cuDNN's attention gives: its output, and log-sums."""
  config, tokens = run.denoiser.config, _tokens(run, stage, mesh)
  dtype = np.dtype(compute_dtype(config))
  split = 1, data_shards(mesh), mesh.shape[RULES.heads]
  shape = lambda size: (config.num_layers, tokens, config.num_heads * size)
  return (
    Layout("attention", shape(config.head_size), dtype, split),
    Layout("log-sums of attention", shape(1), np.dtype(np.float32), split),
  )


def _tokens(run: Recipe, stage: StagePlan, mesh: AbstractMesh) -> int:
  """Returns the positions that a microbatch computes, in all calls."""
  reads = run.objective(stage).cost().reads
  return padded_rows(run.batch_size, mesh) * sum(
    queries for queries, _ in reads
  )


# MARK: at once


def _head_bytes(run: Recipe, stage: StagePlan, mesh: AbstractMesh) -> int:
  """Returns the bytes of a tensor shard's table, its gradient, and logits.

  The logits are those of one chunk of masked positions, in float32; on a GPU
  their gradient is an array of its own, in the compute dtype.
  """
  config = run.denoiser.config
  capacity = run.objective(stage).cost().asked
  width = config.embed_dim
  chunks = cross_entropy.num_chunks(capacity, width, run.denoiser.vocab)
  rows = -(-capacity // chunks)
  ids = run.denoiser.vocab.size // mesh.shape[RULES.vocab]
  size = compute_dtype(config).itemsize
  logits = rows * ids * (_FLOAT32 + size * hardware.on_gpu())
  return ids * width * (size + _FLOAT32) + logits


def _block_bytes(
  run: Recipe,
  stage: StagePlan,
  params: tuple[Layout, ...],
  mesh: AbstractMesh,
  with_scores: bool,
) -> int:
  """Returns the bytes of a layer's parameters, their gradient, and scores.

  Parameters are gathered over the fsdp axis, layer by layer, so they are
  counted unsplit there.
  """
  config = run.denoiser.config
  weights = sum(
    p.bytes // p.dtype.itemsize * mesh.shape[RULES.embed]
    for p in params
    if p.name.startswith("blocks/") and len(p.shape) > 2
    if not p.name.endswith("bias")  # not split over fsdp, and small
  )
  weights //= config.num_layers
  rows = padded_rows(run.batch_size, mesh) // data_shards(mesh)
  heads = config.num_heads // mesh.shape[RULES.heads]
  reads = run.objective(stage).cost().reads
  pairs = max(queries * keys for queries, keys in reads)
  scores = rows * heads * pairs * _FLOAT32
  size = compute_dtype(config).itemsize + _FLOAT32
  if not with_scores:
    # Its arrays, of which some are computed again and some are gradients.
    arrays = sum(a.bytes for a in unrolled_layers(run, stage, mesh))
    return weights * size + arrays // config.num_layers
  loop = layer_loop.choose(config, hardware.target())
  return weights * size + scores * _SCORES[loop.remat]
