"""Imports user modules that register their own objectives, corpora, etc.

Also checks that optional packages are installed.

Importing a module runs its code. So only modules named by a config file or on
the command line are imported, never those named by a config saved in a workdir,
which may come from somebody else.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterable

from mdm_jax.core.errors import UserError


def load(names: Iterable[str]) -> None:
  """Imports modules that the user has named.

  Raises:
    UserError: a module doesn't exist, or its code fails.
  """
  for name in names:
    try:
      importlib.import_module(name)
    except UserError:
      raise
    except Exception as error:  # whatever the module's own code raises
      raise UserError(f"module {name}: {_reason(name, error)}") from error


def has(package: str) -> bool:
  """Returns whether an optional package is installed."""
  return importlib.util.find_spec(package) is not None


def need(package: str, extra: str, what: str) -> None:
  """Raises UserError, with the remedy, if an optional package is missing.

  Args:
    package: name of its module.
    extra: this library's extra that installs it.
    what: what needs the package, such as a flag or a file.
  """
  if not has(package):
    raise UserError(
      f"{what} needs the Python package {package}; run: pip install -e"
      f" '.[{extra}]'"
    )


def check_loaded(names: Iterable[str]) -> None:
  """Raises UserError if modules that a config needs aren't imported."""
  missing = [name for name in names if name not in sys.modules]
  if missing:
    given = ",".join(missing)
    raise UserError(
      f"modules={given}: this run uses code from there, and modules named in a"
      " saved config are not imported by themselves. If you trust what Python"
      f" finds under that name, import it or give --modules={given}"
    )


def _reason(name: str, error: Exception) -> str:
  missing = isinstance(error, ModuleNotFoundError) and error.name
  if missing and (name == missing or name.startswith(f"{missing}.")):
    return f"Python can't find module {missing}; is its folder in PYTHONPATH?"
  text = " ".join(str(error).split())
  return f"{type(error).__name__}: {text}"
