"""Prepares a corpus of any size as sharded rows, with several processes.

python -m mdm_jax.main --mode=prepare --config=FILE \\
  --config.data.prepared=FOLDER --workers=4
"""

import os
from typing import Any

from etils import epath

from mdm_jax.config import Config
from mdm_jax.core import distributed
from mdm_jax.core.errors import UserError
from mdm_jax.core.progress import console, progress_bar
from mdm_jax.data import corpora, coverage, folder, inputs, preparation, splits
from mdm_jax.data.blocks import Block
from mdm_jax.data.passes import Job, Pass
from mdm_jax.data.stage_rows import stage_name
from mdm_jax.data.workers import Workers
from mdm_jax.runtime.signals import stop_request


def prepare_rows(
  config: Config, workdir: epath.PathLike | None, workers: int | None
) -> dict[str, Any]:
  """Fills the folder `data.prepared`, and prints what is in it.

  Args:
    config: of the run that will train on the rows.
    workdir: the run's folder, which may hold its tokenizer.
    workers: number of processes (None: one per core).

  Returns:
    The folder's manifest.

  Raises:
    UserError: no folder is given, or this is one of several processes.
    Stopped: a signal came; the same command continues.
  """
  if distributed.count() > 1:
    raise UserError(
      "--mode=prepare runs on one machine, with --workers; to use several, run"
      " python -m mdm_jax.prepare_beam"
    )
  with (
    stop_request() as stop,
    Workers(workers or os.cpu_count() or 1, stop.check) as pool,
  ):
    manifest = fill(config, workdir, _shown(pool))
    stop.check()
  print_summary(config, manifest)
  return manifest


def fill(
  config: Config, workdir: epath.PathLike | None, run: preparation.Run
) -> dict[str, Any]:
  """Fills the folder `data.prepared` with passes executed by `run`."""
  if not config.data.prepared:
    raise UserError("give the folder to fill: --config.data.prepared=FOLDER")
  given = inputs.given_tokenizer(config.rows, workdir)
  return folder.prepare_folder(config.rows, given, run)


def print_summary(config: Config, manifest: dict[str, Any]) -> None:
  """Prints what a prepared folder holds, one fact per line."""
  size = manifest["documents"]["bytes"] / 1e6
  lines = [
    f"{size:,.1f} MB in {manifest['blocks']['count']:,} blocks",
    *corpora.describe_revisions(manifest),
    splits.describe(manifest["split"]),
  ]
  for name, counts in manifest["rows"].items():
    lines.append(
      f"{name}: {counts['tokens']:,} tokens in {counts['rows']:,} rows"
    )
  for i, stage in enumerate(config.stages):
    left_out = coverage.left_out(stage, manifest["rows"][stage_name(i)])
    lines += [f"stages[{i}]: {line}" for line in left_out]
  lines += filter(None, [coverage.unread_text(manifest["text"])])
  lines.append(f"prepared: {config.data.prepared}")
  console.print("\n".join(lines), soft_wrap=True)


def _shown(pool: Workers) -> preparation.Run:
  """Returns a function that runs a pass in a pool, with a progress bar."""

  def run(name: Pass, job: Job, blocks: list[Block]) -> None:
    # A log file gets one line per pass instead of a bar.
    if not console.is_terminal:
      console.print(f"{name}: {len(blocks):,} blocks", soft_wrap=True)
    with progress_bar("blocks") as progress:
      task = progress.add_task(name, total=len(blocks))
      pool.run(name, job, blocks, lambda: progress.advance(task))

  return run
