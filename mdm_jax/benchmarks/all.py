"""Runs all benchmarks and collects one table.

  python -m mdm_jax.benchmarks.all --json
  python -m mdm_jax.benchmarks.all --suite=accelerator --out=runs/benchmarks

Writes benchmarks.md, a table of the main numbers with the machine and the
commands, and benchmarks.json, everything that was measured; both after each
benchmark, and with --json each one's results are printed as soon as it ends, so
nothing is lost if the program is stopped. A benchmark that fails is listed in
the table as failed, and the exit code is 1.

The suite `accelerator` takes at most 8 minutes (--limit): the most important
benchmarks come first, most of them in one process, each with a limit of its
own. One that is not finished by then is stopped, and the table says how far it
came. `accelerator_rest` is what there is to know beyond.
"""

import contextlib
import dataclasses
import gc
import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import jax
from absl import flags
from rich import box
from rich.table import Table

from mdm_jax.core import log_lines
from mdm_jax.core.progress import console

Command = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Part:
  """A benchmark of a suite.

  Attributes:
    command: its module's name and flags.
    seconds: it is stopped after as many; None: never.
  """

  command: Command
  seconds: float | None = None


# The parts of a group run in one process, one after the other.
Group = tuple[Part, ...]


def _apart(*commands: Command) -> tuple[Group, ...]:
  """Returns each in a group of its own.

  An accelerator is held until its process ends, and peak memory is counted by
  process.
  """
  return tuple((Part(command),) for command in commands)


_PLAIN = "--against=plain"
_MD4 = "--against=md4"
_UNIFORM, _LAST = "--rates=uniform", "--rates=stage_3"
_GPT2 = "train_step", "--preset=gpt2", "--batch=64"
_MEDIUM = "train_step", "--preset=medium", "--batch=16"
_SAMPLER = "sampler", "--ways=random", "--repeats=3"
SUITES: dict[str, tuple[Group, ...]] = {
  "cpu": _apart(
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
    (
      # First: JAX must not have taken most of the memory before.
      Part((*_GPT2, _UNIFORM, "--against=torch"), 180.0),
      Part((*_GPT2, _LAST), 90.0),
      Part(("train_step", "--preset=recommended_3", _LAST), 90.0),
      Part((*_MEDIUM, _UNIFORM), 120.0),
      Part((*_SAMPLER, "--preset=accelerator"), 90.0),
      Part((*_SAMPLER, "--preset=accelerator_one_text"), 60.0),
      Part(("train_step", "--preset=recommended_2", "--rates=stage_2"), 60.0),
      Part(("train_step", "--preset=recommended_1", "--rates=stage_1"), 60.0),
      Part(("train_step", "--preset=medium", "--batch=32", _UNIFORM), 120.0),
    ),
    (Part(("torch_mdlm", "--preset=gpt2", "--batch=64"), 60.0),),
    # XLA has been seen to compile this for minutes.
    (
      Part(
        ("train_step", "--preset=gpt2", "--batch=32", _UNIFORM, _MD4), 110.0
      ),
    ),
  ),
  "accelerator_rest": _apart(
    ("train_step", "--preset=char", _PLAIN),
    ("train_step", "--preset=bpe", _PLAIN),
    (*_GPT2, _PLAIN),
    (*_MEDIUM, _PLAIN),
    ("train_step", "--preset=char", _MD4),
    *(
      (*_MEDIUM, _UNIFORM, f"--attention={kernel}")
      for kernel in ("reference", "xla", "cudnn")
    ),
    ("compile_time", "--preset=gpt2"),
    ("input", "--preset=gpt2", "--batch=64"),
    ("loop", "--preset=gpt2"),
    ("startup",),
    ("sampler", "--preset=accelerator"),
  ),
  # Seconds only, for the tests.
  "tiny": (
    tuple(
      Part(("train_step", "--preset=tiny", _UNIFORM, other, "--repeats=2"))
      for other in (_PLAIN, _MD4)
    ),
    *_apart(
      ("input", "--preset=tiny", "--rows=100", "--repeats=2", "--nosteps")
    ),
  ),
}
# Seconds; a suite without a limit takes as long as it takes.
LIMITS = {"accelerator": 480.0}
_LEAST = 5.0  # with less time left nothing is begun


def run(
  groups: Sequence[Group],
  limit: float = float("inf"),
  keep: Callable[[list[dict[str, Any]]], None] = lambda results: None,
) -> list[dict[str, Any]]:
  """Runs benchmarks, one after the other.

  Args:
    groups: what to run.
    limit: seconds for all; what is not finished by then is stopped.
    keep: is called with all results after each benchmark.

  Returns:
    What each measured, or its `error`, or why it is `unfinished`.
  """
  results, end = [], time.monotonic() + limit
  for group in groups:
    with contextlib.ExitStack() as processes:
      process = None
      for part in group:
        command = " ".join(part.command)
        console.rule(command)
        left = end - time.monotonic()
        if left < _LEAST:
          result = {"unfinished": f"not begun: {limit:.0f} s were over"}
        else:
          # One that failed or was stopped has ended.
          if process is None or process.ended:
            process = processes.enter_context(_Process())
          result = process.run(part.command, min(left, part.seconds or left))
        results.append({"command": command} | result)
        keep(results)
  return results


class _Process:
  """Runs benchmarks, one after the other, until one of them fails."""

  def __init__(self) -> None:
    # Not a pipe: nobody reads it, and a full pipe would block the process.
    self._errors = tempfile.TemporaryFile("w+")
    self._process = subprocess.Popen(
      _SERVE,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._errors,
      text=True,
      # A group of its own, to be ended with the processes that it starts.
      start_new_session=True,
    )
    self._late = False

  @property
  def ended(self) -> bool:
    """Whether it can't run anything more."""
    return self._process.poll() is not None

  def run(self, command: Command, seconds: float) -> dict[str, Any]:
    """Returns what a benchmark measured, its `error`, or how far it came."""
    last, since = "begun", time.monotonic()
    timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), self._stop)
    timer.start()
    try:
      # If it could not even begin, its output ends at once.
      with contextlib.suppress(BrokenPipeError):
        self._process.stdin.write(f"{json.dumps(command)}\n")
        self._process.stdin.flush()
      for line in self._process.stdout:
        # With --json the last line is the results; those before are for people.
        if line.startswith("{"):
          return json.loads(line)
        console.print(line, end="", soft_wrap=True, markup=False)
        if line.strip():
          last, since = line.strip(), time.monotonic()
      code = self._process.wait()
    finally:
      timer.cancel()
    if self._late:
      waited = time.monotonic() - since
      return {
        "unfinished": f"not finished within {seconds:.0f} s; the last"
        f" {waited:.0f} s: {last}"
      }
    self._errors.seek(0)
    errors = self._errors.read().strip()
    console.print(errors, markup=False)
    return {"error": (errors.splitlines() or [f"exit {code}"])[-1]}

  def _stop(self) -> None:
    self._late = True
    self._kill()

  def _kill(self) -> None:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self._process.pid, signal.SIGKILL)

  def __enter__(self) -> "_Process":
    return self

  def __exit__(self, *_: Any) -> None:
    self._kill()
    self._process.wait()
    for file in (self._process.stdin, self._process.stdout, self._errors):
      with contextlib.suppress(BrokenPipeError):
        file.close()


def serve(_: list[str]) -> None:
  """Runs the benchmarks that are named on standard input, each with --json."""
  for line in sys.stdin:
    with program(json.loads(line)) as module:
      code = module.main([])
    if code:
      sys.exit(code)
    jax.clear_caches()
    gc.collect()


@contextlib.contextmanager
def program(command: Command) -> Iterator[ModuleType]:
  """Gives a benchmark's module while its flags are those of a command."""
  name, *arguments = command
  module = importlib.import_module(f"mdm_jax.benchmarks.{name}")
  others = set(flags.FLAGS)
  module._define_flags()
  try:
    flags.FLAGS([name, *arguments, "--json"])
    yield module
  finally:
    # The next one may have other flags of the same names.
    for flag in set(flags.FLAGS) - others:
      delattr(flags.FLAGS, flag)


_SERVE = (
  *(sys.executable, "-u", "-c"),
  "from mdm_jax.benchmarks import all; from mdm_jax.core import log_lines;"
  " log_lines.run(all.serve)",
)


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
    for key, what in (("error", "failed"), ("unfinished", "unfinished")):
      if key in result:
        lines.append((result["command"], what, result[key]))
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
  groups = [
    tuple(part for part in group if values.only in " ".join(part.command))
    for group in SUITES[suite]
  ]
  folder = pathlib.Path(values.out)
  folder.mkdir(parents=True, exist_ok=True)

  def keep(results: list[dict[str, Any]]) -> None:
    (folder / "benchmarks.json").write_text(json.dumps(results) + "\n")
    (folder / "benchmarks.md").write_text(markdown(results))
    if values.json:
      print(json.dumps(results[-1]), flush=True)

  limit = values.limit or LIMITS.get(suite, float("inf"))
  results = run(groups, limit, keep)
  _show(results)
  console.print(f"wrote {folder}/benchmarks.md and benchmarks.json")
  if values.json:
    print(json.dumps(results))
  return int(any("error" in result for result in results))


def _define_flags() -> None:
  flags.DEFINE_enum("suite", "auto", ["auto", *SUITES], "Which benchmarks.")
  flags.DEFINE_string("only", "", "Only commands that hold this.")
  flags.DEFINE_float("limit", None, "Seconds for all, not the suite's.", 1)
  flags.DEFINE_string("out", "runs/benchmarks", "Folder of the table.")
  flags.DEFINE_bool("json", False, "Print JSON on the last line.")


if __name__ == "__main__":
  _define_flags()
  log_lines.run(main)
