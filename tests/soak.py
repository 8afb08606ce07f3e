"""Kills a quickstart again and again, and compares it with one left alone.

  python tests/soak.py --kills=15 --seed=0

Two hundred updates of the quickstart's model on its text. The first run is left
alone. The second gets SIGKILL or SIGTERM at seeded times, wherever it is then:
importing, restoring, compiling, training, saving, evaluating. The same command
follows each time, until it is through. Every logged number and every bit of the
last state must be the same.
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import faults_harness as harness
from paths import ROOT

UPDATES = 60, 40, 100
ARGS = [
  f"--config={ROOT / 'configs' / 'quickstart.py'}",
  *(f"--config.stages[{i}].updates={n}" for i, n in enumerate(UPDATES)),
  *("--config.train.checkpoint_every=10", "--config.train.log_every=1"),
  *("--config.train.max_attempts=99", "--config.eval.every=50"),
  *("--config.eval.rows=8", "--config.eval.final_rows=16"),
  *("--config.eval.samples=0", "--config.sample.num_samples=1"),
]
SHORTEST, LONGEST = 2.0, 16.0  # seconds that a process lives


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--kills", type=int, default=15)
  parser.add_argument("--seed", type=int, default=0)
  given = parser.parse_args()
  folder = pathlib.Path(tempfile.mkdtemp())
  try:
    return soak(folder, given.kills, random.Random(given.seed))
  finally:
    shutil.rmtree(folder)


def soak(folder: pathlib.Path, kills: int, rng: random.Random) -> int:
  """Runs both, prints what happened, and returns an exit code."""
  began = time.monotonic()
  code = _start(folder, "alone").wait()
  print(f"left alone: exit code {code} after {time.monotonic() - began:.0f} s")
  if code:
    return code
  killed = 0
  while True:
    process = _start(folder, "hurt")
    number = rng.choice([signal.SIGKILL, signal.SIGTERM])
    seconds = rng.uniform(SHORTEST, LONGEST)
    try:
      code = process.wait(seconds if killed < kills else None)
    except subprocess.TimeoutExpired:
      process.send_signal(number)
      code = process.wait()
      killed += 1
      _tell(folder / "hurt", killed, number, seconds, code)
      continue
    break
  print(f"then: exit code {code}")
  if killed < kills:
    print(f"it was through after {killed} kills")
    return 1
  return code or _compare(folder / "alone", folder / "hurt")


def _start(folder: pathlib.Path, name: str) -> subprocess.Popen:
  command = [sys.executable, "-m", "mdm_jax.main", *ARGS, f"--workdir={name}"]
  log = (folder / f"{name}.log").open("a")
  return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)


def _tell(
  workdir: pathlib.Path, kill: int, number: int, seconds: float, code: int
) -> None:
  saved = harness.steps(workdir) if (workdir / "checkpoints").exists() else []
  name = signal.Signals(number).name
  print(
    f"{kill:2d}  {name} after {seconds:4.1f} s: exit code {code:3d}, update"
    f" {harness.last_update(workdir):3d}, saved {saved}",
    flush=True,
  )


def _compare(alone: pathlib.Path, hurt: pathlib.Path) -> int:
  a, b = harness.numbers(alone), harness.numbers(hurt)
  count = sum(len(line) - 1 for line in a)
  different = sum(x != y for x, y in zip(a, b, strict=False))
  different += abs(len(a) - len(b))
  losses = [x["train/loss"] for x in a if "train/loss" in x]
  other = [x["train/loss"] for x in b if "train/loss" in x]
  print(f"{len(a)} lines, {count} numbers and texts: {different} lines differ")
  print(f"{len(losses)} losses: {sum(map(_differ, losses, other))} differ")
  last = sum(UPDATES)
  first, second = (harness.state_hash(w, last) for w in (alone, hurt))
  differing = [name for name in first if first[name] != second.get(name)]
  print(f"{len(first)} arrays of the state: {len(differing)} differ")
  results = [
    json.loads((w / "results.json").read_text()) for w in (alone, hurt)
  ]
  bounds = [r["nelbo_per_token"].hex() for r in results]
  print(f"final NELBO {bounds[0]} and {bounds[1]}")
  spent = list(harness.lines(hurt))
  goodput = [x["goodput/fraction"] for x in spent if "goodput/fraction" in x][
    -1
  ]
  print(f"goodput of the run that was hurt: {goodput:.2f}")
  same = not different and losses == other and not differing
  same = same and bounds[0] == bounds[1] and first.keys() == second.keys()
  print("every bit is the same" if same else "THEY DIFFER")
  return int(not same)


def _differ(a: str, b: str) -> bool:
  return a != b


if __name__ == "__main__":
  os.environ.setdefault("PYTHONUNBUFFERED", "1")
  sys.exit(main())
