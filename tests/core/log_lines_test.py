"""Log filtering: the library's own messages, and the warnings of others."""

import io
import logging
import pathlib

import pytest
from absl import logging as absl_logging

import mdm_jax
from mdm_jax.core import log_lines
from mdm_jax.core.progress import console

PACKAGE = pathlib.Path(mdm_jax.__file__).parent


@pytest.fixture
def told():
  """Returns what is shown of a line logged by a file at a level."""
  before = absl_logging.get_verbosity()
  handler = logging.StreamHandler(io.StringIO())
  log_lines.for_people(handler)
  logger = absl_logging.get_absl_logger()

  def tell(path, level, text="a %s"):
    at = handler.stream.tell()
    if logger.isEnabledFor(level):
      record = logger.makeRecord("x", level, str(path), 1, text, ("b",), None)
      handler.handle(record)
    return handler.stream.getvalue()[at:]

  yield tell
  absl_logging.set_verbosity(before)


OURS = PACKAGE / "data" / "tokenizer.py"
JAX = "/venv/lib/python3/site-packages/jax/xla_bridge.py"
ORBAX = "/venv/lib/python3/site-packages/orbax/checkpoint/x.py"


@pytest.mark.parametrize(
  "path, level, shown",
  [
    (OURS, logging.INFO, "a b\n"),
    (OURS, logging.WARNING, "warning: a b\n"),
    (OURS, logging.DEBUG, ""),
    (JAX, logging.INFO, ""),
    (JAX, logging.WARNING, "warning: a b\n"),
    (ORBAX, logging.ERROR, ""),
  ],
)
def test_who_is_heard(told, path, level, shown):
  assert told(path, level) == shown


def test_of_several_processes_one_tells_and_all_warn(told, monkeypatch):
  monkeypatch.setattr(console, "quiet", True)
  assert told(OURS, logging.INFO) == ""
  assert told(OURS, logging.WARNING) == "warning: a b\n"


def test_every_program_is_run_like_that():
  programs = [
    path
    for path in PACKAGE.rglob("*.py")
    if 'if __name__ == "__main__":' in path.read_text()
  ]
  assert len(programs) > 10
  for path in programs:
    text = path.read_text()
    assert "app.run(" not in text or path.name == "log_lines.py", path
