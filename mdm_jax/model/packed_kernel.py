"""cuDNN's attention over rows that hold several texts, without a mask.

A dense mask takes cuDNN's kernel time, and scores between texts are computed
for nothing. Given the texts' offsets, it computes each text's scores only. It
is used where `model.attention=cudnn_packed` says so (docs/performance.md).
"""

import jax.numpy as jnp
from jaxtyping import Array, Int

from mdm_jax.core import jax_internals
from mdm_jax.model.context import Side, Visibility, starts
from mdm_jax.model.kernels import KERNELS, Case, CuDNN, Place, by_kernel, parsed

_LEAST_CAPABILITY = (9, 0)
# On an H100 it took longer than with a mask for 16 texts of 32 tokens, less for
# 16 texts of 64.
_TOKENS_A_SEGMENT = 64


@KERNELS.register("cudnn_packed")
class CuDNNPacked(CuDNN):
  """cuDNN's flash attention of rows of several texts, given their offsets."""

  called = "cuDNN's for packed rows"

  def lacks(self, case: Case, place: Place) -> str | None:
    """Returns the first property that this form does not support, or None."""
    lacking = super().lacks(case, place)
    if lacking:
      return lacking
    if parsed(place.capability) < _LEAST_CAPABILITY:
      return f"way to run on a GPU of compute capability {place.capability}"
    if case.visibility.kind not in ("full", "causal"):
      return f"visibility {case.visibility.kind}"
    if case.cache or case.queries != case.keys:
      return "cache of keys"
    most = case.queries // _TOKENS_A_SEGMENT
    if case.most_segments is None or case.most_segments + 1 > most:
      return f"rows of up to {case.most_segments or 'any number of'} texts"
    if case.most_segments == 1:
      return "use for rows of one text"
    if jax_internals.packed_attention() is None:
      return "entry in this version of JAX"
    return None

  def remark(self, case: Case) -> str:
    """Returns "": there is no mask."""
    return ""

  def prepare(self, visibility: Visibility, q: Side, k: Side):
    """Returns the segments' lengths [B, M] and offsets [B, M + 1]."""
    lengths, offsets = spans(q.segments, q.most_segments)
    causal = visibility.kind == "causal"
    return {"lengths": lengths, "offsets": offsets, "causal": causal}

  def attend(self, query, key, value, prepared):
    """Returns the attention output; see `Kernel.attend`."""
    return by_kernel(
      jax_internals.packed_attention(), query, key, value, prepared
    )


def spans(
  segments: Int[Array, "B L"], most_segments: int
) -> tuple[Int[Array, "B M"], Int[Array, "B M+1"]]:
  """Returns the lengths and offsets of a row's segments; -1 where none is.

  Padding is one more segment, so that every position gets an output: what cuDNN
  leaves in the others is undefined, and 0 times NaN is NaN.

  Args:
    segments: segment of each position, 0 for the padding at the end.
    most_segments: M - 1.
  """
  count = most_segments + 1
  index = jnp.cumsum(starts(segments), axis=1) - 1
  numbers = jnp.arange(count)
  lengths = (index[:, :, None] == numbers[None, None]).sum(axis=1)
  ends = jnp.cumsum(lengths, axis=1)
  offsets = jnp.pad(ends, ((0, 0), (1, 0)))
  used = numbers[None] < index[:, -1:] + 1
  known = jnp.pad(used, ((0, 0), (1, 0)), constant_values=True)
  missing = lambda there, x: jnp.where(there, x, -1).astype(jnp.int32)
  return missing(used, lengths), missing(known, offsets)
