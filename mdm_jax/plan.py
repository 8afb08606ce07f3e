"""What a run is going to do, before it does it."""

import jax
import numpy as np
from rich import box
from rich.table import Table

from mdm_jax.core.config import Config
from mdm_jax.core.progress import console
from mdm_jax.data.prepared import PreparedData
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.training.curriculum import Curriculum, StagePlan


def show(
  config: Config,
  data: PreparedData,
  curriculum: Curriculum,
  denoiser: Denoiser,
  mesh: jax.sharding.Mesh,
) -> None:
  """Prints the stages, the model and what the sampler will meet untrained."""
  title = f"{config.name}: {config.data.corpus}"
  table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
  for name in ("stage", "text", "mask rate (+any)"):
    table.add_column(name, no_wrap=True)
  for name in ("rows", "epochs", "updates"):
    table.add_column(name, justify="right", no_wrap=True)
  for stage in curriculum.stages:
    table.add_row(*_stage_row(config, stage))
  console.print(table)
  sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
  console.print(
    f"{num_params(denoiser):,} parameters, vocabulary"
    f" {data.tokenizer.vocab.size:,}, {config.rows_per_update} rows an update,"
    f" {len(data.held_out):,} held-out rows;"
    f" {mesh.devices.flat[0].device_kind}: {sizes}",
    soft_wrap=True,
  )
  for warning in uncovered_rates(config):
    console.print(f"warning: {warning}")


def num_params(denoiser: Denoiser) -> int:
  """Returns the number of parameters."""
  shapes = jax.eval_shape(denoiser.init, jax.random.key(0))
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))


def uncovered_rates(config: Config) -> list[str]:
  """Returns a sentence if the sampler meets mask rates no stage trains."""
  if any(s.mask_rate is None or s.rehearsal > 0 for s in config.stages):
    return []
  gaps, reached = [], 0.0
  for low, high in sorted(s.mask_rate for s in config.stages):
    if low > reached:
      gaps.append(f"{reached:.2f}-{low:.2f}")
    reached = max(reached, high)
  if reached < 1:
    gaps.append(f"{reached:.2f}-1.00")
  if not gaps:
    return []
  return [
    f"no stage trains mask rates {', '.join(gaps)}, but sampling passes through"
    " them; set stages[i].rehearsal"
  ]


def _stage_row(config: Config, stage: StagePlan) -> list[str]:
  drawn = stage.updates * config.rows_per_update
  s = stage.config
  rates = "U(0, 1)" if s.mask_rate is None else "{:g}-{:g}".format(*s.mask_rate)
  if s.rehearsal:
    rates += f" +{s.rehearsal:.0%}"
  return [
    s.name,
    f"{s.unit} {s.length}",
    rates,
    f"{stage.rows:,}",
    f"{drawn / stage.rows:.2f}",
    f"{stage.updates:,}",
  ]
