"""What a run is going to do, before it does it."""

import jax
import numpy as np
from rich.table import Table

from mdm_jax.core.config import Config
from mdm_jax.core.progress import console
from mdm_jax.data.prepared import PreparedData
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.training.curriculum import Curriculum


def show(
  config: Config,
  data: PreparedData,
  curriculum: Curriculum,
  denoiser: Denoiser,
  mesh: jax.sharding.Mesh,
) -> None:
  """Prints the stages, the model and what the sampler will meet untrained."""
  table = Table(title=f"{config.name}: {config.data.corpus}")
  for name in ("stage", "text", "rows", "length", "mask rate", "rehearsal"):
    table.add_column(name)
  for name in ("epochs", "updates", "tokens"):
    table.add_column(name, justify="right")
  for stage, rows in zip(curriculum.stages, data.stages, strict=True):
    table.add_row(*_stage_row(config, stage, rows))
  console.print(table)
  sizes = dict(mesh.shape)
  console.print(
    f"parameters {num_params(denoiser):,}; vocabulary"
    f" {data.tokenizer.vocab.size:,}; effective batch"
    f" {config.rows_per_update} rows; held-out rows {len(data.held_out):,};"
    f" {mesh.devices.flat[0].device_kind} mesh {sizes}"
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


def _stage_row(config: Config, stage, rows) -> list[str]:
  drawn = stage.updates * config.rows_per_update
  filled = float((rows.segments[:256] > 0).mean())
  s = stage.config
  rates = "U(0, 1)" if s.mask_rate is None else "{:g}-{:g}".format(*s.mask_rate)
  return [
    s.name,
    s.unit,
    f"{stage.rows:,}",
    str(s.length),
    rates,
    f"{s.rehearsal:g}",
    f"{drawn / stage.rows:.2f}",
    f"{stage.updates:,}",
    f"{drawn * s.length * filled / 1e6:.2f}M",
  ]
