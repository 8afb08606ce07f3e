"""Chooses the attention kernel, in particular for `model.attention=auto`.

The choice depends on shapes, dtype and hardware only, so `--mode=plan` can name
it without running anything. On a GPU it also asks JAX to lower the kernel: only
JAX knows which cuDNN is installed and what that version supports.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from mdm_jax.core.errors import UserError
from mdm_jax.model.kernels import KERNELS, Case, Place

_NO_MESH = jax.sharding.AbstractMesh((), ())
# Kernels that `auto` tries on a backend, fastest first; the last one supports
# everything. On one H100 an update of 12 layers with embed_dim 768 took 91 ms
# with cuDNN's flash attention and 137 ms with XLA's.
_FASTEST = {"gpu": ("cudnn", "xla")}


@dataclasses.dataclass(frozen=True)
class Choice:
  """A kernel's name in the config, and why it was chosen."""

  name: str
  why: str

  def __str__(self) -> str:
    return f"attention {self.name}: {self.why}"


def choose(asked: str, place: Place, case: Case) -> Choice:
  """Resolves `model.attention` from shapes and hardware, without asking JAX.

  Args:
    asked: value of `model.attention`.
    place: the hardware.
    case: the attention problem.

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
    if lacking is None:
      kind = f"{kernel.called}, of {case.dtype}, heads of {case.head}"
      return Choice(name, kind + kernel.remark(case))
    missing = f": {kernel.called} has no {lacking}"
  return Choice(last, KERNELS[last].called + missing)


@functools.cache
def here() -> Place:
  """Returns the hardware of this process."""
  backend = jax.default_backend()
  capability = getattr(jax.devices()[0], "compute_capability", None)
  return Place(backend, str(capability) if capability else None)


def chosen(asked: str, case: Case) -> Choice:
  """Returns the kernel used in this process, confirmed by JAX on a GPU.

  Args:
    asked: value of `model.attention`.
    case: the attention problem.

  Raises:
    UserError: the kernel named by `asked` does not support the case, or JAX
      refuses it on this GPU.
  """
  found = choose(asked, here(), case)
  if found.name != "cudnn":
    # `choose` returns a kernel asked for by name without checking it.
    lacking = KERNELS[found.name]().lacks(case, here())
    if lacking:
      raise UserError(
        f"model.attention={asked} has no {lacking}; nearest valid: auto"
      )
    return found
  if here().backend != "gpu":
    # Nothing to ask JAX here; `placement.check_model` refuses cudnn on a mesh
    # without a GPU.
    return found
  refused = refusal("cudnn", case)
  if refused and asked == "cudnn":
    raise UserError(
      f"model.attention=cudnn with rows of {case.queries} tokens and heads of"
      f" {case.head} in {case.dtype}: {refused}; nearest valid: auto"
    )
  if refused:
    return Choice("xla", f"XLA's own, as JAX says of cuDNN's: {refused}")
  return found


@functools.cache
def refusal(kernel: str, case: Case) -> str | None:
  """Returns why JAX refuses a kernel or its gradient; None if it does not.

  Lowers them for the current backend, without compiling or running anything.
  """
  heads = lambda length: jax.ShapeDtypeStruct(
    (1, length, 1, case.head), case.dtype
  )
  shape = (1, 1, case.queries, case.keys)
  mask = None if case.plain else jax.ShapeDtypeStruct(shape, bool)

  def attend(query, key, value, mask):
    mixed = jax.nn.dot_product_attention(
      query, key, value, mask=mask, implementation=kernel
    )
    return mixed.astype(jnp.float32).sum()

  keys = heads(case.keys)
  try:
    # Without the current mesh, on which the cached answer must not depend.
    with jax.sharding.use_abstract_mesh(_NO_MESH):
      grad = jax.jit(jax.grad(attend, argnums=(0, 1, 2)))
      grad.lower(heads(case.queries), keys, keys, mask)
  # JAX's checks of cuDNN's version, shapes and hardware raise any of these.
  except (RuntimeError, ValueError, NotImplementedError) as error:
    return (str(error).splitlines() or [type(error).__name__])[0]
  return None
