"""Log filtering: shows this library's messages, and warnings of others.

JAX logs every backend that is missing, Orbax every file it writes; by default
both are hidden. `--verbosity=0` shows their INFO messages, `--verbosity=1` also
all debug messages. This library logs what users need at INFO or above.
"""

import logging
import pathlib
from typing import Any

from absl import app, flags
from absl import logging as absl_logging

from mdm_jax.core.progress import console

_PACKAGE = str(pathlib.Path(__file__).parents[1])


def run(main: Any, flags_parser: Any = app.parse_flags_with_usage) -> None:
  """Runs a program like `absl.app.run`, with filtered logging."""

  def quietly(argv: list[str]) -> Any:
    if not flags.FLAGS["verbosity"].present:
      for_people(absl_logging.get_absl_handler())
    return main(argv)

  app.run(quietly, flags_parser=flags_parser)


def for_people(handler: logging.Handler) -> None:
  """Makes a handler hide what users don't need, and print plain messages."""
  absl_logging.set_verbosity(absl_logging.INFO)
  handler.addFilter(_is_needed)
  handler.setFormatter(_Words())


def _is_needed(record: logging.LogRecord) -> bool:
  if record.pathname.startswith(_PACKAGE):
    return record.levelno >= logging.WARNING or not console.quiet
  # Orbax logs tracebacks of its threads for errors that `main` prints in one
  # line.
  return record.levelno >= logging.WARNING and "/orbax/" not in record.pathname


class _Words(logging.Formatter):
  def format(self, record: logging.LogRecord) -> str:
    text = super().format(record)
    level = record.levelname.lower()
    return f"{level}: {text}" if record.levelno >= logging.WARNING else text
