"""JAX's splash attention: a flash kernel for TPUs that takes segment ids.

Scores exist in blocks in the TPU's own memory only, and no mask of all pairs
exists at all: a block's mask is computed from segment ids and from how far
ahead of itself a token attends.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mdm_jax.core.hardware import Place
from mdm_jax.model.context import Side, Visibility
from mdm_jax.model.kernels import KERNELS, Case, Kernel, by_device

_DTYPES = ("bfloat16", "float32")
# JAX tests these on TPUs. Others compile, too.
_HEADS = (64, 128, 256)
# The kernel's blocks are multiples of a TPU's vector width, and divide a row.
_LANES = 128
_BLOCK = 512
# Tokens times head size of the largest block of keys whose gradient fits the
# memory that libtpu gives to a kernel, in float32, on every kind of TPU.
_LARGEST = 2048 * 256
# More than the blocks of any row, and a divisor of what `context` adds to the
# label of a noisy block.
_BLOCKS = 2**16


@functools.cache
def _library() -> Any:
  """Returns JAX's module of the kernel; None if it has moved."""
  # Imported only where it is used: it is experimental, and for TPUs.
  try:
    from jax.experimental.pallas.ops.tpu import splash_attention
  except ImportError:
    return None
  return splash_attention


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prepared:
  """What `Splash.attend` reads.

  Attributes:
    segments: tokens attend to those with the same number [B, L].
    last: the last token of the row that a token may attend to [B, L]; None if
      `ahead` says it.
    ahead: how many tokens after itself a token attends to at most; None for
      all of its segment.
  """

  segments: Any
  last: Any = None
  ahead: int | None = dataclasses.field(default=None, metadata={"static": True})


@KERNELS.register("splash")
class Splash(Kernel):
  """Splash attention, on a TPU, without a mask in memory."""

  called = "splash attention"
  needs = "tpu"

  def lacks(self, case: Case, place: Place) -> str | None:
    """Returns the first property that the kernel does not support, or None."""
    kind = case.visibility.kind
    if place.backend != "tpu":
      return f"way to run on a {place.backend}"
    if case.dtype not in _DTYPES:
      return case.dtype
    if case.cache or case.queries != case.keys:
      return "cache of keys"
    if case.head not in _HEADS:
      return f"heads of {case.head}, only of 64, 128 and 256"
    if case.queries % _LANES:
      return f"rows of {case.queries} tokens, only multiples of {_LANES}"
    if _library() is None:
      return "module in this version of JAX"
    if kind in ("dual", "opening"):
      return f"visibility {kind}"
    if kind in ("causal", "blocks") and case.most_segments is None:
      # Where a text lies in its row is not known.
      return f"visibility {kind} of rows with any number of texts"
    return None

  def prepare(self, visibility: Visibility, q: Side, k: Side) -> Prepared:
    """Returns segments, and how far ahead a token attends."""
    del k  # the same as q
    kind, block = visibility.kind, visibility.block
    if kind == "causal":
      return Prepared(q.segments, ahead=0)
    if kind == "blocks" and block < q.segments.shape[1]:
      return Prepared(q.segments, _last_of_block(q), ahead=block - 1)
    if kind == "noisy":
      # Without a cache there are no clean tokens: each block is alone.
      return Prepared(q.segments * _BLOCKS + q.label % _BLOCKS)
    return Prepared(q.segments)

  def attend(self, query, key, value, prepared):
    """Returns the attention output; see `Kernel.attend`."""
    attend = jax.vmap(functools.partial(_attend_row, ahead=prepared.ahead))
    arrays = query, key, value, prepared.segments, prepared.last
    # Pallas does not say over which mesh axes its results vary.
    return by_device(attend, *arrays, check_vma=False)(*arrays)


def _last_of_block(side: Side) -> Int[Array, "B L"]:
  """Returns the index of the last token of each token's block."""
  length = side.segments.shape[1]
  differs = lambda x: x[:, 1:] != x[:, :-1]
  changes = differs(side.segments) | differs(side.label)
  ends = jnp.pad(changes, ((0, 0), (0, 1)), constant_values=True)
  # The next end from each token on.
  index = jnp.where(ends, jnp.arange(length)[None], length)
  return jax.lax.cummin(index, axis=1, reverse=True)


def _attend_row(
  query: Float[Array, "G R L K"],
  key: Float[Array, "G L K"],
  value: Float[Array, "G L K"],
  segments: Int[Array, "L"],
  last: Int[Array, "L"] | None,
  ahead: int | None,
) -> Float[Array, "G R L K"]:
  groups, repeats, length, size = query.shape
  kernel = _kernel(groups * repeats, length, size, ahead)
  if last is not None:
    _bound(kernel, last - ahead)
  # The kernel does not scale.
  heads = query.reshape(groups * repeats, length, size) * size**-0.5
  ids = _library().SegmentIds(segments, segments)
  return kernel(heads, key, value, segment_ids=ids).reshape(query.shape)


def _kernel(heads: int, length: int, size: int, ahead: int | None):
  library, shape = _library(), (length, length)
  if ahead is None:
    mask = library.FullMask(shape)
  else:
    mask = library.CausalMask(shape, offset=ahead)
  return library.make_splash_mha(
    library.MultiHeadMask([mask] * heads),
    block_sizes=_block_sizes(length, size, full=ahead is None),
    # This runs on one device's heads and rows.
    head_shards=1,
    q_seq_shards=1,
    # Output and log-sum are stored, not computed again (`denoiser._KEPT`).
    residual_checkpoint_name="attention",
  )


def _bound(kernel, q_sequence: Int[Array, "L"]) -> None:
  """Makes query i attend to keys up to q_sequence[i] + ahead, within `ahead`.

  The kernel computes a block's mask from the array q_sequence, by default 0, 1,
  ... L - 1, and leaves out blocks whose keys are all too far ahead by default.
  """
  for name in ("fwd_mask_info", "dq_mask_info", "dkv_mask_info"):
    info = getattr(kernel, name)
    if info is not None:
      setattr(kernel, name, info._replace(q_sequence=q_sequence))


def _block_sizes(length: int, size: int, full: bool):
  block = math.gcd(length, _BLOCK)
  sizes = {
    "block_q": block,
    "block_kv": block,
    "block_q_dkv": block,
    "block_kv_dkv": block,
  }
  if full and length * max(size, _LANES) <= _LARGEST:
    # One kernel computes all gradients, by five products instead of seven. It
    # returns a gradient of the queries for each block of keys, in their dtype:
    # with a single block nothing is summed up in bfloat16. Where blocks can be
    # left out, small ones are better.
    return _library().BlockSizes(
      **sizes | {"block_kv_dkv": length},
      block_kv_dkv_compute=block,
      use_fused_bwd_kernel=True,
    )
  return _library().BlockSizes(**sizes, block_q_dq=block, block_kv_dq=block)
