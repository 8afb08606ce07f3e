"""Multi-process programs: joining, exchanging small values, naming lost peers.

Every process runs the same program with the same arguments. Arrays are global;
small values are exchanged through JAX's coordination service, which runs in
process 0. It needs no device, and it can tell which process is missing.
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
from mdm_jax.core.errors import (
  Aborted,
  Exit,
  Failure,
  UserError,
  first_line,
)

# Waits need no short timeout: if a process dies, its missing heartbeat ends all
# others; if one hangs, the watchdog does.
_LONG_MS = 24 * 3600 * 1000
_TICK = 0.1  # seconds to wait for a value that should be there already
_ANSWER = 2.0  # extra seconds for the coordinator to answer
_HOSTS, _ROLL = "mdm_jax/host/", "mdm_jax/roll/"

T = TypeVar("T")
# Numbers the exchanges: all processes make them in the same order, so equal
# numbers are the same exchange.
_numbers = itertools.count()


# MARK: joining


def initialize(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  initialization_timeout: int = 300,
  heartbeat_timeout: int = 100,
) -> bool:
  """Joins the other processes of a multi-process run.

  Call it before anything asks JAX for a device. Without arguments JAX detects
  the cluster on TPUs, Slurm, Open MPI or Kubernetes; without one, this is a
  single process and nothing is joined. If the other processes don't appear in
  time, JAX aborts this one (SIGABRT).

  Args:
    coordinator: HOST:PORT of process 0.
    num_processes: number of processes; 1 alone turns the detection off.
    process_id: index of this process, from 0.
    initialization_timeout: seconds to wait for all processes.
    heartbeat_timeout: seconds of silence after which a process counts as gone.

  Returns:
    Whether there are other processes.

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
      f"--process_id={process_id}: with --num_processes={num_processes} it"
      f" must be from 0 to {num_processes - 1}"
    )
  return coordinator, num_processes, process_id, None


def _found(seconds: int) -> jax_internals.Cluster | None:
  """Returns the cluster that JAX detects in the environment, if any."""
  try:
    return jax_internals.find_cluster(seconds)
  except Exception as error:  # each kind of cluster raises its own
    raise UserError(
      f"this seems to be a cluster, but JAX can't read it: {error}; give"
      " --coordinator, --num_processes and --process_id, or --num_processes=1"
    ) from error


def _join(cluster: jax_internals.Cluster, seconds: int, heartbeat: int) -> None:
  address, number, own, devices = cluster
  # Print the advice first: on a timeout JAX aborts inside the call.
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
    raise UserError(f"coordinator {address}: {first_line(error)}") from error
  # For `missing_peers`, which names the hosts of lost processes.
  _client().key_value_set(f"{_HOSTS}{own}", socket.gethostname())


# MARK: processes


def count() -> int:
  """Returns the number of processes, without initializing a backend."""
  runtime = jax_internals.joined()
  return runtime.num_processes if runtime else 1


def index() -> int:
  """Returns the index of this process, without initializing a backend."""
  runtime = jax_internals.joined()
  return runtime.process_id if runtime else 0


def is_first() -> bool:
  """Returns whether this is process 0, the one that writes and prints."""
  return index() == 0


def missing_peers(timeout_seconds: float) -> str | None:
  """Returns which processes don't respond, for a message; None if all do.

  A process responds by calling this function too. It may be called from any
  thread. Only the first call means something: a process that has called it
  counts as alive from then on.

  Args:
    timeout_seconds: seconds to wait for the others. The call takes only a
      little longer, even if process 0 does not answer.
  """
  if count() == 1:
    return None
  missing: list[str | None] = [
    f"process 0 ({jax_internals.joined().coordinator_address}) does not answer"
  ]

  def ask() -> None:
    missing[0] = _call_the_roll(timeout_seconds)

  # In a thread that can be abandoned: a request to a dead process 0 may hang.
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
  """Returns a value of the coordination service, or None after a timeout.

  Of the client's methods, this one releases the interpreter's lock.
  """
  try:
    return _client().blocking_key_value_get(name, int(seconds * 1000))
  except jax.errors.JaxRuntimeError:
    return None


def _client() -> Any:
  return jax_internals.joined().client


# MARK: exchanges


def broadcast(value: Any) -> Any:
  """Returns process 0's value on all processes.

  Like `agree` and `first_alone` it is a collective operation: all processes
  must call them in the same order, from their main threads.

  Args:
    value: a small JSON value; only process 0's matters.
  """
  if count() == 1:
    return value
  name = f"mdm_jax/broadcast/{next(_numbers)}"
  if is_first():
    _client().key_value_set(name, json.dumps(value))
    return value
  return json.loads(_client().blocking_key_value_get(name, _LONG_MS))


def agree(name: str, value: Any) -> None:
  """Checks that all processes have the same value; a barrier.

  Args:
    name: what the value is, for the message.
    value: a small JSON value; pass the hash of a large one.

  Raises:
    UserError: values differ; raised on all processes.
  """
  if count() == 1:
    return
  own, folder = json.dumps(value), f"mdm_jax/agree/{next(_numbers)}/"
  _client().key_value_set(f"{folder}{index()}", own)
  message = None
  if is_first():
    get = lambda i: _client().blocking_key_value_get(f"{folder}{i}", _LONG_MS)
    message = _difference(name, [get(i) for i in range(count())])
  message = broadcast(message)
  if message is not None:
    raise UserError(message)


def _difference(name: str, values: list[str]) -> str | None:
  others = [i for i, value in enumerate(values) if value != values[0]]
  if not others:
    return None
  return (
    f"{name} differs between processes: {values[0]} in process 0, but"
    f" {values[others[0]]} in process {', '.join(map(str, others))}"
  )


def first_alone(function: Callable[[], T]) -> T:
  """Calls a function in process 0 first, then in the others.

  So process 0 can write what the others then read from a shared disk.

  Returns:
    The result of this process's call.

  Raises:
    Failure: process 0's call raised it; raised on all processes, since the
      others would wait forever.
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
  """Names lost processes if a collective fails in the block.

  JAX's own error only mentions a broken connection.

  Args:
    seconds: how long the other processes have to respond.

  Raises:
    Aborted: a JAX error occurred, and another process does not respond.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    missing = missing_peers(seconds)
    if missing is None:  # all respond: it is some other error
      raise
    raise Aborted(f"{missing}: {first_line(error)}") from error


def fetch(tree: Any) -> Any:
  """Returns a tree of arrays as NumPy arrays, gathered on every process."""
  if count() == 1:
    return jax.device_get(tree)
  return multihost_utils.process_allgather(tree, tiled=True)


def leave(code: int) -> None:
  """Exits at once after a failure; with a single process, just returns.

  A normal exit would block: JAX waits minutes for the other processes, which
  may be waiting for this one in a collective. Without that wait they are ended
  by the missing heartbeat. So don't call this when all processes exit together:
  the others would be aborted.
  """
  if count() == 1:
    return
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)
