"""The programs of a run, traced for a mesh of any kind."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mdm_jax.blueprint import Blueprint
from mdm_jax.core import sharding
from mdm_jax.core.accelerators import Accelerator
from mdm_jax.core.sharding import AXES, batch_sharding
from mdm_jax.planning.footprint import abstract_batch
from mdm_jax.sampling import schedule, tokens
from mdm_jax.sampling.call import Canvas
from mdm_jax.sampling.sampler import make_sampler

PROGRAMS = "train_step", "sampler"


@dataclasses.dataclass(frozen=True)
class Program:
  """A program of a run.

  Attributes:
    name: `train_step`, an update; or `sampler`, a call of the sampler.
    stage: of the update, from 0; -1 is the last.
    texts: rows of the sampler's call; None for one per data shard.
  """

  name: str
  stage: int = -1
  texts: int | None = None


def trace(run: Blueprint, program: Program, mesh: Any) -> jax.stages.Traced:
  """Traces a program of the run for a mesh of any kind.

  Args:
    run: made by `fit.blueprint`.
    program: which program.
    mesh: an abstract mesh, or one of real, fake or topology devices.
  """
  # Built on an abstract mesh: small arrays are computed on the way, and a
  # topology has no device that could.
  with jax.sharding.use_abstract_mesh(abstract(mesh)):
    make = _sampler if program.name == "sampler" else _train_step
    function, arguments = make(run, program, mesh)
  with _on(mesh):
    return function.trace(*arguments)


def _train_step(
  run: Blueprint, program: Program, mesh: Any
) -> tuple[Any, tuple[Any, ...]]:
  stage = run.curriculum.stages[program.stage]
  state = _on_mesh(run.abstract(), mesh)
  batch = abstract_batch(run, stage, mesh)
  base = _on_mesh(run.abstract_base(), mesh)
  return run.step(stage), (state, batch, base)


def _sampler(
  run: Blueprint, program: Program, mesh: Any
) -> tuple[Any, tuple[Any, ...]]:
  config, length = run.config.sample, run.config.sample_length
  rows = sharding.padded_rows(program.texts or 1, mesh)
  shape = lambda dtype, *sizes: jax.ShapeDtypeStruct(
    sizes, dtype, sharding=batch_sharding(mesh, len(sizes))
  )
  canvas = Canvas(
    shape(jnp.int32, rows, length),
    shape(jnp.bool_, rows, length),
    shape(jnp.int32, rows),
  )
  whole = NamedSharding(mesh, P())
  replicated = lambda x: jax.ShapeDtypeStruct(
    np.shape(x), np.asarray(x).dtype, sharding=whole
  )
  pace = jax.tree.map(replicated, schedule.pace(config, length, None))
  settings = tokens.effective_settings(config)
  # Random keys have a dtype of their own; this finds it without a device.
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
  keys = jax.ShapeDtypeStruct(
    keys.shape, keys.dtype, sharding=batch_sharding(mesh, 1)
  )
  function = make_sampler(config, run.denoiser, run.vocab)
  params = _on_mesh(run.abstract().params, mesh)
  return function, (params, canvas, pace, settings, keys)


def _on_mesh(tree: Any, mesh: Any) -> Any:
  """Returns a tree's shapes with their shardings on a mesh."""

  def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    spec = x.sharding.spec if x.sharding else P()
    split = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split)

  return jax.tree.map(place, tree)


@contextlib.contextmanager
def _on(mesh: Any) -> Iterator[None]:
  if isinstance(mesh, AbstractMesh):
    with jax.sharding.use_abstract_mesh(mesh):
      yield
  else:
    with jax.set_mesh(mesh):
      yield


def abstract(mesh: Any, device: Accelerator | None = None) -> AbstractMesh:
  """Returns the abstract mesh of the same shape, of a kind of GPU if given."""
  sizes = dict(zip(AXES, mesh.shape.values(), strict=True))
  return sharding.planned_mesh(sharding.MeshConfig(**sizes), device)
