"""Data-sheet numbers of accelerators: FLOP/s, memory, compute capability."""

import dataclasses

from mdm_jax.core.errors import UserError, nearest

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Accelerator:
  """One device, as counted by `jax.device_count`.

  Attributes:
    name: its name on the command line.
    kind: prefix of JAX's `device_kind`.
    flops: peak dense bfloat16 FLOP/s.
    memory: in bytes.
    capability: compute capability of an NVIDIA GPU, else None.
  """

  name: str
  kind: str
  flops: float
  memory: int
  capability: str | None = None


_ALL = (
  Accelerator("v4", "TPU v4", 275e12, 32 * GIB),
  Accelerator("v5e", "TPU v5 lite", 197e12, 16 * GIB),
  Accelerator("v5p", "TPU v5", 459e12, 95 * GIB),
  Accelerator("v6e", "TPU v6 lite", 918e12, 32 * GIB),
  Accelerator("a100-40", "NVIDIA A100", 312e12, 40 * GIB, "8.0"),
  Accelerator("a100-80", "NVIDIA A100-SXM4-80GB", 312e12, 80 * GIB, "8.0"),
  Accelerator("h100", "NVIDIA H100", 989e12, 80 * GIB, "9.0"),
  Accelerator("h200", "NVIDIA H200", 989e12, 141 * GIB, "9.0"),
)


def by_name(name: str) -> Accelerator:
  """Returns the accelerator with a name; raises UserError if unknown."""
  found = {a.name: a for a in _ALL}
  if name.lower() not in found:
    raise UserError(f"device {name!r}: {nearest(name, found)}")
  return found[name.lower()]


def by_kind(device_kind: str) -> Accelerator | None:
  """Returns the accelerator of a `device_kind`, or None if it isn't listed."""
  # The longest prefix wins: "TPU v5 lite" also begins with "TPU v5".
  fitting = [a for a in _ALL if device_kind.startswith(a.kind)]
  return max(fitting, key=lambda a: len(a.kind), default=None)
