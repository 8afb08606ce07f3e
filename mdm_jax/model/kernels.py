"""Ways to compute attention, by the names that `model.attention` has for them.

A kernel is two functions. `prepare` is called once for all layers and turns the
description of what sees what into what the kernel reads; `attend` is called in
every layer. A kernel of one's own, in a module of one's own:

  @KERNELS.register("mine")
  class Mine(Kernel):
    def prepare(self, visibility, q, k): ...
    def attend(self, query, key, value, prepared): ...
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from mdm_jax.core.errors import UserError
from mdm_jax.core.registry import Registry
from mdm_jax.model import cpu_gradients
from mdm_jax.model.context import FULL, Side, Visibility, visible

_HALF = ("bfloat16", "float16")
_LEAST_CAPABILITY = (8, 0)
# Largest head of cuDNN's flash attention, from a compute capability on.
_LARGEST_HEAD = {(8, 0): 128, (9, 0): 256}


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
class Case:
  """What a kernel would have to compute.

  Attributes:
    dtype: the name of that of queries, keys and values.
    head: entries of a head.
    queries: of a row.
    keys: of a row.
    visibility: what a position sees.
    packed: a row may hold several texts.
    cache: some keys are those of earlier calls.
  """

  dtype: str
  head: int
  queries: int
  keys: int
  visibility: Visibility = FULL
  packed: bool = True
  cache: bool = False

  @property
  def plain(self) -> bool:
    """Whether lengths, and maybe an order, say all of what sees what."""
    kind = self.visibility.kind in ("full", "causal")
    return kind and not self.packed and not self.cache


class Kernel:
  """One way to compute attention; holds no state.

  Attributes:
    called: whose kernel it is, as a plan says it.
  """

  called: ClassVar[str] = "your own"

  def lacks(self, case: Case, place: Place) -> str | None:
    """Returns what the kernel can't do of a case; None if it is right.

    Args:
      case: what would have to be computed.
      place: what it would run on.
    """
    del case, place
    return None

  def remark(self, case: Case) -> str:
    """Returns what a plan adds about the kernel in a case."""
    del case
    return ""

  def prepare(self, visibility: Visibility, q: Side, k: Side) -> Any:
    """Returns what `attend` is given in every layer.

    Args:
      visibility: what a query sees.
      q: the queries.
      k: the keys; the same object as `q` where a row attends to itself.
    """
    raise NotImplementedError

  def attend(
    self,
    query: Float[Array, "B G R Q K"],
    key: Float[Array, "B G M K"],
    value: Float[Array, "B G M K"],
    prepared: Any,
  ) -> Float[Array, "B G R Q K"]:
    """Returns each query's mean of the values that it sees.

    Args:
      query: G groups of R heads, each of size K.
      key: one head for all R of a group.
      value: likewise.
      prepared: from `prepare`.
    """
    raise NotImplementedError


class _Kernels(Registry[type[Kernel]]):
  """Also knows `auto`, which is no kernel, and what a name was before."""

  _renamed = {"fused": "xla"}

  def check(self, name: str, field: str = "") -> None:
    """As any registry's; see `Registry.check`."""
    if name in self._renamed and name not in self:
      raise UserError(
        f"{field or self.field}={name!r} is called {self._renamed[name]!r} now"
      )
    if name != "auto":
      super().check(name, field)

  def __iter__(self) -> Iterator[str]:
    yield "auto"
    yield from super().__iter__()


KERNELS = _Kernels("attention kernel", "model.attention")


def dense(visibility: Visibility, q: Side, k: Side) -> Bool[Array, "B Q K"]:
  """Returns which keys each query sees, an entry for every pair."""
  if visibility == FULL and q is k:  # the rule, without comparing zeros
    return q.segments[:, :, None] == k.segments[:, None, :]
  return visible(q, k)


@KERNELS.register("reference")
class Reference(Kernel):
  """Plain products, the softmax in float32."""

  called = "plain products"

  def prepare(self, visibility: Visibility, q: Side, k: Side):
    """Returns an entry for every pair."""
    return dense(visibility, q, k)

  def attend(self, query, key, value, prepared):
    """As `Kernel.attend`.

    The heads of a group stand below each other, as if they were one with R
    times the queries: products of rank 4 are 1.7 times as fast on a CPU as of
    rank 5.
    """
    batch, groups, repeats, queries, size = query.shape
    below = _reshape(query, batch, groups, repeats * queries, size)
    pairs = jnp.tile(prepared, (1, repeats, 1))
    attend = cpu_gradients.attend if cpu_gradients.wanted() else _plain
    mixed = attend(below, key, value, pairs)
    return _reshape(mixed, *query.shape)


def _plain(query, key, value, visible) -> Float[Array, "B G N K"]:
  """Attends by the formula; [B N M] says which key each query sees."""
  scores = jnp.einsum(
    "bgnk,bgmk->bgnm",
    query * query.shape[-1] ** -0.5,
    key,
    preferred_element_type=jnp.float32,
  )
  scores = jnp.where(visible[:, None], scores, -1e30)
  mixed = jnp.einsum(
    "bgnm,bgmk->bgnk",
    jax.nn.softmax(scores, axis=-1).astype(value.dtype),
    value,
    out_sharding=jax.typeof(query).sharding,
  )
  return checkpoint_name(mixed, "attention")


@KERNELS.register("xla")
class XLA(Kernel):
  """`jax.nn.dot_product_attention`, compiled by XLA."""

  called = "XLA's own"

  def prepare(self, visibility: Visibility, q: Side, k: Side):
    """Returns an entry for every pair, the same for all heads."""
    return {"mask": dense(visibility, q, k)[:, None]}

  def attend(self, query, key, value, prepared):
    """As `Kernel.attend`."""
    return _by_jax(query, key, value, prepared, None)


@KERNELS.register("cudnn")
class CuDNN(Kernel):
  """`jax.nn.dot_product_attention` by cuDNN's flash attention, on a GPU.

  JAX's function takes no segments: what lengths can't say is a dense mask.
  """

  called = "cuDNN's"

  def lacks(self, case: Case, place: Place) -> str | None:
    """Says what the kernel, its gradient and a mask can't do of a case."""
    capability = parsed(place.capability)
    if capability is None or capability < _LEAST_CAPABILITY:
      return f"way to run on a GPU of compute capability {place.capability}"
    largest = max(n for c, n in _LARGEST_HEAD.items() if c <= capability)
    if case.dtype not in _HALF:
      return case.dtype
    if case.head % 8 or case.head > largest:
      return f"heads of {case.head}, only multiples of 8 up to {largest}"
    if case.queries % 2:
      return f"rows of {case.queries} tokens, an odd number"
    if case.keys % 2:
      return f"{case.keys} keys a row, an odd number"
    return None

  def remark(self, case: Case) -> str:
    """Says what a dense mask takes, which JAX makes a bias of."""
    if case.plain:
      return ""
    size = case.queries * case.keys * jnp.dtype(case.dtype).itemsize / 2**20
    return f"; its mask is dense, {size:.2f} MiB a row"

  def prepare(self, visibility: Visibility, q: Side, k: Side):
    """Returns lengths where they say all, else an entry for every pair."""
    if q is not k or q.packed or visibility.kind not in ("full", "causal"):
      return {"mask": dense(visibility, q, k)[:, None]}
    # A row of nothing but padding has one position, that nobody reads.
    lengths = jnp.maximum((q.segments > 0).sum(axis=1), 1)
    return {
      "query_seq_lengths": lengths,
      "key_value_seq_lengths": lengths,
      "is_causal": visibility.kind == "causal",
    }

  def attend(self, query, key, value, prepared):
    """As `Kernel.attend`."""
    return _by_jax(query, key, value, prepared, "cudnn")


def parsed(capability: str | None) -> tuple[int, ...] | None:
  """Returns a compute capability's parts; None for one of another maker."""
  try:
    return tuple(int(part) for part in (capability or "").split("."))
  except ValueError:  # as gfx90a
    return None


def _by_jax(query, key, value, prepared: dict[str, Any], kernel: str | None):
  """Attends through `jax.nn.dot_product_attention` (kernel None: XLA's)."""
  batch, groups, repeats, queries, size = query.shape
  heads = _reshape(query, batch, groups * repeats, queries, size)
  inputs = [jnp.swapaxes(x, 1, 2) for x in (heads, key, value)]
  arrays = {k: v for k, v in prepared.items() if isinstance(v, jax.Array)}
  fixed = {k: v for k, v in prepared.items() if k not in arrays}

  def attend(query, key, value, arrays):
    return jax.nn.dot_product_attention(
      query, key, value, **arrays, **fixed, implementation=kernel
    )

  if kernel is None or jax.sharding.get_abstract_mesh().size > 1:
    attend = _by_device(attend, *inputs, arrays)
  result = attend(*inputs, arrays)
  return _reshape(jnp.swapaxes(result, 1, 2), *query.shape)


def _by_device(attend: Callable[..., Array], *inputs: Any):
  """Attends on every device to its own rows and heads.

  JAX reshapes inside, and newer versions forget there how one row is split;
  and a kernel knows nothing of a mesh.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return attend
  specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, inputs)
  return jax.shard_map(attend, in_specs=specs, out_specs=specs[0])


def _reshape(x: Array, *shape: int) -> Array:
  """Reshapes what is behind the batch and the heads.

  The sharding is named: JAX's newer versions forget that of a batch of one row.
  """
  old = jax.typeof(x).sharding
  spec = P(*old.spec[:2], *[None] * (len(shape) - 2))
  new = NamedSharding(old.mesh, spec)
  return jnp.reshape(x, shape, out_sharding=new)
