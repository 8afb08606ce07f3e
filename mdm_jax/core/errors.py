"""How a program ends: exit codes, and the errors that lead to them."""

import difflib
import enum
from collections.abc import Iterable


class Exit(enum.IntEnum):
  """Exit codes, so that a scheduler knows what to start again.

  The names of the members are what docs/reliability.md lists.
  """

  DONE = 0  # all is done, or was done before
  BUG = 1  # an error of this library: the traceback is last
  USER = 2  # a flag, a config, data, a tokenizer or a checkpoint is wrong
  NUMERICS = 3  # losses or gradients stayed without a finite value
  STORAGE = 4  # can't be written or read, full, or damaged with no fallback
  CRASH_LOOP = 5  # several starts in a row saved nothing new
  STOPPED = 42  # stopped by a signal, all saved; run again to go on
  ABORTED = 134  # no progress, or another process is gone; run again


class Failure(Exception):
  """An end that `main` tells in one line, with an exit code of its own."""

  code = Exit.BUG


class UserError(Failure):
  """A mistake the user can mend."""

  code = Exit.USER


class NumericsError(Failure):
  """Numbers that are not finite, beyond what the config allows."""

  code = Exit.NUMERICS


class StorageError(Failure):
  """A disk or bucket that does not keep what it is given."""

  code = Exit.STORAGE


class CrashLoop(Failure):
  """Starts that die again and again without saving anything new."""

  code = Exit.CRASH_LOOP


class Aborted(Failure):
  """Another process is gone, and nothing can go on without it."""

  code = Exit.ABORTED


class Stopped(Failure):
  """A signal stopped the run after everything was saved."""

  code = Exit.STOPPED


def exit_code(error: BaseException | None) -> Exit:
  """Returns the exit code that an end by this error has."""
  if error is None:
    return Exit.DONE
  if isinstance(error, KeyboardInterrupt):
    return Exit.STOPPED
  return error.code if isinstance(error, Failure) else Exit.BUG


def nearest(name: str, valid: Iterable[str]) -> str:
  """Returns a clause that names the closest valid value, or all of them."""
  valid = sorted(map(str, valid))
  close = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
  if close:
    return f"did you mean {close[0]!r}?"
  return "valid: " + ", ".join(valid)
