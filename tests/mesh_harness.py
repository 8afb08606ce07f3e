"""Meshes of the fake devices that conftest.py sets up."""

import jax

from mdm_jax.core.sharding import AXES

MESHES = {"1x1": (1, 1, 1), "4x2": (1, 4, 2)}


def make_mesh(name: str) -> jax.sharding.Mesh:
  """Returns a mesh of that many of the fake devices."""
  shape = MESHES[name]
  count = shape[0] * shape[1] * shape[2]
  return jax.make_mesh(shape, AXES, devices=jax.devices()[:count])
