"""Goodput: the seconds of all causes add up to the time that passed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdm_jax.runtime import goodput
from mdm_jax.runtime.goodput import Cause, Ledger


class _Clock:
  """A clock that only moves when it is told to."""

  def __init__(self):
    self.now = 1000.0

  def __call__(self):
    return self.now


def _attempt(**fields):
  return {
    "seconds": {"train": 10.0, "init": 2.0},
    "started": 0.0,
    "beat": 12.0,
    "start": 0,
    "update": 10,
    "committed": 10,
    "ended": True,
  } | fields


CAUSES = st.sampled_from([c for c in Cause if c not in ("wasted", "down")])


@given(st.lists(st.tuples(CAUSES, st.integers(0, 50), st.booleans())))
def test_every_second_has_one_cause(parts):
  clock = _Clock()
  ledger, expected = Ledger(clock), dict.fromkeys(Cause, 0)
  for cause, seconds, nested in parts:
    with ledger.spend(cause):
      clock.now += seconds
      expected[cause] += seconds
      if nested:
        with ledger.spend(Cause.SAVE):
          clock.now += 3
          expected[Cause.SAVE] += 3
    clock.now += 1
    expected[Cause.INIT] += 1
  assert ledger.seconds() == expected
  assert sum(ledger.seconds().values()) == clock.now - 1000


def test_an_error_ends_what_it_was_spent_on():
  clock = _Clock()
  ledger = Ledger(clock)
  with pytest.raises(ValueError), ledger.spend(Cause.EVAL):
    clock.now += 2
    raise ValueError
  clock.now += 5
  assert ledger.seconds()["eval"] == 2 and ledger.seconds()["init"] == 5


def test_the_time_between_attempts_is_down_time():
  first, second = _attempt(), _attempt(started=20.0, beat=32.0, start=10)
  second["update"] = second["committed"] = 20
  seconds = goodput.total([first, second])
  assert seconds["down"] == 8 and seconds["train"] == 20
  assert sum(seconds.values()) == 32  # from the first start to the last beat
  assert goodput.goodput(seconds) == 20 / 32


def test_updates_that_were_not_saved_are_wasted():
  seconds = goodput.total([_attempt(committed=4)])
  assert seconds["wasted"] == 6 and seconds["train"] == 4
  assert sum(seconds.values()) == 12
  # What is running has lost nothing yet.
  assert goodput.total([_attempt(committed=4, ended=False)])["wasted"] == 0
