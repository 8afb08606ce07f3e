"""How the blocks are run: as one loop or unrolled, and what is recomputed.

A loop compiles in a time that does not grow with depth, but on a GPU everything
that the backward pass needs is copied into arrays over all layers and back.
Unrolled, nothing is copied (docs/performance.md has the measurements).
"""

import dataclasses

import jax

from mdm_jax.core.hardware import Place
from mdm_jax.core.sharding import RULES
from mdm_jax.model.config import ModelConfig

# Compiling takes time in proportion to the number of layers; deeper models keep
# the loop.
_MOST_UNROLLED = 32


@dataclasses.dataclass(frozen=True)
class LayerLoop:
  """How the blocks are run.

  Attributes:
    unrolled: whether every block has its own part of the program.
    remat: what the backward pass recomputes: "none", "dots" or "full".
    why: the reason, as the plan prints it.
  """

  unrolled: bool
  remat: str
  why: str

  def __str__(self) -> str:
    kind = "unrolled" if self.unrolled else "one loop"
    return f"layers {kind}, remat {self.remat}: {self.why}"


def choose(config: ModelConfig, place: Place | None) -> LayerLoop:
  """Resolves `model.layer_loop` and `model.remat`.

  Args:
    config: the architecture.
    place: the hardware; None for a plan without any. Whether parameters are
      split follows from the current mesh.
  """
  unrolled, why = _unrolled(config, place)
  remat = config.remat
  if remat == "auto":
    # A loop copies what it keeps, so recomputing all but the products is
    # faster; unrolled, keeping everything is.
    remat = "none" if unrolled else "dots"
  return LayerLoop(unrolled, remat, why)


def _unrolled(config: ModelConfig, place: Place | None) -> tuple[bool, str]:
  """Returns whether the layers are unrolled, and why."""
  if config.layer_loop != "auto":
    unrolled = config.layer_loop == "unrolled"
    return unrolled, "as model.layer_loop says"
  if place is None or place.backend != "gpu":
    return False, "a loop compiles fastest"
  if config.num_layers > _MOST_UNROLLED:
    return False, f"more than {_MOST_UNROLLED} layers would compile for minutes"
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty and mesh.shape[RULES.embed] > 1:
    # XLA would gather the parameters of many layers at once.
    return False, "split parameters are gathered a layer at a time"
  return True, "on a GPU a loop would copy what it keeps"
