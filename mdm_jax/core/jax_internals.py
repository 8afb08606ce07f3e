"""All uses of JAX's private API.

They are its distributed state, its cluster detection and the arguments of its
cuDNN attention. No other module may import `jax._src`. If a version of JAX
lacks one of the first two, single-process programs still work, and `missing`
says what doesn't; without the third, attention takes a dense mask.
"""

import functools
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

Cluster = tuple[str, int, int, list[int] | None]
_PACKED_MASKS = "PADDING", "PADDING_CAUSAL"
_PACKED_ARGUMENTS = "q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets"
_FIELDS = ("client", "num_processes", "process_id", "coordinator_address")


def missing() -> list[str]:
  """Returns what this version of JAX lacks, with the consequence of each."""
  lost = []
  if _state() is None:
    lost.append("the coordination service, so there can be only one process")
  elif _search() is None:
    lost.append(
      "cluster detection, so several processes need --coordinator,"
      " --num_processes and --process_id"
    )
  return lost


def can_join() -> bool:
  """Returns whether multi-process programs are possible."""
  return _state() is not None


def joined() -> Any | None:
  """Returns the state of JAX's distributed runtime, or None if not joined.

  Its `client` talks to the coordination service; Orbax uses the same one.
  """
  state = _state()
  return state if state is not None and state.client else None


def find_cluster(seconds: int) -> Cluster | None:
  """Returns the cluster that `jax.distributed.initialize` would detect.

  Args:
    seconds: timeout of the detection.

  Returns:
    The coordinator's address, the number of processes, the index of this one
    and its local device ids; None if there is no cluster.

  Raises:
    Exception: whatever JAX raises for a cluster that it can't read.
  """
  search = _search()
  if search is None:
    return None
  # None for everything that the user could give: detect all of it.
  found = search(None, None, None, None, None, seconds)
  return None if found[0] is None else found


@functools.cache
def packed_attention() -> Callable[..., Any] | None:
  """Returns cuDNN's attention over rows of several segments, if JAX has it.

  Returns:
    A function of query, key and value [B, L, H, K], the segments' lengths
    [B, M] and offsets [B, M + 1] (-1 where there is none), and whether it is
    causal.
  """
  module = "cudnn.fused_attention_stablehlo"
  attend = _private(f"{module}:dot_product_attention")
  padded, causal_too = (
    _private(f"{module}:MaskType.{name}") for name in _PACKED_MASKS
  )
  if attend is None or padded is None or causal_too is None:
    return None
  if not {*_PACKED_ARGUMENTS} <= {*inspect.signature(attend).parameters}:
    return None

  def run(query, key, value, lengths, offsets, causal: bool):
    return attend(
      *(query, key, value),
      **dict(
        zip(
          _PACKED_ARGUMENTS, (lengths, lengths, offsets, offsets), strict=True
        )
      ),
      scale=query.shape[-1] ** -0.5,
      mask_type=causal_too if causal else padded,
    )

  return run


@functools.cache
def _state() -> Any | None:
  state = _private("distributed:global_state")
  return state if all(hasattr(state, name) for name in _FIELDS) else None


@functools.cache
def _search() -> Callable[..., Cluster] | None:
  name = "clusters:ClusterEnv.auto_detect_unset_distributed_params"
  return _private(name)


def _private(name: str) -> Any | None:
  try:
    return pkgutil.resolve_name(f"jax._src.{name}")
  except (ImportError, AttributeError):
    return None
