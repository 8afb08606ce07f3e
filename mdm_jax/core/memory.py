"""How much memory there is, and errors that say there is too little."""

import os
import pathlib
from typing import Any

import jax

from mdm_jax.core.errors import UserError

_CONTAINER = pathlib.Path("/sys/fs/cgroup/memory.max")


def of_host() -> int:
  """Returns the bytes this machine has, or this container may take."""
  have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  try:
    return min(have, int(_CONTAINER.read_text()))
  except (OSError, ValueError):  # there is none, or "max"
    return have


def of_device() -> int:
  """Returns the bytes a device may take: the host's, where it has no own."""
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get("bytes_limit") or of_host()


def told(error: BaseException) -> UserError | None:
  """Returns an error of too little memory in one line; None for all others."""
  if isinstance(error, MemoryError):
    where = "this machine's memory"
  elif isinstance(error, jax.errors.JaxRuntimeError) and _is_full(error):
    where = "a device's memory"
  else:
    return None
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return UserError(
    f"{where} is too small for these settings ({lines[0]}); what needs less at"
    " once: a smaller data.batch_size with a larger optimizer.accumulation,"
    " model.remat=full, a smaller eval.batch_size, shorter rows or samples, or"
    " more devices"
  )


def _is_full(error: Any) -> bool:
  text = str(error)
  return "RESOURCE_EXHAUSTED" in text and "memory" in text.lower()
