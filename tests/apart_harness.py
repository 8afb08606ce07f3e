"""Environments beside this one, for packages that don't go with its own."""

import os
import pathlib
import subprocess
import sys

import pytest
from paths import ROOT


def python_with(folder: pathlib.Path, extras: str, variable: str) -> str:
  """Returns the interpreter of an environment that has some extras.

  Args:
    folder: where to make it, which takes a minute or two.
    extras: as `dev,beam`.
    variable: of the environment, which names an interpreter that has them.
  """
  if variable in os.environ:
    return os.environ[variable]
  venv = folder / "venv"
  subprocess.run([sys.executable, "-m", "venv", venv], check=True)
  python = str(venv / "bin" / "python")
  done = subprocess.run(
    [python, "-m", "pip", "install", "--quiet", "-e", f"{ROOT}[{extras}]"],
    capture_output=True,
    text=True,
  )
  assert "ResolutionImpossible" not in done.stderr, done.stderr
  if done.returncode:
    lines = done.stderr.strip().splitlines()
    errors = [line for line in lines if line.startswith("ERROR")]
    pytest.skip(f"pip can't install {extras} here: {(errors or lines)[-1]}")
  assert "does not provide the extra" not in done.stderr, done.stderr
  return python
