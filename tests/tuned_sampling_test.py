"""Which sampling settings are used once a run is tuned."""

import dataclasses

import pytest
from command_harness import call, environment

from mdm_jax import tuned_sampling
from mdm_jax.config import Config
from mdm_jax.core.errors import UserError
from mdm_jax.core.progress import console
from mdm_jax.sampling.config import SampleConfig
from mdm_jax.workdir import Workdir

RUN = Config(sample=SampleConfig(temperature=0.6, top_k=20, num_samples=3))
TUNED = SampleConfig(
  num_steps=25,
  order="random",
  temperature=0.95,
  temperature_range=None,
  top_k=None,
  top_p=None,
  min_p=0.05,
)


@pytest.fixture
def workdir(tmp_path):
  workdir = Workdir(tmp_path)
  workdir.write_config(RUN, "0")
  settings = tuned_sampling.values(TUNED)
  content = {"checkpoint": 1650, "settings": settings}
  workdir.write(tuned_sampling.FILE, content)
  return workdir


@pytest.fixture
def printed(monkeypatch):
  lines = []
  monkeypatch.setattr(console, "print", lambda *a, **_: lines.extend(a))
  return lines


def test_tuned_settings_are_used_and_named(workdir, printed):
  for which in ("auto", "tuned"):
    found = tuned_sampling.applied(RUN, workdir, which)
    assert found.sample == dataclasses.replace(TUNED, num_samples=3)
    assert dataclasses.replace(found, sample=RUN.sample) == RUN
    [line] = printed
    for words in ("update 1,650", "order random", "min_p 0.05", "config"):
      assert words in line
    printed.clear()


def test_the_runs_own_settings_can_be_asked_for(workdir, printed):
  assert tuned_sampling.applied(RUN, workdir, "config") is RUN
  assert not printed


def test_a_setting_that_is_asked_for_stays(workdir, printed):
  asked = dataclasses.replace(RUN.sample, temperature=0.7, seed=9)
  config = dataclasses.replace(RUN, sample=asked)
  found = tuned_sampling.applied(config, workdir, "auto").sample
  assert (found.temperature, found.seed) == (0.7, 9)
  assert (found.order, found.min_p) == ("random", 0.05)
  assert "temperature 0.7" in printed[0]


def test_without_a_tuning_the_runs_own_are_used(tmp_path, printed):
  workdir = Workdir(tmp_path)
  assert tuned_sampling.applied(RUN, workdir, "auto") is RUN
  assert tuned_sampling.read(workdir, RUN) is None
  assert not printed
  with pytest.raises(UserError, match="run --mode=tune first"):
    tuned_sampling.applied(RUN, workdir, "tuned")


@pytest.mark.parametrize(
  "content, words",
  [
    ("{", "sampling.json: .*--mode=tune again"),
    ('{"checkpoint": 1, "settings": {"heat": 1}}', "--mode=tune again"),
    ('{"checkpoint": 1}', "--mode=tune again"),
    ('{"settings": {}}', "--mode=tune again"),
    (
      '{"checkpoint": 1, "settings": {"temperature": -1}}',
      "sample.temperature",
    ),
  ],
)
def test_a_file_that_cannot_be_used_is_one_line(workdir, content, words):
  (workdir.path / tuned_sampling.FILE).write_text(content)
  with pytest.raises(UserError, match=words) as error:
    tuned_sampling.applied(RUN, workdir, "auto")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "args, words",
  [
    (["--mode=sample", "--sampling=tuned"], "run --mode=tune first"),
    (["--mode=sample", "--sampling=best"], "--sampling"),
    (["--mode=tune", "--config.eval.samples=0"], "config.eval.samples=64"),
  ],
)
def test_a_mistake_on_the_command_line_is_one_line(tmp_path, args, words):
  Workdir(tmp_path / "w").create()
  Workdir(tmp_path / "w").write_config(RUN, "0")
  done = call(tmp_path, environment(tmp_path), "--workdir=w", *args)
  assert done.returncode == 2
  assert words in done.stderr and done.stderr.count("\n") == 1
