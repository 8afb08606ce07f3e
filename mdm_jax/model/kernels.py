"""Which means attention is computed by, where `model.attention` is `auto`.

By shapes and dtype alone, so that a plan can say it, and on a GPU by asking JAX
whether it would take the kernel: what cuDNN is there, and what it can do,
only JAX knows.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from mdm_jax.core.errors import UserError

_HALF = ("bfloat16", "float16")
_LEAST_CAPABILITY = (8, 0)
# Largest head of cuDNN's flash attention, from a compute capability on.
_LARGEST_HEAD = {(8, 0): 128, (9, 0): 256}
_NO_MESH = jax.sharding.AbstractMesh((), ())


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a program runs.

  Attributes:
    backend: as JAX names it.
    capability: an NVIDIA GPU's, as `9.0`; None for all else.
  """

  backend: str
  capability: str | None = None


@dataclasses.dataclass(frozen=True)
class Choice:
  """What attention is computed by: its name in the config, and the reason."""

  name: str
  why: str

  def __str__(self) -> str:
    return f"attention {self.name}: {self.why}"


def choose(
  asked: str, place: Place, dtype: jnp.dtype, head: int, length: int
) -> Choice:
  """Returns what `model.attention` means for such arrays in such a place.

  cuDNN's flash attention wherever it is right; measured on one H100, an update
  of 12 layers by 768 took 91 ms with it and 137 with XLA's own.

  Args:
    asked: `model.attention`.
    place: what it runs on.
    dtype: of queries, keys and values.
    head: entries of a head.
    length: tokens of a row.
  """
  if asked != "auto":
    return Choice(asked, "as model.attention says")
  if place.backend == "cpu":
    return Choice("reference", "plain products are the fastest on a CPU")
  if place.backend != "gpu":
    return Choice("fused", f"XLA's own, the one there is on a {place.backend}")
  missing = _missing(place, jnp.dtype(dtype).name, head, length)
  if missing:
    return Choice("fused", f"XLA's own: cuDNN's has no {missing}")
  return Choice(
    "cudnn", f"cuDNN's, of {jnp.dtype(dtype).name}, heads of {head}"
  )


def _missing(place: Place, dtype: str, head: int, length: int) -> str | None:
  """Returns what cuDNN's kernel, its gradient and a mask can't do of this."""
  capability = _parsed(place.capability)
  if capability is None or capability < _LEAST_CAPABILITY:
    return f"way to run on a GPU of compute capability {place.capability}"
  largest = max(n for c, n in _LARGEST_HEAD.items() if c <= capability)
  if dtype not in _HALF:
    return dtype
  if head % 8 or head > largest:
    return f"heads of {head}, only multiples of 8 up to {largest}"
  if length % 2:
    return f"rows of {length} tokens, an odd number"
  return None


def _parsed(capability: str | None) -> tuple[int, ...] | None:
  try:
    return tuple(int(part) for part in (capability or "").split("."))
  except ValueError:  # as gfx90a, of another maker
    return None


@functools.cache
def here() -> Place:
  """Returns what programs run on in this process."""
  backend = jax.default_backend()
  capability = getattr(jax.devices()[0], "compute_capability", None)
  return Place(backend, str(capability) if capability else None)


def chosen(asked: str, dtype: jnp.dtype, head: int, length: int) -> Choice:
  """Returns what is taken in this process: `choose`, and what JAX says.

  Raises:
    UserError: cuDNN's is asked for, and JAX can't take it on this GPU.
  """
  found = choose(asked, here(), dtype, head, length)
  if found.name != "cudnn" or here().backend != "gpu":
    return found
  refused = refusal("cudnn", jnp.dtype(dtype).name, head, length)
  if refused and asked == "cudnn":
    raise UserError(
      f"model.attention=cudnn with rows of {length} tokens and heads of {head}"
      f" in {jnp.dtype(dtype).name}: {refused}; nearest valid: auto"
    )
  if refused:
    return Choice("fused", f"XLA's own, as JAX says of cuDNN's: {refused}")
  return found


@functools.cache
def refusal(kernel: str, dtype: str, head: int, length: int) -> str | None:
  """Returns why JAX can't take a kernel and its gradient; None if it can.

  Nothing is computed: it is lowered for what is here.
  """
  heads = jax.ShapeDtypeStruct((1, length, 1, head), dtype)
  mask = jax.ShapeDtypeStruct((1, 1, length, length), bool)

  def attend(query, key, value, mask):
    mixed = jax.nn.dot_product_attention(
      query, key, value, mask=mask, implementation=kernel
    )
    return mixed.astype(jnp.float32).sum()

  try:
    with jax.sharding.use_abstract_mesh(_NO_MESH):
      grad = jax.jit(jax.grad(attend, argnums=(0, 1, 2)))
      grad.lower(heads, heads, heads, mask)
  except (RuntimeError, ValueError, NotImplementedError) as error:
    return (str(error).splitlines() or [type(error).__name__])[0]
  return None
