"""Components defined outside the package work in every program.

`own_pieces.py` has one toy each of corpus, tokenizer, noise schedule,
objective, sampling order, text metric, optimizer and attention kernel. Nothing
of the package is edited: a config file names the module and the pieces.
"""

import json
import re
import shutil

import numpy as np
import pytest
from command_harness import call, check_mistake, environment
from paths import ROOT, TESTS

PIECES = TESTS / "own_pieces.py"
CONFIG = """
from mdm_jax import config as config_lib


def get_config(arg=""):
  c = config_lib.default_config("own_pieces")
  c.name = "own"
  c.data.update(corpus="counting", batch_size=4, eval_fraction=0.2)
  c.data.test_fraction = 0.2
  c.tokenizer.kind = "letters"
  c.model.update(num_layers=1, embed_dim=16, num_heads=2, attention="plain")
  c.objective.update(OBJECTIVE)
  c.noise.schedule = "slow"
  c.stages = (config_lib.stage(name="one", length=32, updates=UPDATES),)
  c.optimizer.update(name="signs", learning_rate=1e-3, warmup_steps=1)
  c.train.update(log_every=1, checkpoint_every=5)
  c.eval.update(every=5, rows=4, final_rows=4, masks_per_row=2, samples=2)
  c.sample.update(order="outward", num_samples=2, num_steps=4)
  return c
"""
NAMED = {
  "corpus": ("data", "corpus", "counting"),
  "tokenizer": ("tokenizer", "kind", "letters"),
  "kernel": ("model", "attention", "plain"),
  "schedule": ("noise", "schedule", "slow"),
  "optimizer": ("optimizer", "name", "signs"),
  "order": ("sample", "order", "outward"),
}


def write(folder, objective="name='holes', holes=0.4", updates=10):
  """Writes a user's folder: the pieces and a config file that names them."""
  shutil.copy(PIECES, folder)
  text = CONFIG.replace("OBJECTIVE", objective)
  path = folder / "own.py"
  path.write_text(text.replace("UPDATES", str(updates)))
  return path


@pytest.fixture(scope="module")
def env(tmp_path_factory):
  """Of the commands: nothing but the user's folder is where Python looks."""
  return environment(tmp_path_factory.mktemp("cache"), PYTHONPATH=str(ROOT))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, env):
  """A folder with the pieces, and a run of them: stopped, then resumed."""
  folder = tmp_path_factory.mktemp("own")
  config = write(folder)
  args = f"--config={config}", "--workdir=w"
  first = call(folder, env, *args, "--config.stages[0].updates=5")
  assert first.returncode == 0, first.stderr
  resumed = call(folder, env, *args)
  assert resumed.returncode == 0, resumed.stderr
  return folder, resumed


def read(folder, name="results.json"):
  return json.loads((folder / "w" / name).read_text())


def lines(folder):
  text = (folder / "w" / "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def test_the_config_of_the_run_names_every_piece(trained):
  config = read(trained[0], "config.json")
  assert config["modules"] == ["own_pieces"]
  assert config["objective"]["name"] == "holes"
  assert config["objective"]["holes"] == 0.4
  for section, name, value in NAMED.values():
    assert config[section][name] == value


def test_it_trains_and_resumes(trained):
  folder, resumed = trained
  assert re.search("resuming .* at update 5", resumed.stdout)
  logged = [line for line in lines(folder) if "train/loss" in line]
  assert [line["step"] for line in logged] == list(range(1, 11))
  # The objective's own summary, and the loss it is the mean of.
  for line in logged:
    assert line["train/hole"] == pytest.approx(line["train/loss"], rel=1e-4)
  assert logged[-1]["train/loss"] < logged[0]["train/loss"]


def test_it_is_measured_by_its_own_names(trained):
  results = read(trained[0])
  assert results["measured"]["headline"] == "holes_per_token"
  assert 0 < results["holes_per_token"] < 20
  words = results["text_metrics"]["held_out"]["mean_words"]
  assert words["value"] > 1 and words["n"] > 1
  assert "Words of a text" in trained[1].stdout
  assert "nelbo" not in json.dumps(results).lower()


@pytest.mark.parametrize("mode", ["eval", "report"])
def test_other_programs_take_the_pieces_of_the_run(trained, env, mode):
  folder, _ = trained
  before = read(folder)
  args = "--workdir=w", f"--mode={mode}", "--modules=own_pieces"
  done = call(folder, env, *args)
  assert done.returncode == 0, done.stderr
  if mode == "eval":
    assert read(folder)["holes_per_token"] == before["holes_per_token"]
  else:
    page = (folder / "w" / "report.html").read_text()
    assert "cost of a hole" in page and "Words of a text" in page


def test_it_samples_from_the_middle_on(trained, env):
  folder, _ = trained
  args = "--workdir=w", "--mode=sample", "--modules=own_pieces"
  done = call(folder, env, *args, "--trace")
  assert done.returncode == 0, done.stderr
  with np.load(
    folder / "w" / "samples" / "samples.npz", allow_pickle=False
  ) as drawn:
    step = drawn["step"]
  # A quarter of the row at a time, each around those before it; -1 is what
  # stands behind the end of a text.
  from_middle = np.abs(np.arange(step.shape[1]) - (step.shape[1] - 1) / 2)
  for row in step[:, np.argsort(from_middle)]:
    kept = row[row >= 0]
    assert len(kept) and (np.diff(kept) >= 0).all()


def test_a_folder_alone_runs_no_module(trained, env):
  done = call(trained[0], env, "--workdir=w", "--mode=sample")
  check_mistake(done, "own_pieces", "--modules=own_pieces")


def test_the_schedule_is_that_of_the_masked_objective_too(env, tmp_path):
  """Of 1 - t^3 the mean mask rate is 1/4, of the default 1/2."""
  config = write(tmp_path, "name='masked'", updates=8)
  args = f"--config={config}", "--workdir=w", "--config.eval.samples=0"
  done = call(tmp_path, env, *args)
  assert done.returncode == 0, done.stderr
  logged = [line for line in lines(tmp_path) if "train/mask_rate" in line]
  rates = [line["train/mask_rate"] for line in logged]
  assert sum(rates) / len(rates) == pytest.approx(0.25, abs=0.04)


def test_a_name_that_nobody_registered_tells_the_nearest(env, tmp_path):
  config = write(tmp_path)
  done = call(
    *(tmp_path, env, f"--config={config}", "--workdir=w"),
    "--config.sample.order=outwards",
  )
  check_mistake(done, "sample.order='outwards'", "did you mean 'outward'?")


def test_the_page_on_extending_shows_these_pieces():
  page = (ROOT / "docs" / "extending.md").read_text()
  of_pieces = page[page.index("## A corpus") : page.index("## Hook")]
  own = re.findall(r"```python\n(.*?)```", of_pieces, re.DOTALL)
  assert len(own) >= len(NAMED) + 2
  for block in own:
    assert block.rstrip() in PIECES.read_text(), block
