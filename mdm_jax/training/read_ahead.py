"""Reads the rows of coming updates in the background, before they are needed.

A batch follows from the number of its update alone, so reading it early changes
no number: nothing of what was read ahead is saved, and a resumed run reads it
again.
"""

import collections
import contextlib
from collections.abc import Callable, Iterable
from concurrent import futures
from typing import Any, Generic, TypeVar

import jax

from mdm_jax.training.trainer import Trainer

# Batches that are ready or being read beside the one in use. The second one
# lets a slow read (a page that is not in memory) take up to two updates.
AHEAD = 2

Read = TypeVar("Read")


class ReadAhead(contextlib.AbstractContextManager, Generic[Read]):
  """Reads a known sequence of items in a background thread, in its order.

  At most `AHEAD` items are held or being read at any time. Leaving the context
  drops them; it does not wait for a read that hangs.

  Args:
    read: reads one item, given its number.
    numbers: of the items, in the order in which they will be taken.
  """

  def __init__(self, read: Callable[[int], Read], numbers: Iterable[int]):
    # One thread: items of several would compete for the same disk and cores.
    self._thread = futures.ThreadPoolExecutor(1, "read_ahead")
    self._read, self._numbers = read, iter(numbers)
    self._ahead: collections.deque[futures.Future] = collections.deque()
    for _ in range(AHEAD):
      self.read_next()

  def take(self) -> Read:
    """Returns the next item, waiting for it if necessary.

    Raises:
      Exception: what `read` raised for this item.
    """
    return self._ahead.popleft().result()

  def read_next(self) -> None:
    """Starts reading one more item, if one is left.

    Not part of `take`: the reader would compete for the interpreter with the
    thread that has just got its rows, and delay the dispatch of its update.
    """
    for number in self._numbers:
      self._ahead.append(self._thread.submit(self._read, number))
      return

  def __exit__(self, *_: Any) -> None:
    self._thread.shutdown(wait=False, cancel_futures=True)


def read_ahead(trainer: Trainer, updates: Iterable[int]) -> ReadAhead:
  """Returns the batches of a run's updates, placed on its devices ahead.

  Args:
    trainer: reads them.
    updates: the updates that will read rows, in order.
  """

  def read(update: int):
    # The mesh is set per thread.
    with jax.set_mesh(trainer.mesh):
      return trainer.batch(trainer.curriculum.stage_at(update), update)

  return ReadAhead(read, updates)
