"""Reading ahead: the order, the bound, errors, and the end."""

import threading

import pytest

from mdm_jax.core.errors import UserError
from mdm_jax.training.read_ahead import AHEAD, ReadAhead

LIMIT = 20  # seconds, so that a test fails rather than hangs


def test_items_come_in_order_and_no_more_than_the_bound_are_held():
  started, taken = [], []

  def read(number):
    started.append(number)
    return number * number

  numbers = [3, 4, 7, 8, 11, 12]
  with ReadAhead(read, numbers) as ahead:
    for _ in numbers:
      # Done once all that was requested so far is done.
      ahead._thread.submit(int).result(LIMIT)
      assert len(started) == min(len(taken) + AHEAD, len(numbers))
      taken.append(ahead.take())
      ahead.read_next()
  assert taken == [9, 16, 49, 64, 121, 144] and started == numbers


def test_an_error_comes_with_the_item_it_belongs_to():
  def read(number):
    if number == 2:
      raise UserError("the row files are gone")
    return number

  with ReadAhead(read, range(9)) as ahead:
    for number in range(2):
      assert ahead.take() == number
      ahead.read_next()
    with pytest.raises(UserError, match="^the row files are gone$"):
      ahead.take()


def test_leaving_does_not_wait_for_a_read_that_hangs():
  hanging, go_on, read = threading.Event(), threading.Event(), []

  def hang(number):
    hanging.set()
    read.append((number, go_on.wait(LIMIT)))

  with ReadAhead(hang, range(9)) as ahead:
    assert hanging.wait(LIMIT)
  # Here, while it still hangs; what was not begun never is.
  go_on.set()
  ahead._thread.shutdown(wait=True)
  assert read == [(0, True)]
