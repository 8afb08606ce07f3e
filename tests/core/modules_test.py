"""A user's own modules: found in every program, and never run unasked."""

import json
import pathlib
import sys

import pytest
from absl.testing import flagsaver
from command_harness import QUICK, call, check_mistake, environment

from mdm_jax import command_line
from mdm_jax import config as config_lib
from mdm_jax.config import Config
from mdm_jax.core import modules
from mdm_jax.core.errors import UserError

PIECES = """
import pathlib
import jax.numpy as jnp
from mdm_jax.sampling import order

pathlib.Path(__file__).with_suffix(".ran").touch()

@order.ORDERS.register("own_order")
def own_order(key, step, length):
  return -jnp.arange(length, dtype=jnp.float32)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A folder that Python looks in, with a module and a run that uses it."""
  (tmp_path / "own_pieces.py").write_text(PIECES)
  config = config_lib.to_dict(Config())
  config["modules"], config["sample"]["order"] = ["own_pieces"], "own_order"
  config["data"]["corpus"] = "text:none/*.txt"
  (tmp_path / "w").mkdir()
  (tmp_path / "w" / "config.json").write_text(json.dumps(config))
  monkeypatch.syspath_prepend(str(tmp_path))
  yield tmp_path
  sys.modules.pop("own_pieces", None)


def read(monkeypatch, *args):
  """The config of a command line."""
  with flagsaver.flagsaver():
    monkeypatch.setattr(sys, "argv", ["main", *args])
    command_line.parse(["main", *args])
    return command_line.read_config()


def test_a_config_file_names_the_modules(folder, monkeypatch):
  file = folder / "mine.py"
  file.write_text(
    "from mdm_jax.config import default_config\n"
    "def get_config():\n"
    "  config = default_config()\n"
    "  config.modules = ('own_pieces',)\n"
    "  config.sample.order = 'own_order'\n"
    "  return config\n"
  )
  config = read(monkeypatch, f"--config={file}")
  assert config.modules == ("own_pieces",)
  assert config_lib.from_dict(config_lib.to_dict(config)) == config


def test_a_module_can_be_named_by_a_flag(folder, monkeypatch):
  args = "--modules=own_pieces", "--config.sample.order=own_order"
  assert read(monkeypatch, QUICK, *args).modules == ("own_pieces",)


def test_a_folders_config_runs_no_code(folder):
  """Only who names its modules himself imports them."""
  env, ran = environment(folder), pathlib.Path(folder, "own_pieces.ran")
  command = "--mode=eval", "--workdir=w"
  done = call(folder, env, *command)
  check_mistake(done, "--modules=own_pieces", "trust")
  assert not ran.exists()
  done = call(folder, env, *command, "--modules=own_pieces")
  assert ran.exists()
  check_mistake(done, "none/*.txt matches no file")  # it got that far
  assert "own" not in done.stderr


def test_a_saved_config_is_no_reason_to_import(folder):
  raw = json.loads((folder / "w" / "config.json").read_text())
  with pytest.raises(UserError, match="--modules=own_pieces"):
    config_lib.from_dict(raw)
  with pytest.raises(UserError, match="--modules=own_pieces"):
    Config(modules=("own_pieces",))
  assert not (folder / "own_pieces.ran").exists()
  modules.load(["own_pieces"])
  assert config_lib.from_dict(raw).sample.order == "own_order"


@pytest.mark.parametrize(
  "source, told",
  [
    (None, "Python can't find module broken; is its folder in PYTHONPATH?"),
    ("import nowhere_at_all", "No module named 'nowhere_at_all'"),
    ("1 / 0", "ZeroDivisionError: division by zero"),
    ("def f(:", "SyntaxError"),
  ],
)
def test_a_module_that_fails_is_one_line(folder, source, told):
  if source:
    (folder / "broken.py").write_text(source)
  with pytest.raises(UserError) as caught:
    modules.load(["broken"])
  message = str(caught.value)
  assert message.startswith("module broken: ") and "\n" not in message
  assert told in message
