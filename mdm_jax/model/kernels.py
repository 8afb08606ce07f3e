"""Attention kernels, chosen by name with `model.attention`.

A kernel is two functions. `prepare` runs once per call of the model and turns
the visibility into what the kernel reads, such as a mask or row lengths;
`attend` runs in every layer. To add a kernel, register it in your own module:

  @KERNELS.register("mine")
  class Mine(Kernel):
    def prepare(self, visibility, q, k): ...
    def attend(self, query, key, value, prepared): ...
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from mdm_jax.core.errors import UserError
from mdm_jax.core.hardware import Place
from mdm_jax.core.registry import Registry
from mdm_jax.model import cpu_gradients
from mdm_jax.model.context import FULL, Side, Visibility, visible

_HALF = ("bfloat16", "float16")
_LEAST_CAPABILITY = (8, 0)
# Largest head size of cuDNN's flash attention, by the compute capability from
# which on it is supported.
_LARGEST_HEAD = {(8, 0): 128, (9, 0): 256}


@dataclasses.dataclass(frozen=True)
class Case:
  """An attention problem, described by shapes and dtype.

  Attributes:
    dtype: name of the dtype of queries, keys and values.
    head: size K of a head.
    queries: queries per row.
    keys: keys per row.
    visibility: which positions of its segment a position attends to.
    most_segments: largest number of segments in a row; None if unknown.
    cache: whether some keys come from earlier calls.
  """

  dtype: str
  head: int
  queries: int
  keys: int
  visibility: Visibility = FULL
  most_segments: int | None = None
  cache: bool = False

  @property
  def plain(self) -> bool:
    """Whether row lengths, and causality, fully describe the visibility."""
    kind = self.visibility.kind in ("full", "causal")
    return kind and self.most_segments == 1 and not self.cache


class Kernel(abc.ABC):
  """One way to compute attention; stateless.

  Attributes:
    called: whose kernel it is, as the plan prints it ("XLA's own").
    needs: JAX's name of the only backend that it runs on; None for any.
  """

  called: ClassVar[str] = "your own"
  needs: ClassVar[str | None] = None

  def lacks(self, case: Case, place: Place) -> str | None:
    """Returns what the kernel does not support; None if it can be used.

    Messages put the answer behind "has no", as in "cuDNN's has no float32".

    Args:
      case: the attention problem.
      place: the hardware.
    """
    del case, place
    return None

  def remark(self, case: Case) -> str:
    """Returns text that the plan appends to the kernel's name; "" for none."""
    del case
    return ""

  @abc.abstractmethod
  def prepare(self, visibility: Visibility, q: Side, k: Side) -> Any:
    """Returns the layer-independent input of `attend`.

    Args:
      visibility: which positions of its segment a query attends to.
      q: the queries' segments and labels.
      k: the keys'; the same object as `q` if there is no cache.
    """

  @abc.abstractmethod
  def attend(
    self,
    query: Float[Array, "B G R Q K"],
    key: Float[Array, "B G M K"],
    value: Float[Array, "B G M K"],
    prepared: Any,
  ) -> Float[Array, "B G R Q K"]:
    """Returns the attention output of every query.

    Args:
      query: G groups of R heads of size K; already rotated, not yet scaled.
      key: one head per group (grouped-query attention), already rotated.
      value: one head per group.
      prepared: result of `prepare`.
    """


class _Kernels(Registry[type[Kernel]]):
  """Registry that also accepts `auto` and explains renamed kernels."""

  _renamed = {"fused": "xla"}

  def check(self, name: str, field: str = "") -> None:
    """Raises UserError for an unknown or renamed kernel; see `Registry`."""
    if name in self._renamed and name not in self:
      raise UserError(
        f"{field or self.field}={name!r} is called {self._renamed[name]!r} now"
      )
    if name != "auto":
      super().check(name, field)

  def __iter__(self) -> Iterator[str]:
    # Listed as a valid value, although no kernel is registered under it.
    yield "auto"
    yield from super().__iter__()


KERNELS = _Kernels("attention kernel", "model.attention")


def dense(visibility: Visibility, q: Side, k: Side) -> Bool[Array, "B Q K"]:
  """Returns the boolean mask of which keys each query attends to."""
  # With full visibility all labels and horizons are 0, so `visible` would only
  # add comparisons of zeros.
  if visibility == FULL and q is k:
    return q.segments[:, :, None] == k.segments[:, None, :]
  return visible(q, k)


@KERNELS.register("reference")
class Reference(Kernel):
  """Attention as two einsums with a float32 softmax; works everywhere."""

  called = "plain products"

  def prepare(self, visibility: Visibility, q: Side, k: Side):
    """Returns the dense mask [B, Q, K]."""
    return dense(visibility, q, k)

  def attend(self, query, key, value, prepared):
    """Returns the attention output; see `Kernel.attend`."""
    # Stack the R heads of a group along the query axis, as one head with R
    # times the queries: on a CPU, rank-4 products are 1.7 times as fast as
    # rank-5 ones.
    batch, groups, repeats, queries, size = query.shape
    below = _reshape(query, batch, groups, repeats * queries, size)
    pairs = jnp.tile(prepared, (1, repeats, 1))
    attend = cpu_gradients.attend if cpu_gradients.wanted() else _plain
    mixed = attend(below, key, value, pairs)
    return _reshape(mixed, *query.shape)


def _plain(query, key, value, visible) -> Float[Array, "B G N K"]:
  """Computes attention from the mask `visible`, [B, N, M]."""
  scores = jnp.einsum(
    "bgnk,bgmk->bgnm",
    query * query.shape[-1] ** -0.5,
    key,
    preferred_element_type=jnp.float32,
  )
  # Finite, not -inf: a query without any visible key gets a mean, not NaN.
  scores = jnp.where(visible[:, None], scores, -1e30)
  mixed = jnp.einsum(
    "bgnm,bgmk->bgnk",
    jax.nn.softmax(scores, axis=-1).astype(value.dtype),
    value,
    out_sharding=jax.typeof(query).sharding,
  )
  # The name makes remat="dots" store it (see `denoiser._KEPT`).
  return checkpoint_name(mixed, "attention")


@KERNELS.register("xla")
class XLA(Kernel):
  """`jax.nn.dot_product_attention`, compiled by XLA."""

  called = "XLA's own"

  def prepare(self, visibility: Visibility, q: Side, k: Side):
    """Returns the dense mask [B, 1, Q, K], shared by all heads."""
    return {"mask": dense(visibility, q, k)[:, None]}

  def attend(self, query, key, value, prepared):
    """Returns the attention output; see `Kernel.attend`."""
    return _by_jax(query, key, value, prepared, None)


@KERNELS.register("cudnn")
class CuDNN(Kernel):
  """`jax.nn.dot_product_attention` with cuDNN's flash attention, on a GPU.

  JAX's function takes no segment ids, so a visibility that row lengths can't
  express needs a dense mask.
  """

  called = "cuDNN's"
  needs = "gpu"

  def lacks(self, case: Case, place: Place) -> str | None:
    """Returns the first property that cuDNN does not support, or None."""
    # The limits are those of the kernel, its gradient and its mask together.
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
    """Returns the size of the dense mask, if one is needed."""
    if case.plain:
      return ""
    # JAX turns the boolean mask into a bias in the dtype of the queries.
    size = case.queries * case.keys * jnp.dtype(case.dtype).itemsize / 2**20
    return f"; its mask is dense, {size:.2f} MiB a row"

  def prepare(self, visibility: Visibility, q: Side, k: Side):
    """Returns row lengths where they suffice, else the dense mask."""
    plain = visibility.kind in ("full", "causal") and q.most_segments == 1
    if q is not k or not plain:
      return {"mask": dense(visibility, q, k)[:, None]}
    # A row of padding only counts as one token, whose output nobody reads.
    lengths = jnp.maximum((q.segments > 0).sum(axis=1), 1)
    return {
      "query_seq_lengths": lengths,
      "key_value_seq_lengths": lengths,
      "is_causal": visibility.kind == "causal",
    }

  def attend(self, query, key, value, prepared):
    """Returns the attention output; see `Kernel.attend`."""
    return _by_jax(query, key, value, prepared, "cudnn")


def parsed(capability: str | None) -> tuple[int, ...] | None:
  """Returns the parts of an NVIDIA compute capability; None for any other."""
  try:
    return tuple(int(part) for part in (capability or "").split("."))
  except ValueError:  # None, or an AMD architecture such as gfx90a
    return None


def _by_jax(query, key, value, prepared: dict[str, Any], kernel: str | None):
  """Calls `jax.nn.dot_product_attention`; kernel None is XLA's own."""
  attend = functools.partial(
    jax.nn.dot_product_attention, implementation=kernel
  )
  # JAX's function reshapes, where newer versions lose the sharding of a batch
  # of one row.
  return by_kernel(attend, query, key, value, prepared, always=kernel is None)


def by_kernel(
  kernel: Callable[..., Array],
  query: Float[Array, "B G R Q K"],
  key: Float[Array, "B G M K"],
  value: Float[Array, "B G M K"],
  prepared: dict[str, Any],
  always: bool = False,
) -> Float[Array, "B G R Q K"]:
  """Calls an attention function of [B, tokens, heads, K].

  Args:
    kernel: the function.
    query: as in `Kernel.attend`, like all others.
    key: keys.
    value: values.
    prepared: keyword arguments of the function: arrays by row, and flags.
    always: whether to run it by device on one device, too.
  """
  # It takes [B, tokens, heads, K], and groups query heads as we do.
  batch, groups, repeats, queries, size = query.shape
  heads = _reshape(query, batch, groups * repeats, queries, size)
  inputs = [jnp.swapaxes(x, 1, 2) for x in (heads, key, value)]
  # Arrays are arguments of the shard_map; flags such as is_causal are static.
  arrays = {k: v for k, v in prepared.items() if isinstance(v, jax.Array)}
  fixed = {k: v for k, v in prepared.items() if k not in arrays}

  def attend(query, key, value, arrays):
    return kernel(query, key, value, **arrays, **fixed)

  # On one device a kernel is called directly: there is nothing to split.
  if always or jax.sharding.get_abstract_mesh().size > 1:
    attend = by_device(attend, *inputs, arrays)
  result = attend(*inputs, arrays)
  return _reshape(jnp.swapaxes(result, 1, 2), *query.shape)


def by_device(
  attend: Callable[..., Array], *inputs: Any, check_vma: bool = True
) -> Callable[..., Array]:
  """Returns `attend` run by every device on its own rows and heads.

  A kernel call is not split over the mesh by itself.

  Args:
    attend: a function whose result has the shape of its first argument.
    *inputs: its arguments, or trees of them.
    check_vma: as in `jax.shard_map`.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return attend
  specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, inputs)
  return jax.shard_map(
    attend, in_specs=specs, out_specs=specs[0], check_vma=check_vma
  )


def _reshape(x: Array, *shape: int) -> Array:
  """Reshapes the axes behind batch and heads, which stay sharded.

  The sharding is explicit, as newer JAX versions lose that of a one-row batch.
  """
  old = jax.typeof(x).sharding
  spec = P(*old.spec[:2], *[None] * (len(shape) - 2))
  new = NamedSharding(old.mesh, spec)
  return jnp.reshape(x, shape, out_sharding=new)
