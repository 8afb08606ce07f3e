"""Trains every variant of a config with several seeds, and compares them.

  python -m mdm_jax.studies.ablate --config=configs/ablation.py --seeds=3

Each run is the command that it prints: stop this program when you like, and the
same command goes on. A config file for it has `VARIANTS`, a dict from what may
follow its colon to what that changes; the first is what the others are
compared with.
"""

import csv
import dataclasses
import io
import math
import os
import runpy
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence

from absl import flags
from rich import box
from rich.table import Table

from mdm_jax import command_line
from mdm_jax.core import log_lines
from mdm_jax.core.errors import Exit, Failure, StorageError, UserError, nearest
from mdm_jax.core.fields import at_home
from mdm_jax.core.progress import console
from mdm_jax.workdir import Workdir

_COLUMNS = 3  # of a table on the screen

# Of results.json: where each number is found, and its name in the table.
MEASURES = {
  "NELBO": ("nelbo_per_token",),
  "bits/byte": ("bits_per_byte",),
  "CE(0.05)": ("ce_by_mask_rate", "0.05"),
  "CE(1.0)": ("ce_by_mask_rate", "1.00"),
  "seq-rep-4": ("text_metrics", "sampling", "seq_rep_4", "value"),
  "entropy": ("text_metrics", "sampling", "unigram_entropy", "value"),
  "judge": ("text_metrics", "sampling", "judge_nll", "value"),
  "seq-rep-4, T=1": ("text_metrics", "untruncated", "seq_rep_4", "value"),
  "entropy, T=1": ("text_metrics", "untruncated", "unigram_entropy", "value"),
  "judge, T=1": ("text_metrics", "untruncated", "judge_nll", "value"),
}


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A mean over seeds.

  Attributes:
    mean: over the runs that have the number; nan if none has.
    stderr: its standard error; nan for less than two runs.
  """

  mean: float
  stderr: float

  def __str__(self) -> str:
    if math.isnan(self.stderr):
      return f"{self.mean:.3f}"
    return f"{self.mean:.3f} ± {self.stderr:.3f}"


def estimate(values: Sequence[float]) -> Estimate:
  """Returns the mean of independent runs with its standard error."""
  if not values:
    return Estimate(math.nan, math.nan)
  mean = statistics.fmean(values)
  if len(values) < 2:
    return Estimate(mean, math.nan)
  return Estimate(mean, statistics.stdev(values) / math.sqrt(len(values)))


def main(_: list[str]) -> int:
  """Runs what is not finished yet and prints the comparison."""
  try:
    variants = _chosen(flags.FLAGS.config, flags.FLAGS.variants)
    folder = at_home(
      flags.FLAGS.workdir or os.path.join("runs", _name(flags.FLAGS.config))
    )
    # All variants with one seed first: a sweep cut short compares them all.
    for seed in range(flags.FLAGS.seeds):
      for variant in variants:
        code = _train(variant, seed, _run_folder(folder, variant, seed))
        if code != Exit.DONE:
          return code
  except Failure as error:
    return command_line.fail(error)
  except KeyboardInterrupt:
    print("interrupted: the same command goes on from what was saved")
    return Exit.STOPPED
  results = {v: _results(folder, v, flags.FLAGS.seeds) for v in variants}
  for table in _tables(results):
    console.print(table)
  try:  # last: it may be that nothing can be stored
    _write(folder, results)
  except OSError as error:
    told = f"{folder} can't be written: {error.strerror}"
    return command_line.fail(StorageError(told))
  return Exit.DONE


def _chosen(path: str | None, names: list[str] | None) -> list[str]:
  if path is None or not os.path.isfile(path):
    raise UserError(f"config file {path} does not exist; give --config=FILE")
  known = runpy.run_path(path).get("VARIANTS")
  if not known:
    raise UserError(f"{path} has no VARIANTS; see configs/ablation.py")
  for name in names or ():
    if name not in known:
      raise UserError(f"variant {name!r}: {nearest(name, known)}")
  return list(names or known)


def _name(path: str) -> str:
  return os.path.splitext(os.path.basename(path))[0]


def _run_folder(folder: str, variant: str, seed: int) -> str:
  return os.path.join(folder, variant, f"seed_{seed}")


def _train(variant: str, seed: int, workdir: str) -> int:
  """Trains and measures one run in a process of its own."""
  argument = f"{variant},quick" if flags.FLAGS.quick else variant
  command = [
    "python",
    "-m",
    "mdm_jax.main",
    f"--config={flags.FLAGS.config}:{argument}",
    f"--config.seed={seed}",
    f"--workdir={workdir}",
  ]
  console.rule(shlex.join(command))
  return subprocess.run([sys.executable, *command[1:]]).returncode


def _results(folder: str, variant: str, seeds: int) -> list[dict]:
  runs = [Workdir(_run_folder(folder, variant, s)) for s in range(seeds)]
  return [run.read_results() for run in runs]


# MARK: the comparison


def compare(
  results: Mapping[str, list[dict]],
) -> dict[str, dict[str, Estimate]]:
  """Returns every measure of every variant, and its loss to the first.

  The loss is the difference in NELBO, run by run of the same seed: what the
  seeds have in common, as the initial parameters, cancels.
  """
  base = next(iter(results.values()))
  lines = {}
  for variant, runs in results.items():
    line = {
      name: estimate(
        [v for v in (_find(r, path) for r in runs) if v is not None]
      )
      for name, path in MEASURES.items()
    }
    differences = [
      run["nelbo_per_token"] - other["nelbo_per_token"]
      for run, other in zip(runs, base, strict=True)
    ]
    lines[variant] = {"loses": estimate(differences)} | line
  return lines


def _find(result: dict, path: Sequence[str]) -> float | None:
  for part in path:
    result = result.get(part) if result else None
  return result


def _tables(results: Mapping[str, list[dict]]) -> list[Table]:
  """Returns the comparison in parts that a terminal has room for."""
  lines = compare(results)
  names = list(next(iter(lines.values())))
  return [
    _table(lines, names[at : at + _COLUMNS])
    for at in range(0, len(names), _COLUMNS)
  ]


def _table(
  lines: Mapping[str, Mapping[str, Estimate]], names: Sequence[str]
) -> Table:
  table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
  table.add_column("variant", no_wrap=True)
  for name in names:
    table.add_column(name, justify="right", no_wrap=True)
  for variant, line in lines.items():
    table.add_row(variant, *(str(line[name]) for name in names))
  return table


def _write(folder: str, results: Mapping[str, list[dict]]) -> None:
  """Writes ablation.csv, a line a run, and ablation.md, the comparison."""
  file = io.StringIO()
  writer = csv.writer(file, lineterminator="\n")
  writer.writerow(["variant", "seed", *MEASURES])
  for variant, runs in results.items():
    for seed, run in enumerate(runs):
      values = [_find(run, path) for path in MEASURES.values()]
      writer.writerow([variant, seed, *values])
  with open(os.path.join(folder, "ablation.csv"), "w") as out:
    out.write(file.getvalue())
  lines = compare(results)
  names = list(next(iter(lines.values())))
  rows = [["variant", *names], ["---"] * (len(names) + 1)]
  rows += [[v, *map(str, line.values())] for v, line in lines.items()]
  with open(os.path.join(folder, "ablation.md"), "w") as out:
    out.write("".join(f"| {' | '.join(row)} |\n" for row in rows))


def _define_flags() -> None:
  """Only for the program: main.py has flags of the same names."""
  flags.DEFINE_string("config", None, "Config file with VARIANTS.")
  flags.DEFINE_list("variants", None, "Some of them (default: all).")
  flags.DEFINE_integer("seeds", 3, "Runs of each variant.", lower_bound=1)
  flags.DEFINE_string("workdir", None, "Folder of all the runs.")
  flags.DEFINE_bool("quick", False, "A minute each, to try it out.")


if __name__ == "__main__":
  _define_flags()
  log_lines.run(main, flags_parser=command_line.parse_plain)
