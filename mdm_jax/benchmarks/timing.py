"""Timing that all benchmarks share: everything in turn, in one process.

Other load on the machine falls on all that is timed in turn alike, so ratios
hold where seconds do not. The machine's ceiling, its fastest matrix product, is
timed in the same turns.
"""

import dataclasses
import importlib.metadata
import math
import os
import pathlib
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Timed = Callable[[], Any]

_PACKAGES = ("mdm_jax", "jax", "jaxlib", "flax", "optax", "numpy")
_MOST_CALLS = 20  # per turn; to queue more at once gains nothing
# M, K, N of x [M, K] times [K, N] times [N, K].
_SHAPES = {
  "cpu": ((1024, 1024, 1024), (2048, 2048, 2048), (2048, 512, 2048)),
  "other": ((4096, 4096, 4096), (8192, 8192, 8192), (8192, 2048, 8192)),
}


def interleave(
  runs: Mapping[str, Timed], repeats: int, at_least: float = 0.0
) -> dict[str, list[float]]:
  """Times functions in turn.

  Args:
    runs: what to time; the first call of each is a warm-up.
    repeats: turns.
    at_least: seconds per turn, on average: a shorter function is called several
      times before its result is waited for, as in a training loop.

  Returns:
    Seconds per call in each turn, by name.
  """
  calls = {name: _calls(run, at_least) for name, run in runs.items()}
  seconds = {name: [] for name in runs}
  for _ in range(repeats):
    for name, run in runs.items():
      seconds[name].append(_time(run, calls[name]))
  return seconds


def _calls(run: Timed, at_least: float) -> int:
  # Warms up: a first call may compile or allocate.
  _time(run, 1)
  if not at_least:
    return 1
  return min(_MOST_CALLS, math.ceil(at_least / max(_time(run, 1), 1e-9)))


def _time(run: Timed, calls: int) -> float:
  start = time.perf_counter()
  for _ in range(calls):
    result = run()
  # Once per turn: calls are queued, so that dispatch overlaps as in a run.
  jax.block_until_ready(result)
  return (time.perf_counter() - start) / calls


def spread(seconds: Sequence[float]) -> dict[str, float]:
  """Returns the median, the minimum, and the lower and upper quartile."""
  low, median, high = (
    statistics.quantiles(seconds, n=4, method="inclusive")
    if len(seconds) > 1
    else 3 * [seconds[0]]
  )
  return {"median": median, "min": min(seconds), "low": low, "high": high}


# MARK: programs


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled function and what compiling it took.

  Attributes:
    call: runs it.
    lower_seconds: for tracing and lowering.
    compile_seconds: for XLA.
    temporary_bytes: needed while it runs, besides arguments and results.
    peak_bytes: arguments, results and temporaries, as XLA plans them.
  """

  call: Callable[..., Any]
  lower_seconds: float
  compile_seconds: float
  temporary_bytes: int
  peak_bytes: int

  def facts(self) -> dict[str, float]:
    """Returns all numbers by name."""
    fields = dataclasses.fields(self)[1:]
    return {field.name: getattr(self, field.name) for field in fields}


def compiled(function: Any, *args: Any) -> Program:
  """Compiles a jitted function for arguments, or for their shapes."""
  start = time.perf_counter()
  lowered = function.lower(*args)
  between = time.perf_counter()
  program = lowered.compile()
  end = time.perf_counter()
  memory = program.memory_analysis()
  # Donated arguments are results as well (aliases): count them once.
  whole = (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    + memory.temp_size_in_bytes
    - memory.alias_size_in_bytes
  )
  return Program(
    call=program,
    lower_seconds=between - start,
    compile_seconds=end - between,
    temporary_bytes=memory.temp_size_in_bytes,
    peak_bytes=whole,
  )


# MARK: the machine


@dataclasses.dataclass(frozen=True)
class Matmul:
  """Two matrix products that fill the device.

  Attributes:
    run: computes them.
    flops: of a run.
  """

  run: Timed
  flops: float


def matmuls(
  dtype: jnp.dtype, shapes: Sequence[tuple[int, int, int]] | None = None
) -> dict[str, Matmul]:
  """Returns products of a few shapes to time; every device computes them all.

  Args:
    dtype: of all factors and results.
    shapes: (M, K, N) of x [M, K] times [K, N] times [N, K]; None: shapes for
      the backend.
  """
  kind = "cpu" if jax.default_backend() == "cpu" else "other"
  shapes = shapes or _SHAPES[kind]
  return {
    f"matmul {'x'.join(map(str, shape))}": _matmul(dtype, *shape)
    for shape in shapes
  }


def _matmul(dtype: jnp.dtype, m: int, k: int, n: int) -> Matmul:
  draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
  x = draw(0, m, k).astype(dtype)
  up, down = (draw(1, k, n) * k**-0.5).astype(dtype), draw(2, n, k) * n**-0.5
  down = down.astype(dtype)
  product = compiled(jax.jit(lambda x, up, down: (x @ up) @ down), x, up, down)
  return Matmul(lambda: product.call(x, up, down), 4.0 * m * k * n)


def ceiling(
  products: Mapping[str, Matmul], seconds: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
  """Returns FLOP/s of one device: the fastest shape's, by its median time.

  Args:
    products: made by `matmuls`.
    seconds: as timed, by name; those of other functions are ignored.
  """
  by_shape = {
    name: product.flops / statistics.median(seconds[name])
    for name, product in products.items()
  }
  best = max(by_shape, key=by_shape.get)
  return {
    "flops_per_second": by_shape[best],
    "shape": best,
    "by_shape": by_shape,
  }


def process_peak_bytes() -> int:
  """Returns the peak memory of this process, in bytes.

  On an accelerator it is the fullest device's; on a CPU the process's resident
  memory, which includes the compiler's.
  """
  stats = [device.memory_stats() for device in jax.local_devices()]
  peaks = [s["peak_bytes_in_use"] for s in stats if s]
  if peaks:
    return max(peaks)
  return resident_peak_bytes()


def resident_peak_bytes() -> int:
  """Returns the peak of this process's resident memory, in bytes."""
  # ru_maxrss is in bytes on macOS and in KiB on Linux.
  unit = 1 if sys.platform == "darwin" else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def facts() -> dict[str, Any]:
  """Returns what the numbers depend on: devices, cores, load, versions."""
  return {
    "backend": jax.default_backend(),
    "device": jax.devices()[0].device_kind,
    "devices": jax.device_count(),
    "processor": _processor(),
    "cores": cores(),
    "load": os.getloadavg()[0],
    "python": platform.python_version(),
    **{name: importlib.metadata.version(name) for name in _PACKAGES},
  }


def cores() -> int:
  """Returns the number of cores this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _processor() -> str:
  path = pathlib.Path("/proc/cpuinfo")
  lines = path.read_text().splitlines() if path.exists() else []
  names = [
    line.partition(":")[2].strip() for line in lines if "model n" in line
  ]
  return names[0] if names else platform.processor() or platform.machine()
