"""Worker processes that run passes over blocks on this machine.

Workers write files atomically, so they may be killed at any time. They end with
the main program, however it dies.
"""

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from mdm_jax.core.errors import Aborted, Exit
from mdm_jax.data import passes
from mdm_jax.data.blocks import Block
from mdm_jax.data.passes import Job, Pass

_TICK = 0.2  # seconds between polls


class Workers:
  """A pool of processes, each of which works on one block at a time."""

  def __init__(self, count: int, poll: Callable[[], Any]):
    """Sets up the pool; processes start with the first blocks.

    Args:
      count: number of processes.
      poll: called several times a second while `run` waits; raises to stop.
    """
    self._poll = poll
    # Children of the program that are not ours to terminate.
    self._others = set(multiprocessing.active_children())
    # Forked children would inherit locks held by threads of JAX and
    # SentencePiece.
    context = multiprocessing.get_context("spawn")
    self._pool = concurrent.futures.ProcessPoolExecutor(
      count, context, initializer=_start
    )

  def __enter__(self) -> "Workers":
    return self

  def __exit__(self, *_: Any) -> None:
    # Without waiting for the blocks under way, which may take minutes.
    self._pool.shutdown(wait=False, cancel_futures=True)
    for process in {*multiprocessing.active_children()} - self._others:
      process.terminate()

  def run(
    self, name: Pass, job: Job, blocks: list[Block], done: Callable[[], Any]
  ) -> None:
    """Runs a pass over blocks and calls `done` after each.

    Raises:
      Failure: what a pass raised in a worker.
      Aborted: a worker died.
    """
    try:
      left = {self._pool.submit(passes.run, name, job, b) for b in blocks}
      while left:
        self._poll()
        # With a timeout, so that `poll` runs even while all blocks are slow.
        finished, left = concurrent.futures.wait(
          left, _TICK, concurrent.futures.FIRST_COMPLETED
        )
        for future in finished:
          future.result()
          done()
    except BrokenProcessPool as error:
      raise Aborted(
        "a worker died, perhaps for lack of memory: fewer --workers need less;"
        " the same command resumes"
      ) from error


def _start() -> None:
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main program handles it
  threading.Thread(target=_end_with_main_program, daemon=True).start()


def _end_with_main_program() -> None:
  # A worker waiting for its next block would never notice a killed program.
  multiprocessing.parent_process().join()
  os._exit(Exit.ABORTED)
