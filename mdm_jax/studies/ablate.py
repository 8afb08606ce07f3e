"""Trains every variant of a config with several seeds, and compares them.

  python -m mdm_jax.studies.ablate --config=configs/ablation.py --seeds=3

Every run is a command of its own, which is printed. Stop this program at any
time; the same command resumes. The config file needs `VARIANTS`, a dict from
config arguments (what may follow the colon of --config=FILE:ARGUMENT) to
descriptions; the first variant is the baseline of the comparison.
"""

import pathlib
import runpy
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence

from absl import flags

from mdm_jax import command_line
from mdm_jax.core import log_lines, tables
from mdm_jax.core.errors import Exit, Failure, StorageError, UserError, nearest
from mdm_jax.core.progress import console, with_error
from mdm_jax.core.standard_errors import Estimate, mean
from mdm_jax.objectives.measured import from_json
from mdm_jax.workdir import Workdir

_COLUMNS = 3  # of a table on the screen

# The kinds of samples, with what they add to the title of a text metric.
_SAMPLES = {"sampling": "", "untruncated": ", T=1"}


def main(_: list[str]) -> int:
  """Trains what is not finished yet, and prints the comparison."""
  options = flags.FLAGS
  try:
    variants = _chosen(options.config, options.variants)
    name = pathlib.Path(options.config).stem
    folder = pathlib.Path(options.workdir or f"runs/{name}").expanduser()
    place = lambda variant, seed: folder / variant / f"seed_{seed}"
    # Seeds in the outer loop: if the sweep is cut short, all variants have the
    # same number of runs.
    for seed in range(options.seeds):
      for variant in variants:
        code = _train(variant, seed, place(variant, seed))
        if code != Exit.DONE:
          return code
  except Failure as error:
    return command_line.fail(error)
  except KeyboardInterrupt:
    print("interrupted; the same command resumes")
    return Exit.STOPPED
  read = lambda v, seed: Workdir(place(v, seed)).read("results.json")
  results = {v: [read(v, s) for s in range(options.seeds)] for v in variants}
  lines = compare(results)
  names = list(next(iter(lines.values())))
  # Tables narrow enough for a terminal.
  for at in range(0, len(names), _COLUMNS):
    part = names[at : at + _COLUMNS]
    table = tables.for_terminal(["variant", *part], _cells(lines, part))
    console.print(table)
  try:  # after printing, since this may fail
    (folder / "ablation.csv").write_text(_as_csv(results))
    table = tables.as_markdown(["variant", *names], _cells(lines, names))
    (folder / "ablation.md").write_text(table)
  except OSError as error:
    reason = f"{folder} can't be written: {error.strerror}"
    return command_line.fail(StorageError(reason))
  return Exit.DONE


def _chosen(path: str | None, names: list[str] | None) -> list[str]:
  if path is None or not pathlib.Path(path).is_file():
    raise UserError(f"config file {path} does not exist; give --config=FILE")
  # Runs the config file, as --config does.
  known = runpy.run_path(path).get("VARIANTS")
  if not known:
    raise UserError(f"{path} has no VARIANTS; see configs/ablation.py")
  for name in names or ():
    if name not in known:
      raise UserError(f"variant {name!r}: {nearest(name, known)}")
  return list(names or known)


def _train(variant: str, seed: int, workdir: pathlib.Path) -> int:
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


# MARK: the comparison


def compare(
  results: Mapping[str, list[dict]],
) -> dict[str, dict[str, Estimate]]:
  """Returns the mean of every measure of every variant.

  `vs baseline` is the difference to the first variant in the number that
  selects the best checkpoint; lower is better. It is taken between runs of the
  same seed, so that what they share, such as the initial parameters, cancels.

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
    lines[variant] = {"vs baseline": differences} | line
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

  They are all values of test text, both ends of its curves, and all metrics of
  sampled texts.
  """
  measured = from_json(run)
  found = {v.title: v.value for v in measured.values.values()}
  for curve in measured.curves.values():
    if curve.split == "test":
      (first, *_, last) = curve.points().items()
      found |= {curve.point.format(x): y for x, y in (first, last)}
  text = run.get("text_metrics", {})
  for kind, suffix in _SAMPLES.items():
    for metric in text.get(kind, {}).values():
      found[f"{metric['title']}{suffix}"] = metric["value"]
  return found


def _cells(
  lines: Mapping[str, Mapping[str, Estimate]], names: Sequence[str]
) -> list[list[str]]:
  """Returns a row of a table for each variant."""
  cell = lambda found: with_error(found.value, found.stderr)
  return [[v, *(cell(line[n]) for n in names)] for v, line in lines.items()]


def _as_csv(results: Mapping[str, list[dict]]) -> str:
  """Returns a table with a line per run."""
  names = _names(results)
  rows = [
    [variant, seed, *(found.get(name) for name in names)]
    for variant, runs in results.items()
    for seed, found in enumerate(map(measures, runs))
  ]
  return tables.as_csv(["variant", "seed", *names], rows)


def _define_flags() -> None:
  """Called by the program alone: main.py has flags of the same names."""
  flags.DEFINE_string("config", None, "Config file with VARIANTS.")
  flags.DEFINE_list("variants", None, "Variants to train (default: all).")
  flags.DEFINE_integer("seeds", 3, "Runs of each variant.", lower_bound=1)
  flags.DEFINE_string("workdir", None, "Folder of all the runs.")
  flags.DEFINE_bool("quick", False, "Scale every run down to about a minute.")


if __name__ == "__main__":
  _define_flags()
  log_lines.run(main, flags_parser=command_line.parse_plain)
