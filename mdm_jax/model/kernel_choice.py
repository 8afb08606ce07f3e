"""Which kernel computes attention, where `model.attention` is `auto`.

By shapes and dtype alone, so that a plan can say it, and on a GPU by asking JAX
whether it would take the kernel: what cuDNN is there, and what it can do,
only JAX knows.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from mdm_jax.core.errors import UserError
from mdm_jax.model.kernels import KERNELS, Case, Place

_NO_MESH = jax.sharding.AbstractMesh((), ())
# What `auto` tries on a backend, the fastest first; the last can do everything.
# cuDNN's flash attention wherever it is right: measured on one H100, an update
# of 12 layers by 768 took 91 ms with it and 137 with XLA's own.
_FASTEST = {"gpu": ("cudnn", "xla")}


@dataclasses.dataclass(frozen=True)
class Choice:
  """What attention is computed by: its name in the config, and the reason."""

  name: str
  why: str

  def __str__(self) -> str:
    return f"attention {self.name}: {self.why}"


def choose(asked: str, place: Place, case: Case) -> Choice:
  """Returns what `model.attention` means for such arrays in such a place.

  Args:
    asked: `model.attention`.
    place: what it runs on.
    case: what is to be computed.

  Raises:
    UserError: the kernel that is asked for does not exist.
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
  """Returns what programs run on in this process."""
  backend = jax.default_backend()
  capability = getattr(jax.devices()[0], "compute_capability", None)
  return Place(backend, str(capability) if capability else None)


def chosen(asked: str, case: Case) -> Choice:
  """Returns what is taken in this process: `choose`, and what JAX says.

  Raises:
    UserError: a kernel is asked for that can't do this, or, on this GPU, that
      JAX can't take.
  """
  found = choose(asked, here(), case)
  if found.name != "cudnn":
    lacking = KERNELS[found.name]().lacks(case, here())
    if lacking:
      raise UserError(
        f"model.attention={asked} has no {lacking}; nearest valid: auto"
      )
    return found
  if here().backend != "gpu":
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
  """Returns why JAX can't take a kernel and its gradient; None if it can.

  Nothing is computed: it is lowered for what is here.
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
    with jax.sharding.use_abstract_mesh(_NO_MESH):
      grad = jax.jit(jax.grad(attend, argnums=(0, 1, 2)))
      grad.lower(heads(case.queries), keys, keys, mask)
  except (RuntimeError, ValueError, NotImplementedError) as error:
    return (str(error).splitlines() or [type(error).__name__])[0]
  return None
