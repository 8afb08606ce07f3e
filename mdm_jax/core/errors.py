"""Exit codes, and the exceptions that lead to them."""

import difflib
import enum
from collections.abc import Iterable


class Exit(enum.IntEnum):
  """Exit codes, which tell a scheduler whether to start a run again.

  docs/reliability.md lists them by these names.
  """

  DONE = 0  # everything is done, now or before
  BUG = 1  # an error in this library; the traceback comes last
  USER = 2  # a wrong flag, config, data, tokenizer or checkpoint
  NUMERICS = 3  # too many consecutive updates were not finite, or spikes
  STORAGE = 4  # workdir not writable, full, or damaged without a fallback
  CRASH_LOOP = 5  # several attempts in a row died without saving anything new
  STOPPED = 42  # stopped by a signal, everything saved; run again to resume
  # 128 + SIGABRT, which is how JAX ends a process whose peer is gone.
  ABORTED = 134  # no progress, or another process is gone; run again


class Failure(Exception):
  """An expected error: `main` prints it in one line and exits with `code`."""

  code = Exit.BUG


class UserError(Failure):
  """An error that the user can fix."""

  code = Exit.USER


class NumericsError(Failure):
  """More bad updates than the config allows, or two results that differ."""

  code = Exit.NUMERICS


class StorageError(Failure):
  """A disk or bucket that can't be read or written."""

  code = Exit.STORAGE


class CrashLoop(Failure):
  """Several attempts in a row died without saving anything new."""

  code = Exit.CRASH_LOOP


class Aborted(Failure):
  """Another process of the run is gone."""

  code = Exit.ABORTED


class Stopped(Failure):
  """A signal stopped the run, after everything was saved."""

  code = Exit.STOPPED


def exit_code(error: BaseException | None) -> Exit:
  """Returns the exit code for an exception, or for success if None."""
  if error is None:
    return Exit.DONE
  if isinstance(error, KeyboardInterrupt):
    return Exit.STOPPED
  return error.code if isinstance(error, Failure) else Exit.BUG


def first_line(error: BaseException) -> str:
  """Returns the first line of an error's message, or else its type."""
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0]


def nearest(name: str, valid: Iterable[str]) -> str:
  """Returns a hint for a message: the closest valid value, or all of them."""
  valid = sorted(map(str, valid))
  close = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
  if close:
    return f"did you mean {close[0]!r}?"
  return "valid: " + ", ".join(valid)
