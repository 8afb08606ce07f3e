"""Tests whether masked diffusion beats autoregression on little repeated text.

  python -m mdm_jax.study --out=docs/study                # the default corpus
  python -m mdm_jax.study --out=docs/study --text=FILE    # a text of your own
  python -m mdm_jax.study --out=docs/study --list         # only what would run

Runs one cell after the other (`studies/cells.py`) in this process, and writes
study.json, study.md and study.png after each, marked as partial until all are
finished. Stop it at any time; the same command resumes. Where the runs are gone
or on another machine, it goes on from the cells in study.json. Two processes
can share a --workdir, each with an --out of its own and an --only that leaves
the other's cells alone (`--only=recipe-`, `--only=plain-`); the command without
--only then has the cells of both. --gpu is a larger model for a GPU, --quick a
minute's test of the program.
"""

import pathlib
import shlex
from typing import Any

from absl import flags

from mdm_jax import command_line
from mdm_jax.core import compilation_cache, log_lines, modules, strict_json
from mdm_jax.core.errors import Exit, Failure, Stopped, StorageError
from mdm_jax.core.progress import console, with_error
from mdm_jax.planning import scaling_laws
from mdm_jax.studies import cell_plot, cell_report, cell_runs, cell_text, cells
from mdm_jax.studies.cell_text import Text
from mdm_jax.studies.cells import Cell, Preset

_RESULTS = "study.json"
_WHOLE = "train_1_1", "validation", "test"  # together all of the text
# Assumed before the first cell has said how fast this machine is: operations
# per CPU second, and seconds a cell takes besides its updates. Autoregression
# overfits early, and its run ends then.
_SPEED, _FIXED, _AR_SHARE = 22e9, 60.0, 0.2


def main(_: list[str]) -> int:
  """Runs what is left of the study; returns the exit code."""
  try:
    return _main()
  except Stopped as stopped:
    console.print(stopped, soft_wrap=True)
    return Exit.STOPPED
  except Failure as error:
    return command_line.fail(error)
  except OSError as error:
    reason = f"{error.filename} can't be written: {error.strerror}"
    return command_line.fail(StorageError(reason))
  except KeyboardInterrupt:
    print("interrupted; the same command resumes")
    return Exit.STOPPED


def _main() -> int:
  options = flags.FLAGS
  name = "quick" if options.quick else "gpu" if options.gpu else "night"
  preset = cells.PRESETS[name]
  folder = pathlib.Path(options.workdir).expanduser() / name
  out = pathlib.Path(options.out).expanduser()
  text = cell_text.write_text(
    options.text, preset, folder / "text", 20_000 if options.quick else None
  )
  found = cell_runs.published(out / _RESULTS, preset, text)
  found |= cell_runs.finished(preset, text, folder)
  _say_estimate(preset, text, found)
  if options.list:
    return Exit.DONE
  compilation_cache.turn_on()
  while todo := _next(preset, found):
    console.print(f"cell {len(found) + 1}: {todo.name}", soft_wrap=True)
    found[todo] = cell_runs.run(todo, preset, text, folder)
    _say(found[todo])
    _write(out, preset, found, text)
  _write(out, preset, found, text)
  console.print(f"{out / 'study.md'}: {len(found)} cells", soft_wrap=True)
  return Exit.DONE


def _next(preset: Preset, found: dict[Cell, Any]) -> Cell | None:
  """Returns the cell to run next, or None if nothing is left."""
  todo = (c for c in _left(preset, found) if flags.FLAGS.only in c.name)
  return next(todo, None)


def _left(preset: Preset, found: dict[Cell, Any]) -> list[Cell]:
  return cells.left(preset, cells.losses_of(found))


def _say_estimate(preset: Preset, text: Text, found: dict[Cell, Any]) -> None:
  """Prints what is left, and about how many CPU seconds that takes."""
  todo = _left(preset, found)
  seconds = {cell: _seconds(preset, cell, found) for cell in todo}
  # What is tuned next decides what follows: only so many cells are known.
  finished = len(cells.in_study(preset, found))
  whole = cells.count(preset, found)
  unknown = max(whole - finished - len(todo), 0)
  total = sum(seconds.values()) * (1 + unknown / max(len(todo), 1))
  console.print(
    f"{finished} of {whole} cells are finished; the others take"
    f" about {total / 3600:.1f} CPU hours",
    soft_wrap=True,
  )
  parts = ", ".join(f"{n} {size:,}" for n, size in text.characters.items())
  console.print(f"characters: {parts}", soft_wrap=True)
  if flags.FLAGS.list:
    for cell, each in seconds.items():
      console.print(f"{cell.name}: {each:,.0f} CPU seconds", soft_wrap=True)
    if unknown:
      console.print(
        f"and {unknown} more of the tuning; the cells after it will have the"
        " settings that it finds",
        soft_wrap=True,
      )


def _seconds(preset: Preset, cell: Cell, found: dict[Cell, Any]) -> float:
  """Returns about how many CPU seconds a cell takes."""
  alike = cell.size, cell.arm
  known = [
    r["cpu_seconds"] for c, r in found.items() if (c.size, c.arm) == alike
  ]
  if known:
    return sum(known) / len(known)
  size = preset.sizes[cell.size]
  params = 12 * size.layers * size.width**2
  tokens = preset.updates * preset.batch * preset.length
  share = _AR_SHARE if cell.arm in cells.IS_AR else 1.0
  return share * scaling_laws.training_flops(params, tokens) / _SPEED + _FIXED


def _say(run: dict[str, Any]) -> None:
  bits = run["bits_per_byte"]
  numbers = ("<= " if run["is_bound"] else "") + with_error(**bits)
  if "chain_rule" in run:
    numbers += f", chain rule {with_error(**run['chain_rule'])}"
  console.print(
    f"  test: {numbers} bits per byte; best after update"
    f" {run['best_update']} of {run['updates']}; {run['cpu_seconds']:,.0f} CPU"
    " seconds",
    soft_wrap=True,
  )


def _write(
  out: pathlib.Path, preset: Preset, found: dict[Cell, Any], text: Text
) -> None:
  """Writes what the finished cells show."""
  if not found:
    return
  described = {
    "characters": sum(
      size for name, size in text.characters.items() if name in _WHOLE
    ),
    "sha256": text.sha256,
  }
  given = [f"--{name}" for name in ("quick", "gpu") if flags.FLAGS[name].value]
  # A stranger has another path, or another text.
  given += ["--text=FILE"] if flags.FLAGS["text"].present else []
  command = shlex.join(["python", "-m", "mdm_jax.study", *given])
  out.mkdir(parents=True, exist_ok=True)
  content = cell_report.as_json(preset, found, described)
  (out / _RESULTS).write_text(strict_json.dumps(content) + "\n")
  page = cell_report.as_markdown(preset, found, described, command)
  if modules.has("matplotlib"):
    (out / "study.png").write_bytes(cell_plot.as_png(preset, found))
    page += "\n![Loss over epochs, and on test text](study.png)\n"
  (out / "study.md").write_text(page)


def _define_flags() -> None:
  """Called by the program alone: main.py has flags of the same names."""
  flags.DEFINE_string("text", "sotu", "A corpus, or a file of text.")
  flags.DEFINE_string("out", "runs/study/out", "Folder of the results.")
  flags.DEFINE_string("workdir", "runs/study", "Folder of all the runs.")
  flags.DEFINE_string("only", "", "Run only cells whose name contains this.")
  flags.DEFINE_bool("list", False, "Print what would run, and run nothing.")
  flags.DEFINE_bool("gpu", False, "A larger model, for ten minutes of a GPU.")
  flags.DEFINE_bool("quick", False, "Four tiny cells, to test the program.")


if __name__ == "__main__":
  _define_flags()
  log_lines.run(main, flags_parser=command_line.parse_plain)
