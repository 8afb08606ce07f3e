"""Errors a user can cause, each told in one line, and the exit codes."""

import difflib
from collections.abc import Iterable

EXIT_OK = 0
EXIT_USER = 2  # a flag, a config, data, a tokenizer or a checkpoint is wrong
EXIT_STOPPED = 42  # stopped by a signal after saving; run again to resume


class UserError(Exception):
  """A mistake the user can mend; `main` prints it as one line and exits 2."""


class Stopped(Exception):
  """A signal stopped the run after everything was saved."""


def nearest(name: str, valid: Iterable[str]) -> str:
  """Returns a clause that names the closest valid value, or all of them."""
  valid = sorted(map(str, valid))
  close = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
  if close:
    return f"did you mean {close[0]!r}?"
  return "valid: " + ", ".join(valid)
