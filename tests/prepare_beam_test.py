"""Apache Beam writes the same bytes.

It wants older packages than the library does (protobuf, pyarrow, beartype), so
it is not installed beside it, but in an environment of its own.
"""

import subprocess
import sys

import command_harness as commands
import prepare_harness as harness
import pytest
from apart_harness import python_with

CONFIG = """
from mdm_jax.config import default_config, stage

def get_config(arg=""):
  config = default_config()
  config.stages = (
    stage(unit="sentences", length=48, min_words=3, easiest=0.5),
    stage(length=64),
  )
  config.data.update(block_megabytes=0.006)
  config.data.update(eval_fraction=0.25, test_fraction=0.25)
  config.data.corpus = "text:texts/*"
  config.tokenizer.vocab_size = 400
  return config.lock()
"""
PROGRAM = "-m", "mdm_jax.prepare_beam"
WITHOUT_BEAM = """
import runpy, sys
sys.modules["apache_beam"] = None
runpy.run_module("mdm_jax.prepare_beam", run_name="__main__")
"""


@pytest.fixture
def place(tmp_path):
  """A folder with texts and a config."""
  harness.write_texts(tmp_path / "texts")
  (tmp_path / "config.py").write_text(CONFIG)
  return tmp_path


@pytest.fixture
def env(tmp_path):
  """The environment of the commands."""
  return commands.environment(tmp_path / "cache")


def _beam(python, place, env, *more, program=PROGRAM):
  args = ["--config=config.py", "--config.data.prepared=by_beam", *more]
  command = [python, *program, *args]
  return subprocess.run(
    command, cwd=place, env=env, capture_output=True, text=True, timeout=500
  )


def test_without_it_one_line_says_what_to_install(place, env):
  done = _beam(sys.executable, place, env, program=("-c", WITHOUT_BEAM))
  commands.check_mistake(done, "pip install -e '.[beam]'")


@pytest.mark.slow
def test_beam_writes_the_same_bytes(place, env, tmp_path):
  python = python_with(tmp_path, "beam", "BEAM_PYTHON")
  done = _beam(python, place, env, "--beam=--direct_num_workers=2")
  assert done.returncode == 0, done.stderr
  here = commands.call(
    place,
    env,
    *("--mode=prepare", "--config=config.py", "--workers=2"),
    "--config.data.prepared=here",
  )
  assert here.returncode == 0, here.stderr
  assert harness.contents(place / "by_beam") == harness.contents(place / "here")
