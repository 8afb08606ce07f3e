"""What has no public name in JAX: only this module may reach behind them.

Both things are looked for once. Where a version of JAX has one no more, a
program of one process goes on without it, and `missing` says what is lost.
"""

import functools
from collections.abc import Callable
from typing import Any

Cluster = tuple[str, int, int, list[int] | None]
_FIELDS = ("client", "num_processes", "process_id", "coordinator_address")


def missing() -> list[str]:
  """Returns what this JAX does not have, and what follows; [] if nothing."""
  lost = []
  if _state() is None:
    lost.append("its coordination service: there can be only one process")
  elif _search() is None:
    lost.append(
      "its search for clusters: several processes need --coordinator,"
      " --num_processes and --process_id"
    )
  return lost


def can_join() -> bool:
  """Returns whether there can be several processes."""
  return _state() is not None


def joined() -> Any | None:
  """Returns the state of JAX's distributed runtime, None for one process.

  Its `client` talks to the coordination service, as Orbax's does.
  """
  state = _state()
  return state if state is not None and state.client else None


def find_cluster(seconds: int) -> Cluster | None:
  """Returns what `jax.distributed.initialize` would find, if anything.

  That is the coordinator's address, the number of processes, this one's, and
  its devices. It raises what the kind of cluster does that can't be read.
  """
  search = _search()
  if search is None:
    return None
  found = search(None, None, None, None, None, seconds)
  return None if found[0] is None else found


@functools.cache
def _state() -> Any | None:
  try:
    from jax._src import distributed

    state = distributed.global_state
  except (ImportError, AttributeError):
    return None
  return state if all(hasattr(state, name) for name in _FIELDS) else None


@functools.cache
def _search() -> Callable[..., Cluster] | None:
  try:
    from jax._src import clusters

    return clusters.ClusterEnv.auto_detect_unset_distributed_params
  except (ImportError, AttributeError):
    return None
