"""Chooses the attention kernel, in particular for `model.attention=auto`.

The choice depends on shapes, dtype and hardware only, so `--mode=plan` can name
it without running anything. On a GPU it also asks JAX to lower the kernel: only
JAX knows which cuDNN is installed and what that version supports.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mdm_jax.core import hardware
from mdm_jax.core.errors import UserError
from mdm_jax.core.hardware import Place
from mdm_jax.model import (  # noqa: F401, they register their kernels
  packed_kernel,
  splash_kernel,
)
from mdm_jax.model.context import make_side
from mdm_jax.model.kernels import KERNELS, Case

_NO_MESH = jax.sharding.AbstractMesh((), ())
# Kernels that `auto` tries on a backend, fastest first; the last one supports
# everything. docs/performance.md has the times that gave the order on a GPU,
# and why cudnn_packed is not in it; nothing was timed on a TPU.
_FASTEST = {"gpu": ("cudnn", "xla"), "tpu": ("splash", "xla")}
# Kernels that JAX may refuse, by the version of cuDNN.
_ASKED = "cudnn_packed", "cudnn"
# (kernel's name, case) -> why it can't be used, or None.
Refusal = Callable[[str, Case], str | None]


@dataclasses.dataclass(frozen=True)
class Choice:
  """A kernel's name in the config, and why it was chosen."""

  name: str
  why: str

  def __str__(self) -> str:
    return f"attention {self.name}: {self.why}"


def _fine(name: str, case: Case) -> None:
  del name, case


def choose(
  asked: str, place: Place, case: Case, refused: Refusal = _fine
) -> Choice:
  """Resolves `model.attention` from shapes and hardware, without asking JAX.

  Args:
    asked: value of `model.attention`.
    place: the hardware.
    case: the attention problem.
    refused: returns why a kernel can't be used for another reason than its
      shapes and hardware, or None.

  Returns:
    The kernel named by `asked`, supported or not; for `auto`, the fastest one
    that supports the case.

  Raises:
    UserError: `asked` names no kernel.
  """
  if asked != "auto":
    remark = KERNELS[asked]().remark(case)
    return Choice(asked, "as model.attention says" + remark)
  if place.backend == "cpu":
    return Choice("reference", "plain products are the fastest on a CPU")
  *fast, last = _FASTEST.get(place.backend, ("xla",))
  missing = f", the one there is on a {place.backend}"
  for name in fast:
    kernel = KERNELS[name]()
    lacking = kernel.lacks(case, place)
    missing = f": {kernel.called} has no {lacking}"
    if lacking is None:
      reason = refused(name, case)
      if reason is None:
        kind = f"{kernel.called}, of {case.dtype}, heads of {case.head}"
        return Choice(name, kind + kernel.remark(case))
      missing = f", as JAX says of {kernel.called}: {reason}"
  return Choice(last, KERNELS[last].called + missing)


def chosen(asked: str, case: Case) -> Choice:
  """Returns the kernel used in this program, confirmed by JAX on a GPU.

  Args:
    asked: value of `model.attention`.
    case: the attention problem.

  Raises:
    UserError: the kernel named by `asked` does not support the case, or JAX
      refuses it on this GPU.
  """
  place = hardware.target() or _planned(asked)
  # JAX answers for this process's GPU only. Without one, a program can still be
  # compiled for another; on a CPU `placement.check_model` refuses cudnn.
  refused = refusal if place == hardware.here() else _refused_elsewhere
  refused = refused if place.backend == "gpu" else _fine
  found = choose(asked, place, case, refused)
  if asked == "auto":
    return found
  # JAX says of cudnn itself what it lacks, with its version.
  if found.name != "cudnn":
    lacking = KERNELS[found.name]().lacks(case, place)
    if lacking:
      raise UserError(
        f"model.attention={asked} has no {lacking}; nearest valid: auto"
      )
  if found.name in _ASKED and (reason := refused(asked, case)):
    raise UserError(
      f"model.attention={asked} with rows of {case.queries} tokens and heads of"
      f" {case.head} in {case.dtype}: {reason}; nearest valid: auto"
    )
  return found


def _planned(asked: str) -> Place:
  """Returns the hardware of a plan: this one, or what the kernel needs."""
  here = hardware.here()
  needs = None if asked == "auto" else KERNELS[asked].needs
  return here if needs in (None, here.backend) else Place(needs)


def _refused_elsewhere(name: str, case: Case) -> str | None:
  """Returns why a program for a GPU that isn't here can't have a kernel."""
  del case
  return "it is compiled on its GPU only" if name == "cudnn_packed" else None


@functools.cache
def refusal(name: str, case: Case) -> str | None:
  """Returns why JAX refuses a kernel or its gradient; None if it does not.

  Lowers them for the current backend, without compiling or running anything.
  """
  kernel = KERNELS[name]()

  def attend(query, key, value, segments):
    sides = [
      dataclasses.replace(
        make_side(case.visibility, s, s, s > 0),
        most_segments=case.most_segments,
      )
      for s in segments
    ]
    prepared = kernel.prepare(case.visibility, sides[0], sides[-1])
    mixed = kernel.attend(query, key, value, prepared)
    return mixed.astype(jnp.float32).sum()

  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, case.dtype)
  row = lambda length: jax.ShapeDtypeStruct((1, length), jnp.int32)
  keys = shape(1, 1, case.keys, case.head)
  segments = [row(case.queries), row(case.keys)]
  # The queries' and the keys' side are the same object if there is no cache.
  segments = segments if case.cache else segments[:1]
  try:
    # Without the current mesh, on which the cached answer must not depend.
    with jax.sharding.use_abstract_mesh(_NO_MESH):
      grad = jax.jit(jax.grad(attend, argnums=(0, 1, 2)))
      grad.lower(shape(1, 1, 1, case.queries, case.head), keys, keys, segments)
  # JAX's checks of cuDNN's version, shapes and hardware raise any of these.
  except (RuntimeError, ValueError, NotImplementedError) as error:
    return (str(error).splitlines() or [type(error).__name__])[0]
  return None
