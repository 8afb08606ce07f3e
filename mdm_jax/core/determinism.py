"""Bit-reproducible runs: XLA's flag for deterministic kernels on GPUs.

On a CPU XLA is deterministic. On a GPU it chooses kernels by timing them, and
some sum with atomics, in the order in which threads arrive; the flag turns both
off. XLA reads its flags once, when JAX initializes a backend, and aborts the
process if it doesn't know one.
"""

import importlib.metadata
import os
import subprocess
import sys

import jax

from mdm_jax.core.errors import UserError

FLAG = "--xla_gpu_deterministic_ops=true"
_FIELD = "train.deterministic"


def ask_for(wanted: bool) -> None:
  """Sets XLA's flag for deterministic kernels. Call it before JAX starts.

  Does nothing if no GPU plugin of JAX is installed.

  Raises:
    UserError: this version of XLA does not know the flag.
  """
  if not wanted or is_asked() or not _gpu_plugins():
    return
  if not is_known(FLAG):
    raise UserError(
      f"{_FIELD}=true: this version of XLA does not know {FLAG}; nearest valid:"
      f" {_FIELD}=auto, or another version of jaxlib"
    )
  given = os.environ.get("XLA_FLAGS", "")
  os.environ["XLA_FLAGS"] = f"{given} {FLAG}".strip()


def check(wanted: bool) -> None:
  """Raises UserError if JAX has started its GPU without the flag."""
  if wanted and jax.default_backend() == "gpu" and not is_asked():
    raise UserError(
      f"{_FIELD}=true: JAX has started its GPU without {FLAG}; start by"
      f" python -m mdm_jax.main, or with XLA_FLAGS={FLAG}"
    )


def is_asked() -> bool:
  """Returns whether XLA_FLAGS has the flag, in any of its spellings."""
  name, value = FLAG.split("=")
  flags = os.environ.get("XLA_FLAGS", "").split()
  return any(f in (name, FLAG, f"{name}=1", f"{name}={value}") for f in flags)


def is_known(flag: str) -> bool:
  """Returns whether XLA knows a flag."""
  # In a subprocess, since XLA aborts the process over an unknown flag.
  env = os.environ | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
  start = [sys.executable, "-c", "import jax; jax.devices()"]
  return not subprocess.run(start, env=env, capture_output=True).returncode


def promise(backend: str) -> str:
  """Returns a sentence that says which runs are bit-identical on a backend."""
  if backend == "cpu":
    return "the same command gives the same bits, on the same number of devices"
  if backend != "gpu":
    return f"bit-identical runs were not tested on a {backend}"
  if is_asked():
    return (
      "XLA uses deterministic kernels; bit-identical runs on a GPU were not"
      " tested"
    )
  return f"two runs on a GPU differ by rounding; {_FIELD}=true avoids that"


def _gpu_plugins() -> list[str]:
  # By what is installed: asking JAX would start its backends, which fixes the
  # flags.
  found = importlib.metadata.entry_points(group="jax_plugins")
  return [p.name for p in found if "cuda" in p.name or "rocm" in p.name]
