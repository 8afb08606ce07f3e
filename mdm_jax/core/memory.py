"""Memory of the host and of devices, and out-of-memory errors."""

import os
import pathlib
from typing import Any

import jax

from mdm_jax.core.errors import UserError, first_line

_CONTAINER = pathlib.Path("/sys/fs/cgroup/memory.max")


def of_host() -> int:
  """Returns the host's memory in bytes, or the container's limit if lower."""
  have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  try:
    return min(have, int(_CONTAINER.read_text()))
  except (OSError, ValueError):  # no container, or "max" for no limit
    return have


def of_device() -> int:
  """Returns a device's memory in bytes; the host's if it has none itself."""
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get("bytes_limit") or of_host()


def as_user_error(error: BaseException) -> UserError | None:
  """Returns a UserError for an out-of-memory error; None for any other."""
  if isinstance(error, MemoryError):
    where = "this machine's memory"
  elif isinstance(error, jax.errors.JaxRuntimeError) and _is_full(error):
    where = "a device's memory"
  else:
    return None
  return UserError(
    f"{where} is too small for these settings ({first_line(error)}); to need"
    " less: a smaller data.batch_size with a larger optimizer.accumulation,"
    " model.remat=full, a smaller eval.batch_size, shorter rows or samples, or"
    " more devices"
  )


def _is_full(error: Any) -> bool:
  text = str(error)
  return "RESOURCE_EXHAUSTED" in text and "memory" in text.lower()
