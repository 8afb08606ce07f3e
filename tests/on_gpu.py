"""What has to hold on a GPU, tried in one command, on whatever device is here.

  python tests/on_gpu.py
  python tests/on_gpu.py --updates=3     # fast, to try this script out

The README's quickstart (as `:quick`), 1, 2 and 64 texts of it, its evaluation,
two runs with `train.deterministic` that have to agree in every bit, and a third
one that is killed, started again, and has to agree with them too. A line tells
of each what came out, and how many seconds it took; the exit code is the number
of those that failed. It takes the default attention and dtype of the device.
"""

import argparse
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import faults_harness as harness
from paths import ROOT

QUICK = f"--config={ROOT / 'configs/quickstart.py'}:quick"
TEXTS = 1, 2, 64
DEVICE = """
import jax
d = jax.devices()
kind = f"{d[0].device_kind} ({d[0].platform})"
print(f"jax {jax.__version__} on {len(d)} x {kind}")
"""


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--updates", type=int, help="of every stage")
  given = parser.parse_args()
  folder = pathlib.Path(tempfile.mkdtemp())
  try:
    return Trial(folder, given.updates).run()
  finally:
    shutil.rmtree(folder)


class Trial:
  """All that is tried, in a folder."""

  def __init__(self, folder: pathlib.Path, updates: int | None):
    self._folder = folder
    self._args = [QUICK, "--config.train.log_every=1"]
    self._args.append("--config.train.checkpoint_every=2")
    if updates:
      stages = (f"--config.stages[{i}].updates={updates}" for i in range(3))
      self._args += [*stages, "--config.eval.every=0"]

  def run(self) -> int:
    """Tries everything; returns how much failed."""
    print(_run(self._folder, "-c", DEVICE).strip(), flush=True)
    failed = self._try("quickstart", self._quickstart)
    for count in TEXTS:
      failed += self._try(f"texts: {count}", lambda n=count: self._sample(n))
    failed += self._try("evaluation", self._evaluate)
    failed += self._try("two runs, every bit", self._twice)
    failed += self._try("killed and started again, every bit", self._killed)
    print("all of it holds" if not failed else f"{failed} FAILED")
    return failed

  def _try(self, name: str, do: Callable[[], str]) -> int:
    began = time.monotonic()
    try:
      told, failed = do(), 0
    except (AssertionError, subprocess.TimeoutExpired) as error:
      told, failed = f"FAILED: {error}", 1
    print(f"{name}: {told} ({time.monotonic() - began:.0f} s)", flush=True)
    return failed

  def _quickstart(self) -> str:
    self._main("quick", *self._args)
    return (
      f"{_results(self._folder / 'quick')['bits_per_byte']:.4f} bits a byte"
    )

  def _sample(self, count: int) -> str:
    told = self._main(
      "quick", "--mode=sample", f"--num_samples={count}", "--json"
    )
    texts = json.loads(told.splitlines()[-1])
    texts = [text for text in texts if text.strip()]
    assert len(texts) == count, f"{len(texts)} texts"
    return f"{sum(map(len, texts)) / count:.0f} characters a text"

  def _evaluate(self) -> str:
    before = _results(self._folder / "quick")["bits_per_byte"]
    self._main("quick", "--mode=eval")
    after = _results(self._folder / "quick")["bits_per_byte"]
    assert abs(after - before) < 1e-3 * before, f"{before} became {after}"
    return f"{after:.4f} bits a byte"

  def _twice(self) -> str:
    for name in ("one", "two"):
      self._main(name, *self._exact())
    return self._same("one", "two")

  def _killed(self) -> str:
    process = _start(self._folder, _command("hurt", *self._exact()))
    hurt = self._folder / "hurt"
    while process.poll() is None and not _saved(hurt):
      time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    at = harness.last_update(hurt)
    self._main("hurt", *self._exact())
    assert process.returncode == -signal.SIGKILL, "it was through before"
    return f"killed at update {at}; {self._same('one', 'hurt')}"

  def _exact(self) -> list[str]:
    return [*self._args, "--config.train.deterministic=true"]

  def _same(self, *names: str) -> str:
    """Checks that two runs have the same numbers and the same last state."""
    runs = [self._folder / name for name in names]
    a, b = map(harness.numbers, runs)
    lines = sum(x != y for x, y in zip(a, b, strict=False))
    lines += abs(len(a) - len(b))
    last = harness.steps(runs[0])[-1]
    a, b = (harness.state_hash(run, last) for run in runs)
    arrays = [name for name in a if a[name] != b.get(name)]
    assert not lines and not arrays, (
      f"{lines} logged lines and {len(arrays)} of {len(a)} arrays differ"
    )
    return f"{len(a)} arrays are the same"

  def _main(self, name: str, *args: str) -> str:
    return _run(self._folder, *_command(name, *args)[1:])


def _command(name: str, *args: str) -> list[str]:
  return [sys.executable, "-m", "mdm_jax.main", *args, f"--workdir={name}"]


def _run(folder: pathlib.Path, *args: str) -> str:
  process = _start(folder, [sys.executable, *args])
  out, err = process.communicate()
  assert process.returncode == 0, f"exit {process.returncode}: {err[-2000:]}"
  return out


def _start(folder: pathlib.Path, command: list[str]) -> subprocess.Popen:
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
  return subprocess.Popen(command, cwd=folder, text=True, **pipes)


def _saved(workdir: pathlib.Path) -> bool:
  return any(workdir.glob("checkpoints/*/manifest.json"))


def _results(workdir: pathlib.Path) -> dict:
  return json.loads((workdir / "results.json").read_text())


if __name__ == "__main__":
  os.environ.setdefault("PYTHONUNBUFFERED", "1")
  sys.exit(main())
