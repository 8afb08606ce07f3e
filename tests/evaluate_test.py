"""Evaluation, frontier, comparison and report of a small run, in process."""

import dataclasses
import errno
import json
import pathlib
import random
import shutil

import jax
import numpy as np
import pytest

from mdm_jax import (
  evaluate,
  likelihood,
  report,
  sampled_texts,
  training_loop,
)
from mdm_jax.config import Config
from mdm_jax.core import files
from mdm_jax.core.errors import Exit, StorageError, UserError
from mdm_jax.core.progress import console
from mdm_jax.data.config import DataConfig, StageConfig, TokenizerConfig
from mdm_jax.evaluation.config import EvalConfig
from mdm_jax.evaluation.evaluator import Evaluator
from mdm_jax.model.config import ModelConfig
from mdm_jax.sampling import chain_calls
from mdm_jax.sampling.config import SampleConfig
from mdm_jax.sampling.generate import TextSampler
from mdm_jax.studies import compare, frontier, search, tune
from mdm_jax.training.config import OptimizerConfig, TrainConfig
from mdm_jax.workdir import Workdir

UPDATES = 4
WORDS = (
  "we the people of these united states do hope for peace and trade".split()
)


@pytest.fixture(autouse=True)
def _optax_promotes():
  with jax.numpy_dtype_promotion("standard"):
    yield


@pytest.fixture(scope="module", autouse=True)
def _programs_are_shared():
  """Makes samplers and evaluators of one model once, for all runs here."""
  samplers, evaluators = {}, {}

  def sampler(denoiser, tokenizer, mesh, length, *, decoding):
    key = denoiser, tokenizer.sha256, mesh, length, decoding
    if key not in samplers:
      samplers[key] = TextSampler(
        *(denoiser, tokenizer, mesh, length), decoding=decoding
      )
    return samplers[key]

  def evaluator(config, objective, denoiser, mesh, poll):
    del poll  # of the run that came first
    key = config, objective, denoiser, mesh
    return evaluators.setdefault(key, Evaluator(*key))

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sampled_texts, "TextSampler", sampler)
    patch.setattr(evaluate, "Evaluator", evaluator)
    yield


def write_texts(folder, count=24, sentences=24, seed=0):
  """Writes documents of sentences of common words; returns the corpus."""
  draw = random.Random(seed)
  folder.mkdir(parents=True, exist_ok=True)
  sentence = lambda: " ".join(draw.choices(WORDS, k=8)).capitalize() + "."
  for i in range(count):
    text = " ".join(sentence() for _ in range(sentences))
    (folder / f"{i:02}.txt").write_text(text)
  return f"text:{folder}/*.txt"


def make_config(folder, corpus, updates=UPDATES, **data):
  return Config(
    name="tiny",
    data=DataConfig(
      corpus=corpus, batch_size=8, cache_dir=str(folder / "cache"), **data
    ),
    tokenizer=TokenizerConfig(kind="byte"),
    model=ModelConfig(num_layers=1, embed_dim=16, num_heads=2, remat="none"),
    stages=(StageConfig(length=48, updates=updates),),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
    train=TrainConfig(log_every=2, checkpoint_every=2, watchdog_seconds=0.0),
    eval=EvalConfig(
      every=0, rows=8, final_rows=8, masks_per_row=4, batch_size=16, samples=2
    ),
    sample=SampleConfig(num_samples=2, num_steps=4),
  )


@dataclasses.dataclass(frozen=True)
class Run:
  """A finished run, its config and the folder of its text."""

  config: Config
  workdir: Workdir

  def results(self):
    return json.loads((self.workdir.path / "results.json").read_text())

  def save(self, results):
    (self.workdir.path / "results.json").write_text(json.dumps(results))

  def train(self, **changed):
    config = dataclasses.replace(self.config, **changed)
    with jax.numpy_dtype_promotion("standard"):
      return training_loop.train_and_evaluate(config, self.workdir)

  def of(self, updates):
    """Returns the stages with another number of updates."""
    return {"stages": (StageConfig(length=48, updates=updates),)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A run that most tests look at."""
  folder = tmp_path_factory.mktemp("finished")
  config = make_config(folder, write_texts(folder / "texts"))
  run = Run(config, Workdir(folder / "run"))
  run.train()
  return run


@pytest.fixture
def run(finished, tmp_path):
  """A copy of it, to be changed."""
  folder = shutil.copytree(finished.workdir.path, tmp_path / "run")
  return Run(finished.config, Workdir(folder))


@pytest.fixture
def told(monkeypatch):
  """What is printed."""
  lines = []
  monkeypatch.setattr(console, "print", lambda *a, **_: lines.extend(a))
  return lines


# MARK: what is finished


def test_found_A1_old_results_are_not_taken_for_the_final_ones(run, told):
  old = run.results()
  run.train(**run.of(6))
  new = run.results()
  assert (old["updates"], new["updates"]) == (UPDATES, 6)
  assert new["nelbo_per_token"] != old["nelbo_per_token"]
  run.save(old)  # as an end within the final evaluation leaves them
  assert run.train(**run.of(6)) == run.results() == new
  assert any("evaluating again" in str(line) for line in told)


def test_a_finished_run_is_not_measured_again(run, told, monkeypatch):
  before = run.results()
  monkeypatch.setattr(evaluate, "evaluate_params", None)
  assert run.train() == before
  assert str(told[-1]).endswith("is finished: nothing to train")


@pytest.mark.parametrize("changed", ["settings", "checkpoint", "text"])
def test_results_of_something_else_are_measured_again(
  run, changed, monkeypatch
):
  class Measured(Exception):
    pass

  def measure(*args, **kwargs):
    raise Measured

  before = run.results()
  run.save(before | {changed: "another"})
  if changed == "settings":  # one of them to its end
    run.train()
    assert run.results() == before
    return
  monkeypatch.setattr(evaluate, "evaluate_params", measure)
  with pytest.raises(Measured):
    run.train()


def test_another_setting_is_measured(run):
  sample = dataclasses.replace(run.config.sample, seed=5)
  before = run.results()
  run.train(sample=sample)
  after = run.results()
  assert after["samples"] != before["samples"]
  assert after["nelbo_per_token"] == before["nelbo_per_token"]
  saved = run.workdir.read_config()
  assert saved.sample.seed == 5


def test_found_A17_a_run_is_not_made_shorter_in_silence(run):
  before = (run.workdir.path / "config.json").read_text()
  with pytest.raises(UserError) as error:
    run.train(**run.of(3))
  assert error.value.code == Exit.USER
  for word in ("made 4 updates", "the 3 of", "stages[0].updates  4      3"):
    assert word in str(error.value)
  assert "it has: 2, 4" in str(error.value)
  assert (run.workdir.path / "config.json").read_text() == before


# MARK: which text


def _measure(program, config, workdir):
  return {
    "eval": lambda: evaluate.evaluate_workdir(config, workdir),
    "frontier": lambda: frontier.frontier_workdir(config, workdir),
    "compare": lambda: compare.compare_workdir(config, workdir, "threshold"),
    "report": lambda: report.report_workdir(config, workdir),
    "train": lambda: training_loop.train_and_evaluate(config, workdir),
  }[program]()


@pytest.mark.parametrize("program", ["eval", "frontier", "compare"])
@pytest.mark.parametrize("changed", ["file", "fraction", "corpus"])
def test_found_A2_only_the_runs_own_text_is_measured(
  finished, program, changed, tmp_path
):
  folder = tmp_path / "texts"
  data = dataclasses.replace(
    finished.config.data, corpus=write_texts(folder), cache_dir=str(tmp_path)
  )
  if changed == "file":
    (folder / "03.txt").write_text("Something else. " * 99)
  elif changed == "fraction":
    data = dataclasses.replace(data, eval_fraction=0.5)
  else:
    data = dataclasses.replace(data, corpus=write_texts(folder / "b", seed=1))
  config = dataclasses.replace(finished.config, data=data)
  before = finished.results()
  with pytest.raises(UserError, match="was started with another text") as error:
    _measure(program, config, finished.workdir)
  assert error.value.code == Exit.USER
  assert finished.results() == before


# MARK: what can't be stored, and what is no number


@pytest.mark.parametrize(
  "program", ["eval", "frontier", "compare", "report", "train"]
)
def test_found_C1_what_was_measured_is_printed_before_a_full_disk_ends_it(
  run, program, told, monkeypatch
):
  def fail(path, *_):
    raise OSError(errno.ENOSPC, "No space left on device", str(path))

  names = "unmasking.json", "frontier.csv", "ways.csv", "report.html"
  write, run_files = files.write, {run.workdir.path / name for name in names}
  monkeypatch.setattr(
    files,
    "write",
    lambda path, *a: (fail if path in run_files else write)(path, *a),
  )
  run.save({})
  with pytest.raises(StorageError) as error:
    _measure(program, run.config, run.workdir)
  assert error.value.code == Exit.STORAGE
  assert "No space left on device" in str(error.value)
  assert "\n" not in str(error.value)
  printed = " ".join(str(getattr(line, "title", line)) for line in told)
  measured = {"eval": "update 4", "train": "update 4", "report": ""}
  assert measured.get(program, "judged by") in printed


def _strict(text):
  def refuse(name):
    raise AssertionError(f"a bare {name}")

  return json.loads(text, parse_constant=refuse)


def test_found_C7_one_held_out_row_gives_null_and_no_bare_nan(run):
  few = dataclasses.replace(run.config.eval, rows=1, final_rows=1, samples=1)
  sample = dataclasses.replace(run.config.sample, num_samples=1)
  results = run.train(eval=few, sample=sample, **run.of(6))
  folder = run.workdir.path
  paths = [p for p in pathlib.Path(folder).rglob("*.json*") if p.is_file()]
  assert len(paths) > 8
  for path in paths:
    text = path.read_text()
    for line in text.splitlines() if path.suffix == ".jsonl" else [text]:
      _strict(line)
  assert results == _strict((folder / "results.json").read_text())
  assert results["rows"] == 1 and results["nelbo_stderr"] is None
  last = (folder / "metrics.jsonl").read_text().splitlines()[-2]
  assert _strict(last)["validation/nelbo_stderr"] is None
  assert report.report_workdir(run.config, run.workdir)


def test_another_text_is_measured_on_purpose_and_said(run, told, tmp_path):
  own = run.results()
  assert own["text"]["own"] and own["text"]["split"] == "test"
  corpus = write_texts(tmp_path / "other", count=5, seed=7)
  data = dataclasses.replace(run.config.data, test_corpus=corpus)
  config = dataclasses.replace(run.config, data=data)
  results = evaluate.evaluate_workdir(config, run.workdir)
  assert results == run.results()
  assert results["text"].items() >= {"own": False, "corpus": corpus}.items()
  assert results["documents"] == 5
  assert results["nelbo_per_token"] != own["nelbo_per_token"]
  assert any(
    f"another test text than the run's own: {corpus}" in str(line)
    for line in told
  )
  assert run.train() == run.results() == own  # not taken for the run's


def test_frontier_and_compare_use_validation_text(run, told, tmp_path):
  """What chooses settings never reads the text that is reported."""
  corpus = write_texts(tmp_path / "other", count=5, seed=7)
  data = dataclasses.replace(run.config.data, validation_corpus=corpus)
  config = dataclasses.replace(run.config, data=data)
  for program in ("frontier", "compare"):
    before = _measure(program, run.config, run.workdir)[-1]
    after = _measure(program, config, run.workdir)[-1]
    assert before["n"] == after["n"] == 2 and before != after
    data = dataclasses.replace(run.config.data, test_corpus=corpus)
    again = dataclasses.replace(run.config, data=data)
    assert _measure(program, again, run.workdir)[-1] == before


def test_tuned_settings_are_measured_beside_the_runs_own(
  run, told, monkeypatch
):
  config, workdir = run.config, run.workdir
  before = run.results()

  def rounds(settings, num_steps, texts, has_curve):
    assert (num_steps, texts, has_curve) == (4, 2, True)
    plain = search.plain(settings, num_steps)
    warm = dataclasses.replace(plain, temperature=0.9)
    return (
      search.Round("grid", lambda _: [plain, warm], 1, 2),
      search.Round("choice", lambda _: [], texts, 1),
    )

  monkeypatch.setattr(search, "rounds", rounds)
  found = tune.tune_workdir(config, workdir)
  assert found == json.loads((workdir.path / "sampling.json").read_text())
  tried = found["rounds"][-1]["tried"]
  assert [len(r["tried"]) for r in found["rounds"]] == [2, 2]
  assert found["settings"] == tried[0]["settings"]
  assert found["chosen_by"]["split"] == "validation"
  # The same checkpoint's results get a column; all else stays as it was.
  after = run.results()
  columns = ["sampling", "tuned", "untruncated", "held_out"]
  assert [k for k in after["text_metrics"] if k in columns] == columns
  for column in ("sampling", "untruncated", "held_out"):
    assert after["text_metrics"][column] == before["text_metrics"][column]
  tuned = [t for t in after["targets"] if t["texts"] == "tuned"]
  assert len(tuned) == 5
  assert after["targets"][: len(before["targets"])] == before["targets"]
  report.report_workdir(config, workdir)
  assert "tuned settings" in (workdir.path / "report.html").read_text()
  # They count as measured, and an evaluation finds the same numbers.
  measure = evaluate.evaluate_params
  monkeypatch.setattr(evaluate, "evaluate_params", None)
  run.train()
  monkeypatch.setattr(evaluate, "evaluate_params", measure)
  again = evaluate.evaluate_workdir(config, workdir)
  assert again["text_metrics"] == after["text_metrics"]
  assert again["targets"] == after["targets"]
  # With other settings than the results', they are left alone.
  other = dataclasses.replace(config.sample, seed=3)
  tune.tune_workdir(dataclasses.replace(config, sample=other), workdir)
  assert run.results() == again
  assert any("--mode=eval adds" in str(line) for line in told)


def test_a_chain_rule_that_was_interrupted_continues(run, told, monkeypatch):
  config, workdir = run.config, run.workdir
  made, calls = chain_calls.make_terms, []

  def counting(*args):
    terms = made(*args)

    def call(*args):
      if len(calls) == limit:
        raise KeyboardInterrupt
      calls.append(args)
      return terms(*args)

    return call

  few = dataclasses.replace(config.eval, batch_size=2)
  config = dataclasses.replace(config, eval=few)
  monkeypatch.setattr(chain_calls, "make_terms", counting)
  limit = 30
  with pytest.raises(KeyboardInterrupt):
    likelihood.measure_workdir(config, workdir, "orders:2")
  limit = None
  found = likelihood.measure_workdir(config, workdir, "orders:2")
  assert any("continuing: " in str(line) for line in told)
  count = len(calls)
  (workdir.path / "likelihood_orders_2.json").unlink()
  again = likelihood.measure_workdir(config, workdir, "orders:2")
  assert again == found
  # Only the texts that the interrupted calls were for are computed again.
  whole = len(calls) - count
  assert whole <= count <= whole + 8
  one, other = np.array(found["nats"])
  tokens = run.results()["tokens"]
  mean = (one.sum() + other.sum()) / 2 / tokens
  assert found["orders_2_per_token"]["value"] < mean
  # A bound of random orders, close to the NELBO of the same rows.
  assert mean == pytest.approx(run.results()["nelbo_per_token"], rel=0.05)


@pytest.mark.parametrize("spec", ["chains", "orders", "orders:0", "chain:best"])
def test_a_likelihood_that_there_is_not_is_one_line(run, spec):
  with pytest.raises(UserError, match=f"--likelihood={spec.split(':')[0]}"):
    likelihood.measure_workdir(run.config, run.workdir, spec)


def test_tuning_needs_texts(run):
  none = dataclasses.replace(run.config.eval, samples=0)
  with pytest.raises(UserError, match="config.eval.samples=64"):
    tune.tune_workdir(dataclasses.replace(run.config, eval=none), run.workdir)


def test_what_others_need_for_the_same_text_stands_beside_it(finished):
  results = finished.results()
  for found in results["baselines"].values():
    assert 0 < found["bits_per_byte"] < 8
    assert found["bytes"] == results["bytes"] > 0  # 8 of the rows
  meanings = [t["meaning"] for t in results["targets"]]
  assert any("by 8-gram model" in m and "by xz" in m for m in meanings)
