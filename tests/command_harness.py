"""Commands as a user gives them: real processes, with a cache of their own."""

import os
import subprocess
import sys

import jax
from paths import ROOT

QUICK = f"--config={ROOT / 'configs' / 'quickstart.py'}:quick"


def environment(cache, **more):
  """Returns the environment of a command: conftest.py's, and a cache."""
  return (
    os.environ
    | {
      "XDG_CACHE_HOME": str(cache),
      "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }
    | more
  )


def call(folder, env, *args, typed=""):
  """Runs the program in a folder; returns the finished process."""
  return subprocess.run(
    [sys.executable, "-m", "mdm_jax.main", *map(str, args)],
    cwd=folder,
    env=env,
    input=typed,
    capture_output=True,
    text=True,
    timeout=300,
  )


def check_mistake(done, *words):
  """Checks for one line that holds the words, exit code 2, no traceback."""
  assert done.returncode == 2, done.stderr
  assert done.stderr.startswith("error: ")
  assert done.stderr.count("\n") == 1 and done.stderr.endswith("\n")
  assert "Traceback" not in done.stderr + done.stdout
  for word in words:
    assert word in done.stderr, word
