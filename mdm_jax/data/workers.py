"""Worker processes that run passes over blocks on this machine.

A worker exits when its pipe closes, so however the main program dies, no worker
outlives it by more than one block. Workers write files atomically, so they may
be killed at any time.
"""

import multiprocessing
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from mdm_jax.core.errors import Aborted, Exit, Failure
from mdm_jax.data import passes
from mdm_jax.data.blocks import Block
from mdm_jax.data.passes import Job, Pass

_TICK = 0.2  # seconds between polls

# An error message and exit code; None if the pass succeeded.
Reply = tuple[str, int] | None


class Workers:
  """A pool of processes, each of which works on one block at a time."""

  def __init__(self, count: int, poll: Callable[[], Any]):
    """Starts the processes.

    Args:
      count: number of processes.
      poll: called several times a second while `run` waits; raises to stop.
    """
    self._poll = poll
    # Forked children would inherit locks held by threads of JAX and
    # SentencePiece.
    context = multiprocessing.get_context("spawn")
    self._processes: dict[Connection, Any] = {}
    for _ in range(count):
      ours, theirs = context.Pipe()
      process = context.Process(target=_serve, args=(theirs,), daemon=True)
      process.start()
      # Our copy of the worker's end would hide its death: no EOFError on recv.
      theirs.close()
      self._processes[ours] = process

  def __enter__(self) -> "Workers":
    return self

  def __exit__(self, *_: Any) -> None:
    # Terminate all before waiting for any.
    for connection, process in self._processes.items():
      process.terminate()
      connection.close()
    for process in self._processes.values():
      process.join()

  def run(
    self, name: Pass, job: Job, blocks: list[Block], done: Callable[[], Any]
  ) -> None:
    """Runs a pass over blocks and calls `done` after each.

    Raises:
      Failure: what a pass raised in a worker.
      Aborted: a worker died.
    """
    # Reversed, because `pop` takes from the end.
    left, idle, busy = list(reversed(blocks)), list(self._processes), set()
    while left or busy:
      while left and idle:
        busy.add(connection := idle.pop())
        connection.send((name, job, left.pop()))
      self._poll()
      # With a timeout, so that `poll` runs even while all blocks are slow.
      for connection in wait(list(busy), _TICK):
        self._receive(connection)
        busy.remove(connection)
        idle.append(connection)
        done()

  def _receive(self, connection: Connection) -> None:
    try:
      reply: Reply = connection.recv()
    except (EOFError, OSError):
      process = self._processes[connection]
      process.join()
      raise Aborted(
        f"a worker died (exit code {process.exitcode}), maybe for want of"
        " memory: fewer --workers need less; the same command goes on"
      ) from None
    if reply is not None:
      failure = Failure(reply[0])
      failure.code = Exit(reply[1])
      raise failure


def _serve(connection: Connection) -> None:
  """Runs the passes that arrive on a pipe, until the pipe is closed."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main one handles it
  while True:
    try:
      task = connection.recv()
    except (EOFError, OSError):
      return
    reply = _attempt(*task)
    try:
      connection.send(reply)
    # The main program is gone; there is nobody to tell.
    except OSError:
      return


def _attempt(name: Pass, job: Job, block: Block) -> Reply:
  try:
    passes.run(name, job, block)
  except Failure as failure:
    return str(failure), int(failure.code)
  except Exception:
    return traceback.format_exc(), int(Exit.BUG)
  return None
