"""Several processes as one program, on JAX's own distributed runtime.

Every process runs the same program with the same arguments. Arrays are theirs
together; what is small and plain goes through the coordination service, which
process 0 holds: that needs no device, and can tell who is missing.
"""

import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
from absl import logging
from jax.experimental import multihost_utils

from mdm_jax.core import jax_internals
from mdm_jax.core.errors import Aborted, Exit, Failure, UserError

# A process that is gone ends all others by its missing heartbeat, one that is
# stuck by the watchdog; so whoever waits here need not give up early.
_LONG_MS = 24 * 3600 * 1000
_TICK = 0.1
_ANSWER = 2.0  # seconds the coordinator has for an answer
_HOSTS, _ROLL = "mdm_jax/host/", "mdm_jax/roll/"

T = TypeVar("T")
_numbers = itertools.count()  # of exchanges: all processes do the same ones


# MARK: joining


def initialize(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  initialization_timeout: int = 300,
  heartbeat_timeout: int = 100,
) -> bool:
  """Joins the other processes, and returns whether there are any.

  Call it before anything else asks JAX for a device. What is not given is
  found by JAX on a TPU, Slurm, Open MPI or Kubernetes; a program of one process
  joins nothing. If the others don't come, JAX ends the process by SIGABRT.

  Args:
    coordinator: address and port of process 0.
    num_processes: how many there are; 1 alone switches the search off.
    process_id: the number of this one, from 0.
    initialization_timeout: seconds until all have come.
    heartbeat_timeout: seconds after which a silent process counts as gone.

  Raises:
    UserError: the arguments don't fit together, or the port is taken.
  """
  given = coordinator, num_processes, process_id
  if given == (None, 1, None):
    return False
  lost = jax_internals.missing()
  if lost:
    logging.warning("JAX %s lacks %s.", jax.__version__, "; ".join(lost))
  if given == (None, None, None):
    cluster = _found(initialization_timeout)
  else:
    cluster = _checked(*given)
  if cluster is None or cluster[1] == 1:
    return False
  if lost and not jax_internals.can_join():
    raise UserError(
      f"JAX {jax.__version__}: several processes need a version that"
      " mdm_jax knows; nearest valid: --num_processes=1"
    )
  _join(cluster, initialization_timeout, heartbeat_timeout)
  return True


def _checked(
  coordinator: str | None, num_processes: int | None, process_id: int | None
) -> jax_internals.Cluster:
  given = {
    "--coordinator": coordinator,
    "--num_processes": num_processes,
    "--process_id": process_id,
  }
  missing = [name for name, value in given.items() if value is None]
  if missing:
    raise UserError(
      f"{' and '.join(missing)}: not given; several processes need all of"
      f" {', '.join(given)}, or none where JAX finds them itself"
    )
  if not coordinator.rpartition(":")[2].isdigit() or coordinator[0] == ":":
    raise UserError(f"--coordinator={coordinator}: write it as HOST:PORT")
  if not 0 <= process_id < num_processes:
    raise UserError(
      f"--process_id={process_id}: with --num_processes={num_processes} it goes"
      f" from 0 to {num_processes - 1}"
    )
  return coordinator, num_processes, process_id, None


def _found(seconds: int) -> jax_internals.Cluster | None:
  """Returns what JAX finds in the environment: what `initialize()` would."""
  try:
    return jax_internals.find_cluster(seconds)
  except Exception as error:  # each kind of cluster has its own
    raise UserError(
      f"this seems to be a cluster, but JAX can't read it: {error}; give"
      " --coordinator, --num_processes and --process_id, or --num_processes=1"
    ) from error


def _join(cluster: jax_internals.Cluster, seconds: int, heartbeat: int) -> None:
  address, number, own, devices = cluster
  # Before the call: if it fails, JAX aborts, and nothing can be told any more.
  print(
    f"process {own} of {number}: joining the coordinator at {address}; aborts"
    f" (exit code {Exit.ABORTED.value}) after {seconds} s. If it hangs: process"
    " 0 or another one was not started, they were given another address or"
    " number, the port is closed or taken, or a proxy is set",
    flush=True,
  )
  try:
    jax.distributed.initialize(
      address,
      number,
      own,
      local_device_ids=devices,
      initialization_timeout=seconds,
      heartbeat_timeout_seconds=heartbeat,
    )
  except jax.errors.JaxRuntimeError as error:
    reason = str(error).splitlines()[0]
    raise UserError(f"coordinator {address}: {reason}") from error
  _client().key_value_set(f"{_HOSTS}{own}", socket.gethostname())


# MARK: who is there


def count() -> int:
  """Returns the number of processes; asks for no device."""
  runtime = jax_internals.joined()
  return runtime.num_processes if runtime else 1


def index() -> int:
  """Returns the number of this process, from 0; asks for no device."""
  runtime = jax_internals.joined()
  return runtime.process_id if runtime else 0


def is_first() -> bool:
  """Returns whether this is process 0: the one that writes and prints."""
  return index() == 0


def missing_peers(timeout_seconds: float) -> str | None:
  """Names the processes that don't call this too, within some seconds.

  It may be called from any thread, and blocks for little longer than that,
  also where process 0 does not answer. It tells once: a process that called it
  counts as there from then on.
  """
  if count() == 1:
    return None
  missing: list[str | None] = [
    f"process 0 ({jax_internals.joined().coordinator_address}) does not answer"
  ]

  def ask() -> None:
    missing[0] = _call_the_roll(timeout_seconds)

  asking = threading.Thread(target=ask, name="roll", daemon=True)
  asking.start()
  asking.join(timeout_seconds + _ANSWER)
  return missing[0]


def _call_the_roll(seconds: float) -> str | None:
  until = time.monotonic() + seconds
  _client().key_value_set(f"{_ROLL}{index()}", "here", allow_overwrite=True)
  missing = []
  for i in range(count()):
    left = max(until - time.monotonic(), _TICK)
    if _wait_for(f"{_ROLL}{i}", left) is None:
      missing.append(f"{i} ({_wait_for(f'{_HOSTS}{i}', _TICK)})")
  return f"no sign of process {', '.join(missing)}" if missing else None


def _wait_for(name: str, seconds: float) -> str | None:
  """Returns a value of the service, or None if it does not come in time.

  Of the client's ways to ask, this one lets other threads run meanwhile.
  """
  try:
    return _client().blocking_key_value_get(name, int(seconds * 1000))
  except jax.errors.JaxRuntimeError:
    return None


def _client() -> Any:
  return jax_internals.joined().client


# MARK: one value for all


def broadcast(value: Any) -> Any:
  """Returns process 0's value: anything small that JSON can hold.

  All processes have to call it, from their main threads and in the same order
  as every other exchange: `agree` and `first_alone` are such.
  """
  if count() == 1:
    return value
  name = f"mdm_jax/broadcast/{next(_numbers)}"
  if is_first():
    _client().key_value_set(name, json.dumps(value))
    return value
  return json.loads(_client().blocking_key_value_get(name, _LONG_MS))


def agree(name: str, value: Any) -> None:
  """Checks that all processes have the same small value, and waits for them.

  Args:
    name: of the value, for the error.
    value: anything that JSON can hold; of something large, its hash.

  Raises:
    UserError: on all processes, if they differ.
  """
  if count() == 1:
    return
  own, folder = json.dumps(value), f"mdm_jax/agree/{next(_numbers)}/"
  _client().key_value_set(f"{folder}{index()}", own)
  told = None
  if is_first():
    get = lambda i: _client().blocking_key_value_get(f"{folder}{i}", _LONG_MS)
    told = _difference(name, [get(i) for i in range(count())])
  told = broadcast(told)
  if told is not None:
    raise UserError(told)


def _difference(name: str, values: list[str]) -> str | None:
  others = [i for i, value in enumerate(values) if value != values[0]]
  if not others:
    return None
  return (
    f"{name} differs between processes: {values[0]} in process 0, but"
    f" {values[others[0]]} in process {', '.join(map(str, others))}"
  )


def first_alone(function: Callable[[], T]) -> T:
  """Calls a function in process 0, and only when it is done in the others.

  What process 0 has put on a disk that all see, the others find there.

  Raises:
    Failure: what process 0's call raised, on all processes.
  """
  if is_first():
    try:
      result = function()
    except Failure as error:
      broadcast([str(error), error.code])
      raise
    broadcast(None)
    return result
  failed = broadcast(None)
  if failed is not None:
    failure = Failure(f"process 0: {failed[0]}")
    failure.code = Exit(failed[1])
    raise failure
  return function()


@contextlib.contextmanager
def naming_peers(seconds: float) -> Iterator[None]:
  """Tells who is gone, where the runtime only tells of a connection.

  Args:
    seconds: that the others have to say that they are there.

  Raises:
    Aborted: the block failed, and another process does not answer.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    missing = missing_peers(seconds)
    if missing is None:
      raise
    raise Aborted(f"{missing}: {str(error).splitlines()[0]}") from error


def fetch(tree: Any) -> Any:
  """Returns arrays as NumPy's, whole on every process, however they lie."""
  if count() == 1:
    return jax.device_get(tree)
  return multihost_utils.process_allgather(tree, tiled=True)


def leave(code: int) -> None:
  """Ends a process that failed; returns where there is only one.

  At a normal exit JAX waits some minutes for the others, who may be waiting in
  a collective for this one. Without it they end by its missing heartbeat; so
  this is not for an end that all come to, or it would end badly for the rest.
  """
  if count() == 1:
    return
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)
