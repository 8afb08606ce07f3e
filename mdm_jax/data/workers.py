"""Passes over blocks in processes of this machine.

A worker ends when its pipe does: so none outlives the program for longer than a
block takes, however that dies. What a worker writes is whole or not there, so
it may be killed at any time.
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

# What went wrong, and the exit code that this has; or nothing.
Reply = tuple[str, int] | None


class Workers:
  """Processes that do passes over blocks, one block at a time each."""

  def __init__(self, count: int, poll: Callable[[], Any]):
    """Names their number; `poll` is called often, and may raise to stop."""
    self._poll = poll
    # A fork would share the threads' locks of JAX and of SentencePiece.
    context = multiprocessing.get_context("spawn")
    self._processes: dict[Connection, Any] = {}
    for _ in range(count):
      ours, theirs = context.Pipe()
      process = context.Process(target=_serve, args=(theirs,), daemon=True)
      process.start()
      theirs.close()
      self._processes[ours] = process

  def __enter__(self) -> "Workers":
    return self

  def __exit__(self, *_: Any) -> None:
    for connection, process in self._processes.items():
      process.terminate()
      connection.close()
    for process in self._processes.values():
      process.join()

  def run(
    self, name: Pass, job: Job, blocks: list[Block], done: Callable[[], Any]
  ) -> None:
    """Does a pass over blocks, and calls `done` after each.

    Raises:
      Failure: what a worker's block raised, or that a worker died.
    """
    left, idle, busy = list(reversed(blocks)), list(self._processes), set()
    while left or busy:
      while left and idle:
        busy.add(connection := idle.pop())
        connection.send((name, job, left.pop()))
      self._poll()
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
  """Does what comes through a pipe, until it is closed."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the program answers it
  while True:
    try:
      task = connection.recv()
    except (EOFError, OSError):
      return
    reply = _attempt(*task)
    try:
      connection.send(reply)
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
