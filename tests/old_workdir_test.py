"""A run's folder of mdm_jax 0.1 is refused in one line that says what to do.

`golden/workdir_0.1` is what that version wrote for two updates of a tiny model,
without its arrays, curves and pages.
"""

import json
import pathlib
import shutil

import pytest
from paths import GOLDEN

from mdm_jax import sample, training_loop
from mdm_jax.checkpoints.checkpoint import Checkpoints
from mdm_jax.config import Config
from mdm_jax.core.errors import UserError
from mdm_jax.trained_model import load_model
from mdm_jax.workdir import Workdir

WORKDIR = GOLDEN / "workdir_0.1"
BY = r"by mdm_jax 0\.1\.0 \(format 1\); this is mdm_jax .* \(format 2\): use"


@pytest.fixture
def old(tmp_path):
  return Workdir(shutil.copytree(WORKDIR, tmp_path / "old"))


def _latest(workdir):
  with Checkpoints(workdir.path) as checkpoints:
    return checkpoints.latest()


def _start_from(workdir):
  config = Config(init_from=str(workdir.path))
  return training_loop.train_and_evaluate(
    config, Workdir(workdir.path.parent / "new")
  )


def _contents(workdir):
  files = pathlib.Path(workdir.path).rglob("*")
  return {path: path.read_bytes() for path in files if path.is_file()}


REFUSALS = {
  "resume": lambda workdir: training_loop.train_and_evaluate(Config(), workdir),
  "init_from": _start_from,
  "load": lambda workdir: sample.load(str(workdir.path)),
  "load_model": load_model,
  "config": Workdir.read_config,
  "checkpoints": _latest,
}


@pytest.mark.parametrize("way", REFUSALS)
def test_a_folder_of_an_older_version_is_refused_in_one_line(way, old):
  before = _contents(old)
  with pytest.raises(UserError, match=BY) as refused:
    REFUSALS[way](old)
  assert "\n" not in str(refused.value)
  assert _contents(old) == before


def test_a_folder_of_now_says_its_format(tmp_path):
  workdir = Workdir(tmp_path)
  workdir.write_config(Config(), "0")
  assert workdir.read_config().seed == 0
  path = tmp_path / "versions.json"
  written = json.loads(path.read_text())
  path.write_text(json.dumps(written | {"format": 3}))
  with pytest.raises(UserError, match="format 3"):
    workdir.read_config()
