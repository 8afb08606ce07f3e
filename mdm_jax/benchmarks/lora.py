"""Compares LoRA with training all parameters: memory and time of an update.

  python -m mdm_jax.benchmarks.lora --preset=bpe --ranks=8,64 --json

Prints a table with a row for each rank, 0 for all parameters:

trained      parameters that are trained, in millions
state        MB of a checkpoint: they, their average and the moments
planned      MB at the peak of an update, as `--mode=plan` predicts it
compiled     MB at the peak, as XLA's compiler lays it out
FLOPs, time  of an update, in those of training all; timed in turn
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from mdm_jax.benchmarks import timing, workload
from mdm_jax.benchmarks.workload import PRESETS, Preset
from mdm_jax.core import log_lines
from mdm_jax.core.progress import console
from mdm_jax.core.sharding import MeshConfig, make_mesh
from mdm_jax.model.config import LoraConfig
from mdm_jax.planning import footprint

_COLUMNS = "rank", "trained", "state", "planned", "compiled", "FLOPs", "time"


def measure(
  preset: Preset, ranks: Sequence[int], repeats: int
) -> list[dict[str, float]]:
  """Returns a row for training all parameters, and one for each rank.

  Args:
    preset: the model and the batch.
    ranks: LoRA's, on all products.
    repeats: turns of the timing.
  """
  data = workload.make_data(preset, workload.make_rows(preset))
  config = workload.make_config(preset)
  rows, runs = [], {}
  for rank in (0, *ranks):
    model = dataclasses.replace(config.model, lora=LoraConfig(rank=rank))
    # The base is random; a run would need a model to start from.
    source = "random" if rank else ""
    config = dataclasses.replace(config, model=model, init_from=source)
    work = workload.make_work(config, data, jax.sharding.get_mesh())
    update, row = _prepared(work)
    runs[str(rank)] = update
    rows.append({"rank": rank} | row)
  seconds = timing.interleave(runs, repeats)
  medians = [timing.spread(seconds[name])["median"] for name in runs]
  flops = rows[0]["FLOPs"]
  for row, median in zip(rows, medians, strict=True):
    row |= {"FLOPs": row["FLOPs"] / flops, "time": median / medians[0]}
  return rows


def _prepared(work: workload.Work) -> tuple[Any, dict[str, float]]:
  trainer, mesh = work.trainer, jax.sharding.get_mesh().abstract_mesh
  stage = trainer.curriculum.stages[0]
  state = trainer.init()
  program = timing.compiled(
    trainer.step(stage), state, work.batch, trainer.base
  )
  size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
  planned = footprint.footprint(trainer, mesh).total
  row = {
    "trained": size(state.params) / 4e6,
    "state": size(state) / 1e6,
    "planned": planned / 1e6,
    "compiled": program.peak_bytes / 1e6,
    "FLOPs": trainer.update_flops(stage),
  }
  return _Updates(program, state, (work.batch, trainer.base)), row


class _Updates:
  """An update that is called over and over, on the state it returned."""

  def __init__(self, program: timing.Program, state: Any, args: tuple):
    self._program, self._state, self._args = program, state, args

  def __call__(self) -> Any:
    self._state, metrics = self._program.call(self._state, *self._args)
    return metrics


def main(_: list[str]) -> None:
  values = flags.FLAGS
  jax.config.update("jax_enable_compilation_cache", False)
  with jax.set_mesh(make_mesh(MeshConfig())):
    ranks = [int(rank) for rank in values.ranks]
    rows = measure(PRESETS[values.preset], ranks, values.repeats)
  console.print("".join(f"{name:>10}" for name in _COLUMNS), highlight=False)
  for row in rows:
    cells = "".join(f"{round(row[name], 2):>10}" for name in _COLUMNS)
    console.print(cells, highlight=False)
  if values.json:
    print(json.dumps({"facts": timing.facts(), "rows": rows}))


def _define_flags() -> None:
  flags.DEFINE_enum("preset", "bpe", list(PRESETS), "Which model.")
  flags.DEFINE_list("ranks", ["8", "64"], "LoRA's ranks.")
  flags.DEFINE_integer("repeats", 5, "Turns.", 1)
  flags.DEFINE_bool("json", False, "Print JSON on the last line.")


if __name__ == "__main__":
  _define_flags()
  log_lines.run(main)
