"""Which log lines people see: the library's own, and others' warnings.

What everybody needs is logged at INFO or above, what only helps to find a
mistake below it. JAX tells of every backend that is not there, and Orbax of
every file: `--verbosity=0` shows that too, `--verbosity=1` all there is.
"""

import logging
import pathlib
from typing import Any

from absl import app, flags
from absl import logging as absl_logging

from mdm_jax.core.progress import console

_PACKAGE = str(pathlib.Path(__file__).parents[1])


def run(main: Any, flags_parser: Any = None) -> None:
  """Runs a program as `absl.app.run` does, with log lines for people."""

  def quietly(argv: list[str]) -> Any:
    if not flags.FLAGS["verbosity"].present:
      for_people(absl_logging.get_absl_handler())
    return main(argv)

  options = {"flags_parser": flags_parser} if flags_parser else {}
  app.run(quietly, **options)


def for_people(handler: logging.Handler) -> None:
  """Has a handler show what people need, in words alone."""
  absl_logging.set_verbosity(absl_logging.INFO)
  handler.addFilter(_is_needed)
  handler.setFormatter(_Words())


def _is_needed(record: logging.LogRecord) -> bool:
  if record.pathname.startswith(_PACKAGE):
    return record.levelno >= logging.WARNING or not console.quiet
  # With an error that is told in one line, Orbax tells threads' tracebacks.
  return record.levelno >= logging.WARNING and "/orbax/" not in record.pathname


class _Words(logging.Formatter):
  def format(self, record: logging.LogRecord) -> str:
    text = super().format(record)
    level = record.levelname.lower()
    return f"{level}: {text}" if record.levelno >= logging.WARNING else text
