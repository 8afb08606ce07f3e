"""Runs all benchmarks, each in its own process, and collects one table.

  python -m mdm_jax.benchmarks.all --json
  python -m mdm_jax.benchmarks.all --suite=accelerator --out=runs/benchmarks

Writes benchmarks.md, a table of the main numbers with the machine and the
commands, and benchmarks.json, everything that was measured. A benchmark that
fails is listed in the table as failed, and the exit code is 1.
"""

import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags
from rich import box
from rich.table import Table

from mdm_jax.core import log_lines
from mdm_jax.core.progress import console

Command = tuple[str, ...]

_PLAIN = "--against=plain"
_MD4 = "--against=md4"
_MEDIUM = "train_step", "--preset=medium", "--batch=16"
SUITES: dict[str, tuple[Command, ...]] = {
  "cpu": (
    ("train_step", "--preset=char", _PLAIN),
    ("train_step", "--preset=bpe", _PLAIN),
    ("train_step", "--preset=gpt2", _PLAIN, "--repeats=3"),
    ("train_step", "--preset=char", _MD4),
    ("train_step", "--preset=bpe", _MD4),
    ("compile_time", "--preset=bpe"),
    ("input", "--preset=char"),
    ("input", "--preset=char", "--batch=64", "--nosteps"),
    # An update's rows in configs/recommended.py.
    ("input", "--preset=gpt2", "--batch=16", "--nosteps"),
    ("loop", "--preset=char"),
    ("optimizer", "--preset=char"),
    ("startup",),
    ("sampler", "--preset=large_vocab"),
    ("sampler", "--preset=small_vocab"),
  ),
  "accelerator": (
    ("train_step", "--preset=char", _PLAIN),
    ("train_step", "--preset=bpe", _PLAIN),
    ("train_step", "--preset=gpt2", "--batch=64", _PLAIN),
    (*_MEDIUM, _PLAIN),
    ("train_step", "--preset=char", _MD4),
    ("train_step", "--preset=gpt2", "--batch=32", _MD4),
    *(
      (*_MEDIUM, "--rates=uniform", f"--attention={kernel}")
      for kernel in ("reference", "xla", "cudnn")
    ),
    ("compile_time", "--preset=gpt2"),
    ("input", "--preset=gpt2", "--batch=64"),
    ("loop", "--preset=gpt2"),
    ("startup",),
    ("sampler", "--preset=accelerator"),
    ("sampler", "--preset=accelerator_one_text"),
  ),
  # Seconds only, for the tests.
  "tiny": (
    *(
      ("train_step", "--preset=tiny", "--rates=uniform", other, "--repeats=2")
      for other in (_PLAIN, _MD4)
    ),
    ("input", "--preset=tiny", "--rows=100", "--repeats=2", "--nosteps"),
  ),
}


def run(commands: Sequence[Command]) -> list[dict[str, Any]]:
  """Runs benchmarks, one after the other.

  Args:
    commands: a benchmark's module name and its flags, for each.

  Returns:
    What each measured, or its `error`, in the order of `commands`.
  """
  results = []
  for command in commands:
    console.rule(" ".join(command))
    results.append({"command": " ".join(command)} | _run(command))
  return results


def _run(command: Command) -> dict[str, Any]:
  name, *arguments = command
  program = [sys.executable, "-m", f"mdm_jax.benchmarks.{name}"]
  # Each in its own process: an accelerator is held until its process ends, and
  # peak memory is counted per process.
  done = subprocess.run(
    [*program, *arguments, "--json"], capture_output=True, text=True
  )
  # With --json the last line is the results, and those before are for people.
  *shown, last = done.stdout.splitlines() or [""]
  console.print("\n".join(shown), soft_wrap=True)
  if done.returncode:
    lines = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
    console.print(done.stderr)
    return {"error": lines[-1]}
  return json.loads(last)


def suite_of_this_machine() -> str:
  """Returns the name of the suite for this machine's devices.

  Another process asks JAX for them: this one would keep an accelerator from the
  benchmarks.
  """
  code = "import jax; print(jax.default_backend())"
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  return "cpu" if done.stdout.split()[-1] == "cpu" else "accelerator"


def rows(results: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
  """Returns the table: (command, what was measured, value) per line."""
  lines = []
  for result in results:
    if "error" in result:
      lines.append((result["command"], "failed", result["error"]))
    for what, number in result.get("headline", {}).items():
      lines.append((result["command"], what, _number(number)))
  return lines


def _number(value: float) -> str:
  if abs(value) >= 1000:
    return f"{value:,.0f}"
  return f"{value:.3g}"


def markdown(results: Sequence[dict[str, Any]]) -> str:
  """Returns the table as Markdown, under a line about the machine."""
  facts = next((r["facts"] for r in results if "facts" in r), {})
  machine = ", ".join(f"{name} {value}" for name, value in facts.items())
  lines = ["# Benchmarks", "", machine, ""]
  lines += ["Each line's command is `python -m mdm_jax.benchmarks.` and:", ""]
  table = [("command", "", "value"), ("---", "---", "---:"), *rows(results)]
  cell = lambda text: text.replace("|", "\\|")
  lines += [f"| {' | '.join(map(cell, line))} |" for line in table]
  return "\n".join(lines) + "\n"


def _show(results: Sequence[dict[str, Any]]) -> None:
  table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
  table.add_column("benchmark")
  table.add_column("")
  table.add_column("value", justify="right")
  before = None
  for command, what, number in rows(results):
    table.add_row("" if command == before else command, what, number)
    before = command
  console.print(table)


def main(_: list[str]) -> int:
  values = flags.FLAGS
  suite = values.suite
  if suite == "auto":
    suite = suite_of_this_machine()
  commands = [c for c in SUITES[suite] if values.only in " ".join(c)]
  results = run(commands)
  folder = pathlib.Path(values.out)
  folder.mkdir(parents=True, exist_ok=True)
  text = json.dumps(results)
  (folder / "benchmarks.json").write_text(text + "\n")
  (folder / "benchmarks.md").write_text(markdown(results))
  _show(results)
  console.print(f"wrote {folder}/benchmarks.md and benchmarks.json")
  if values.json:
    print(text)
  return int(any("error" in result for result in results))


def _define_flags() -> None:
  flags.DEFINE_enum("suite", "auto", ["auto", *SUITES], "Which benchmarks.")
  flags.DEFINE_string("only", "", "Only commands that hold this.")
  flags.DEFINE_string("out", "runs/benchmarks", "Folder of the table.")
  flags.DEFINE_bool("json", False, "Print JSON on the last line.")


if __name__ == "__main__":
  _define_flags()
  log_lines.run(main)
