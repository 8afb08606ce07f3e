"""Runs what is in launch/, with stand-ins for the programs it calls."""

import json
import os
import pathlib
import re
import subprocess
import sys

from paths import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.rglob("*.sh"), *LAUNCH.rglob("*.sbatch")])
TIMEOUT = 30.0  # seconds; all of it takes one or two

VALUES = {
  "PROJECT": "the-project",
  "ZONE": "the-zone",
  "TPU_NAME": "the-tpu",
  "TPU_TYPE": "v5litepod-16",
  "TPU_RUNTIME": "v2-alpha-tpuv5-lite",
  "CLUSTER": "the-cluster",
  "JOB_NAME": "the-job",
  "IMAGE": "registry.example/mdm_jax:1",
  "CONFIG": "configs/quickstart.py",
  "WORKDIR": "gs://the-bucket/run",
  "BUCKET_URI": "gs://the-bucket",
}

# Of the system, not of the program.
OUT_OF_MEMORY, CRASH, TERMINATED = 137, 139, 143

RECORDING = """#!{python} -SE
import json, os, sys
folder = {folder!r}
argv = sys.argv[1:]
with open(folder + "/calls", "a") as file:
  file.write(json.dumps([{name!r}, *argv]) + "\\n")
"""


def restarts() -> dict[int, bool]:
  """Returns what docs/reliability.md says of every code: start it again?"""
  page = (ROOT / "docs" / "reliability.md").read_text()
  rows = re.findall(r"^\| (\d+) \| \w+ \|.*\| (yes|no) \|$", page, re.MULTILINE)
  of_system = {OUT_OF_MEMORY, CRASH, TERMINATED}
  assert all(f"{code}" in page for code in of_system)
  return {
    **{int(code): again == "yes" for code, again in rows},
    **dict.fromkeys(of_system, True),
  }


class Stage:
  """A folder with stand-ins on the PATH, which write down what they are told.

  Attributes:
    folder: where it all lies; also the scripts' home.
  """

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    (folder / "bin").mkdir()

  def fake(self, name: str, body: str = "") -> pathlib.Path:
    """Puts a program on the PATH: a few lines of Python that know `argv`."""
    path = self.folder / "bin" / name
    head = RECORDING.format(
      python=sys.executable, folder=str(self.folder), name=name
    )
    path.write_text(head + body)
    path.chmod(0o755)
    return path

  def environment(self, **changes: str) -> dict[str, str]:
    """Returns variables in which every value of env.example is given."""
    paths = f"{self.folder / 'bin'}:{os.environ['PATH']}"
    own = {"PATH": paths, "HOME": str(self.folder), "LC_ALL": "C"}
    return {**own, **VALUES, **changes}

  def run(
    self, *command: object, cwd: pathlib.Path = ROOT, **changes: str
  ) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end; `changes` are of the environment."""
    return subprocess.run(
      [str(part) for part in command],
      env=self.environment(**changes),
      cwd=cwd,
      capture_output=True,
      text=True,
      timeout=TIMEOUT,
    )

  def calls(self) -> list[list[str]]:
    """Returns the command lines of all stand-ins so far, and forgets them."""
    path = self.folder / "calls"
    if not path.exists():
      return []
    lines = path.read_text().splitlines()
    path.unlink()
    return [json.loads(line) for line in lines]
