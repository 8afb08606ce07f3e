"""The hardware that a program is traced for."""

import dataclasses
import functools

import jax

from mdm_jax.core import accelerators


@dataclasses.dataclass(frozen=True)
class Place:
  """The hardware that a program runs on.

  Attributes:
    backend: JAX's name for it: "cpu", "gpu" or "tpu".
    capability: compute capability of an NVIDIA GPU, such as "9.0"; else None.
  """

  backend: str
  capability: str | None = None


@functools.cache
def here() -> Place:
  """Returns the hardware of this process."""
  backend = jax.default_backend()
  capability = getattr(jax.devices()[0], "compute_capability", None)
  return Place(backend, str(capability) if capability else None)


def target() -> Place | None:
  """Returns the hardware that the program being traced will run on.

  This follows from the current mesh, whose devices need not exist here: a
  topology describes them. Without a mesh it is the hardware of this process.

  Returns:
    The hardware; None for an abstract mesh, which is a plan without any.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return here()
  device = mesh.abstract_device
  if device is None:
    return None
  if device.platform == jax.default_backend():
    return here()
  listed = accelerators.by_kind(device.device_kind)
  return Place(device.platform, listed and listed.capability)


def on_gpu() -> bool:
  """Returns whether the program being traced will run on GPUs."""
  place = target()
  return place is not None and place.backend == "gpu"
