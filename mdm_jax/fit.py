"""Checks whether a run fits a mesh of devices that you don't have.

  python -m mdm_jax.plan --config=configs/8b.py --mesh=64x4 --device=v5e

prints how every parameter is sharded and what each device holds. It needs
neither the text nor an accelerator. A run that can't fit is refused with the
numbers.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh

from mdm_jax.blueprint import Blueprint
from mdm_jax.config import Config
from mdm_jax.core import accelerators, hardware, sharding
from mdm_jax.core.accelerators import GIB, Accelerator
from mdm_jax.core.errors import UserError
from mdm_jax.core.progress import console
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data.inputs import given_tokenizer
from mdm_jax.data.tokenizer import planned_vocabulary
from mdm_jax.huggingface import folder as folders
from mdm_jax.model import kernel_choice, layer_loop, placement
from mdm_jax.model.kernels import Case, Place
from mdm_jax.planning import larger_batches
from mdm_jax.planning.footprint import (
  KEPT,
  Footprint,
  Layout,
  footprint,
  hold_scores,
)

# What `auto` stands for in a plan; else it would ask this machine's devices.
# Accelerators compute in bfloat16 by default; cuDNN's attention can't be traced
# without a GPU.
_TRACED = {"dtype": "bfloat16", "attention": "xla"}
# In a plan for no device in particular, or for a TPU.
PLANNED = _TRACED | {"remat": "dots", "layer_loop": "scan"}
_MIB = 2**20


def plan_mesh(config: Config, mesh: str, device: str | None) -> dict[str, Any]:
  """Prints what each device of a mesh would hold; returns the bytes.

  Args:
    config: the run's config.
    mesh: axis sizes, as in 64x4.
    device: name of the accelerator that the run must fit, if any.

  Returns:
    Bytes per device: `held` during the whole run, `passing` during a part of an
    update, and the `total` at its peak.

  Raises:
    UserError: the run does not split over the mesh, or does not fit the device.
  """
  accelerator = device and accelerators.by_name(device)
  gpu = accelerator if accelerator and accelerator.capability else None
  devices = sharding.planned_mesh(sharding.parse_mesh(mesh), gpu)
  run = blueprint(config, devices, auto=_auto(config, devices))
  scores = has_scores(config, gpu)
  found = footprint(run, devices, scores)
  kernels = sorted({c.name for c in _kernels(config, gpu)}) if gpu else ()
  lines = describe(run, devices, found, kernels)
  if gpu:
    with jax.sharding.use_abstract_mesh(devices):
      lines += [f"on {gpu.name}, {choice}" for choice in _choices(config, gpu)]
  elif accelerator:
    lines += _on_tpu(config, accelerator)
  console.print("\n".join(lines), soft_wrap=True)
  if accelerator:
    console.print(_verdict(run, found, accelerator), soft_wrap=True)
    total = lambda other: footprint(other, devices, scores).total
    larger = larger_batches.fitting(run, accelerator.memory, total)
    for line in larger_batches.describe(config.rows_per_update, larger):
      console.print(line, soft_wrap=True)
  return {"held": found.held, "passing": found.passing, "total": found.total}


def blueprint(
  config: Config,
  mesh: AbstractMesh,
  vocab: Vocabulary | None = None,
  auto: Mapping[str, str] = PLANNED,
) -> Blueprint:
  """Returns the run as accelerators would train it.

  Args:
    config: the run's config.
    mesh: the devices.
    vocab: in place of the one that the config's tokenizer is planned to have.
    auto: values of the model's fields that are `auto`.

  Raises:
    UserError: the run does not split over the mesh.
  """
  chosen = {k: v for k, v in auto.items() if getattr(config.model, k) == "auto"}
  model = dataclasses.replace(config.model, **chosen)
  config = dataclasses.replace(config, model=model)
  placement.check_model(config.model, mesh)
  if vocab is None and folders.is_named(config.init_from):
    vocab = given_tokenizer(config.rows, None).vocab
  vocab = vocab or planned_vocabulary(config.tokenizer)
  placement.check_vocabulary(vocab.size, mesh)
  # The number of rows decides how long a stage takes, not what it holds: those
  # of one update will do.
  rows = [config.rows_per_update] * len(config.stages)
  return Blueprint(config, vocab, rows)


def describe(
  run: Blueprint,
  mesh: AbstractMesh,
  found: Footprint,
  kernels: Collection[str] = (),
) -> list[str]:
  """Returns lines: the plan, how arrays are sharded, what a device holds.

  Args:
    run: the run.
    mesh: the devices.
    found: what each of them holds.
    kernels: names of the attention kernels, if not that of the run's config.
  """
  config = run.config
  attention = ", ".join(kernels) or config.model.attention
  sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
  rows = config.data.batch_size
  count = sum(math.prod(p.shape) for p in found.params)
  return [
    f"{config.name}: vocabulary {run.vocab.size:,}, {config.model.dtype},"
    f" attention {attention}, remat {config.model.remat}",
    f"{sizes}, devices {mesh.size}: {rows} rows per microbatch,"
    f" {_rows_a_shard(rows, mesh)}, microbatches per update"
    f" {config.optimizer.accumulation}",
    "",
    f"{count:,} parameters; their average, the optimizer's moments and the"
    " gradient are sharded alike:",
    *map(_line, found.params),
    "",
    "activations of all blocks that are stored for the backward pass:",
    *map(_line, found.kept),
    "",
    "memory per device",
    *(f"  {name:<55}{_mib(size)}" for name, size in _parts(found).items()),
    f"  {'total at the peak':<55}{_mib(found.total)}",
  ]


def _rows_a_shard(rows: int, mesh: AbstractMesh) -> str:
  padded = sharding.padded_rows(rows, mesh)
  text = f"{padded // sharding.data_shards(mesh)} per data shard"
  return text + (
    f" including {padded - rows} padding rows" if padded > rows else ""
  )


def _line(layout: Layout) -> str:
  return (
    f"  {layout.name:<33} {layout.dtype!s:<8} {_mib(layout.bytes)}  {layout}"
  )


def _mib(size: int) -> str:
  return f"{size / _MIB:>12,.2f} MiB"


def _parts(found: Footprint) -> dict[str, int]:
  """Returns bytes by name: first those held throughout, then temporaries."""
  passing = {
    "head": "head: embedding table, its gradient, a chunk of logits",
    "block": "or block: parameters, their gradients, attention scores",
  }
  if found.unrolled:
    passing[KEPT] = "activations, freed as the gradients are computed"
  return found.held | {
    passing.get(name, name): size for name, size in found.passing.items()
  }


def _auto(config: Config, mesh: AbstractMesh) -> Mapping[str, str]:
  """Returns what `auto` stands for on a mesh that may name its devices."""
  with jax.sharding.use_abstract_mesh(mesh):
    place = hardware.target()
    if place is None:
      return PLANNED
    loop = layer_loop.choose(config.model, place)
  kind = "unrolled" if loop.unrolled else "scan"
  return _TRACED | {"remat": loop.remat, "layer_loop": kind}


def has_scores(config: Config, device: Accelerator | None) -> bool:
  """Returns whether attention holds all pairs' scores in some stage.

  Args:
    config: the run's config.
    device: the GPU that the run is planned for; None for another device.
  """
  if device is None:
    return True
  return hold_scores(c.name for c in _kernels(config, device))


def _choices(config: Config, device: Accelerator) -> list[str]:
  """Returns what is chosen on a mesh of GPUs: kernels, how layers are run."""
  loop = layer_loop.choose(config.model, Place("gpu", device.capability))
  return sorted(map(str, (*_kernels(config, device), loop)))


def _on_tpu(config: Config, device: Accelerator) -> list[str]:
  """Returns what is chosen there, and that the plan has XLA's attention."""
  kernels = _kernels(config, device)
  lines = sorted(f"on {device.name}, {choice}" for choice in kernels)
  if {choice.name for choice in kernels} != {"xla"}:
    lines.append("planned with XLA's own attention, which needs more memory")
  return lines


def _kernels(config: Config, device: Accelerator) -> set[kernel_choice.Choice]:
  model = config.model
  dtype = "bfloat16" if model.dtype == "auto" else model.dtype
  place = Place("gpu" if device.capability else "tpu", device.capability)
  return {
    kernel_choice.choose(
      *(model.attention, place),
      Case(dtype, model.head_size, stage.length, stage.length),
    )
    for stage in config.stages
  }


def _verdict(run: Blueprint, found: Footprint, device: Accelerator) -> str:
  """Returns a line that the run fits, or raises UserError."""
  need, have = found.total / GIB, device.memory / GIB
  if found.total <= device.memory:
    return f"fits {device.name}: {need:.2f} of {have:.0f} GiB"
  parts = _parts(found)
  worst = max(parts, key=parts.__getitem__)
  raise UserError(
    f"{device.name} has {have:.0f} GiB, each device would need {need:.2f} GiB,"
    f" most of it: {worst.removeprefix('or ')} ({parts[worst] / GIB:.2f} GiB);"
    f" nearest valid: {_cure(run, found, device)}"
  )


def _cure(run: Blueprint, found: Footprint, device: Accelerator) -> str:
  """Returns what to change so that the run fits."""
  cures = []
  # Smaller microbatches shrink only the temporaries.
  if sum(found.held.values()) <= device.memory:
    cures.append(
      "a smaller data.batch_size with a larger optimizer.accumulation"
    )
    if run.config.model.remat != "full":
      cures.append("model.remat=full")
  return ", or ".join([*cures, "a larger mesh.fsdp or mesh.tensor"])
