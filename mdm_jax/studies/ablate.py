"""Trains every variant of a config with several seeds, and compares them.

  python -m mdm_jax.studies.ablate --config=configs/ablation.py --seeds=3

Every run is a command of its own, which is printed. Stop this program at any
time; the same command resumes. The config file needs `VARIANTS`, a dict from
config arguments (what may follow the colon of --config=FILE:ARGUMENT) to
descriptions; the first variant is the baseline of the comparison.
"""

import os
import runpy
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence

from absl import flags
from rich.table import Table

from mdm_jax import command_line
from mdm_jax.core import log_lines, tables
from mdm_jax.core.errors import Exit, Failure, StorageError, UserError, nearest
from mdm_jax.core.fields import at_home
from mdm_jax.core.progress import console, with_error
from mdm_jax.core.standard_errors import Estimate, mean
from mdm_jax.objectives.measured import from_json
from mdm_jax.workdir import Workdir

_COLUMNS = 3  # of a table on the screen

# Metrics of samples in the comparison with their titles, then the ways of
# sampling with what they add to a title.
_TEXT = {"seq_rep_4": "seq-rep-4", "unigram_entropy": "entropy"}
_TEXT |= {"judge_nll": "judge"}
_WAYS = {"sampling": "", "untruncated": ", T=1"}


def main(_: list[str]) -> int:
  """Trains what is not finished yet, and prints the comparison."""
  try:
    variants = _chosen(flags.FLAGS.config, flags.FLAGS.variants)
    folder = at_home(
      flags.FLAGS.workdir or os.path.join("runs", _name(flags.FLAGS.config))
    )
    # Seeds in the outer loop: if the sweep is cut short, all variants have the
    # same number of runs.
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
  try:  # after printing, since this may fail
    _write(folder, results)
  except OSError as error:
    told = f"{folder} can't be written: {error.strerror}"
    return command_line.fail(StorageError(told))
  return Exit.DONE


def _chosen(path: str | None, names: list[str] | None) -> list[str]:
  if path is None or not os.path.isfile(path):
    raise UserError(f"config file {path} does not exist; give --config=FILE")
  # Runs the config file, as --config does.
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
  """Trains and evaluates one run in its own process."""
  argument = f"{variant},quick" if flags.FLAGS.quick else variant
  command = [
    "python",
    "-m",
    "mdm_jax.main",
    f"--config={flags.FLAGS.config}:{argument}",
    f"--config.seed={seed}",
    f"--workdir={workdir}",
  ]
  if flags.FLAGS.modules:
    command.append(f"--modules={','.join(flags.FLAGS.modules)}")
  console.rule(shlex.join(command))
  # The printed command says `python`, for people to paste; this one must be the
  # interpreter at hand.
  return subprocess.run([sys.executable, *command[1:]]).returncode


def _results(folder: str, variant: str, seeds: int) -> list[dict]:
  runs = [Workdir(_run_folder(folder, variant, s)) for s in range(seeds)]
  return [run.read_results() for run in runs]


# MARK: the comparison


def compare(
  results: Mapping[str, list[dict]],
) -> dict[str, dict[str, Estimate]]:
  """Returns the mean of every measure of every variant.

  `loses` is the difference to the first variant in the number that chooses the
  best checkpoint. It is taken between runs of the same seed, so that what they
  share, such as the initial parameters, cancels.

  Args:
    results: the results.json of every seed, by variant.

  Returns:
    By variant and title: the mean over seeds and its standard error.
  """
  base = [_head(run) for run in next(iter(results.values()))]
  names = _names(results)
  lines = {}
  for variant, runs in results.items():
    found = [measures(run) for run in runs]
    line = {
      name: mean([f[name] for f in found if f.get(name) is not None])
      for name in names
    }
    pairs = zip(map(_head, runs), base, strict=True)
    differences = mean([run - other for run, other in pairs])
    lines[variant] = {"loses": differences} | line
  return lines


def _head(run: dict) -> float:
  """Returns the number that chooses the best checkpoint; lower is better."""
  head = from_json(run).head()
  return head.value if head.lower_is_better else -head.value


def _names(results: Mapping[str, list[dict]]) -> list[str]:
  """Returns the titles of all measures, in order of first appearance."""
  runs = (run for runs in results.values() for run in runs)
  return list(dict.fromkeys(name for run in runs for name in measures(run)))


def measures(run: dict) -> dict[str, float | None]:
  """Returns the numbers of a results.json that are compared, by title.

  They are all values of test text, both ends of its curves, and some metrics of
  samples.
  """
  measured = from_json(run)
  found = {v.title: v.value for v in measured.all_values().values()}
  for curve in measured.curves.values():
    if curve.split == "test":
      (first, *_, last) = curve.points().items()
      found |= {curve.point.format(x): y for x, y in (first, last)}
  text = run.get("text_metrics", {})
  for way, kind in _WAYS.items():
    for name, title in _TEXT.items():
      value = text.get(way, {}).get(name, {}).get("value")
      found[f"{title}{kind}"] = value
  return found


def _tables(results: Mapping[str, list[dict]]) -> list[Table]:
  """Returns the comparison as tables narrow enough for a terminal."""
  lines = compare(results)
  names = list(next(iter(lines.values())))
  return [
    _table(lines, names[at : at + _COLUMNS])
    for at in range(0, len(names), _COLUMNS)
  ]


def _table(
  lines: Mapping[str, Mapping[str, Estimate]], names: Sequence[str]
) -> Table:
  rows = (
    (variant, *(_cell(line[name]) for name in names))
    for variant, line in lines.items()
  )
  return tables.for_terminal(["variant", *names], rows)


def _cell(found: Estimate) -> str:
  return with_error(found.value, found.stderr)


def _write(folder: str, results: Mapping[str, list[dict]]) -> None:
  """Writes ablation.csv, one line per run, and ablation.md, the comparison."""
  names = _names(results)
  rows = [
    [variant, seed, *(found.get(name) for name in names)]
    for variant, runs in results.items()
    for seed, found in enumerate(map(measures, runs))
  ]
  with open(os.path.join(folder, "ablation.csv"), "w") as out:
    out.write(tables.as_csv(["variant", "seed", *names], rows))
  lines = compare(results)
  names = list(next(iter(lines.values())))
  cells = ([v, *map(_cell, line.values())] for v, line in lines.items())
  with open(os.path.join(folder, "ablation.md"), "w") as out:
    out.write(tables.as_markdown(["variant", *names], cells))


def _define_flags() -> None:
  """Called by the program alone: main.py has flags of the same names."""
  flags.DEFINE_string("config", None, "Config file with VARIANTS.")
  flags.DEFINE_list("variants", None, "Some of them (default: all).")
  flags.DEFINE_integer("seeds", 3, "Runs of each variant.", lower_bound=1)
  flags.DEFINE_string("workdir", None, "Folder of all the runs.")
  flags.DEFINE_bool("quick", False, "A minute each, to try it out.")


if __name__ == "__main__":
  _define_flags()
  log_lines.run(main, flags_parser=command_line.parse_plain)
