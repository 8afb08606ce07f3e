"""A run with the autoregressive objective, by the command line."""

import json

import pytest
from command_harness import call, check_mistake, environment
from paths import ROOT

CONFIG = f"--config={ROOT / 'configs' / 'autoregressive.py'}:quick"
SMALL = (
  *("--config.data.max_documents=6", "--config.eval.samples=0"),
  *("--config.stages[0].updates=6", "--config.stages[1].updates=6"),
)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def env(tmp_path_factory):
  return environment(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, env):
  """A folder with a run: stopped after some updates, then resumed."""
  folder = tmp_path_factory.mktemp("run")
  args = CONFIG, "--workdir=w", *SMALL
  first = call(folder, env, *args, "--config.stages[2].updates=6")
  assert first.returncode == 0, first.stderr
  resumed = call(folder, env, *args, "--config.stages[2].updates=12")
  assert resumed.returncode == 0, resumed.stderr
  return folder, resumed


def test_it_trains_resumes_and_is_measured_exactly(trained):
  folder, resumed = trained
  assert "resuming" in resumed.stdout
  results = json.loads((folder / "w" / "results.json").read_text())
  assert results["measured"]["headline"] == "nll_per_token"
  assert "NLL, nats per token" in resumed.stdout
  assert "bound" not in resumed.stdout and "nelbo" not in str(results).lower()
  assert not {"order", "num_steps", "schedule"} & results["sampling"].keys()
  lines = (folder / "w" / "metrics.jsonl").read_text().splitlines()
  losses = [json.loads(x).get("train/loss") for x in lines]
  losses = [loss for loss in losses if loss]
  assert losses[-1] < losses[0]


def test_texts_begin_with_their_prompt(trained, env):
  args = "--workdir=w", "--mode=sample", "--prompt=We the", "--json"
  done = call(trained[0], env, *args, "--num_samples=2")
  assert done.returncode == 0, done.stderr
  texts = json.loads(done.stdout.splitlines()[-1])
  assert len(texts) == 2 and all(text.startswith("We the") for text in texts)


@pytest.mark.parametrize(
  "argument, words",
  [
    ("--prompt=We [MASK] of", "text behind a hole"),
    ("--config.sample.order=random", "sample.order='random'"),
  ],
)
def test_what_does_not_apply_is_one_line(trained, env, argument, words):
  done = call(trained[0], env, "--workdir=w", "--mode=sample", argument)
  check_mistake(done, words)


def test_tuning_is_refused_and_temperatures_are_compared(trained, env):
  done = call(trained[0], env, "--workdir=w", "--mode=tune")
  check_mistake(done, "eval.samples")
  more = "--config.eval.samples=2"
  done = call(trained[0], env, "--workdir=w", "--mode=tune", more)
  check_mistake(done, "--mode=tune", "from left to right")
  args = "--mode=compare", "--ways=6", "--config.sample.num_samples=1"
  done = call(trained[0], env, "--workdir=w", *args)
  assert done.returncode == 0, done.stderr
  assert "left out: 1 of 2" in done.stdout and "temperature 0.6" in done.stdout
