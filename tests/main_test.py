"""The programs as a user runs them: real processes, files and exit codes."""

import collections
import dataclasses
import hashlib
import json
import math
import pathlib
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from command_harness import Command, call, check_mistake, environment
from paths import ROOT

from mdm_jax import config as config_lib
from mdm_jax.sampling import trace

CONFIGS = ROOT / "configs"
# The quickstart is what most tests run; the quick fix starts from its run, and
# ablate_test runs the ablation, and imported_model_test needs a folder for
# from_causal and lora. The large ones have no text of their own: fit_test reads
# and lowers them and from_causal:full, papers_test those of the papers' texts.
OTHERS = sorted(
  {p.stem for p in CONFIGS.glob("*.py")}
  - {"quickstart", "quick_fix", "ablation", "medium", "large", "8b"}
  - {"text8", "owt", "from_causal", "lora"}
)
PLANTED = """
import pathlib
pathlib.Path(__file__).with_suffix(".ran").touch()
"""
RESULTS = {
  *("nelbo_per_token", "nelbo_stderr", "ppl_bound", "bits_per_byte"),
  *("ce_by_mask_rate", "tokens_seen", "updates", "wall_seconds"),
  *("tokens_per_second", "samples", "stage_ce", "text_metrics", "targets"),
}
# Of the masked objective; the autoregressive one has an exact likelihood.
OF_MASKED = {"nelbo_per_token", "nelbo_stderr", "ppl_bound", "stage_ce"}
OF_MASKED |= {"ce_by_mask_rate"}
OF_AUTOREGRESSIVE = {"nll_per_token", "nll_stderr", "ppl"}
WORDS = {"ce_by_mask_rate", "samples", "stage_ce", "text_metrics", "targets"}
CURVES = {
  *("train/loss", "train/learning_rate", "train/grad_norm"),
  *("train/mask_rate", "train/tokens_per_second"),
  *(f"validation/{n}" for n in ("nelbo_per_token", "ppl_bound")),
  "validation/bits_per_byte",
}
TIMINGS = {"train/tokens_per_second", "train/update_seconds"}
TIMED = ("perf/", "goodput/", "memory/", "health/")
# Of the attempt, not of the run.
ATTEMPT = {"attempts.jsonl", "exit.json"}


@dataclasses.dataclass(frozen=True)
class Run:
  """A finished training in its own current folder."""

  folder: pathlib.Path
  args: tuple[str, ...]
  out: str
  env: dict[str, str]

  @property
  def workdir(self) -> pathlib.Path:
    return self.folder / "runs" / "quickstart_quick"

  @property
  def marker(self) -> pathlib.Path:
    return self.folder / "quickstart.ran"

  def results(self) -> dict:
    return json.loads((self.workdir / "results.json").read_text())


@pytest.fixture(scope="session")
def env(tmp_path_factory):
  """Rows and programs are made once; programs are compiled in a hurry."""
  return environment(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory, env):
  """One run of the quick quickstart that most tests share."""
  folder = tmp_path_factory.mktemp("trained")
  source = (CONFIGS / "quickstart.py").read_text()
  (folder / "quickstart.py").write_text(source + PLANTED)
  args = ("--config=quickstart.py:quick", "--config.train.log_every=1")
  done = call(folder, env, *args, "--json")
  assert done.returncode == 0, done.stderr
  return Run(folder, args, done.stdout, env)


@pytest.fixture
def copied(trained, tmp_path):
  """A copy of the trained run's workdir, to be changed."""
  return shutil.copytree(trained.workdir, tmp_path / "copy")


def _last_json(done):
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


def _lines(workdir):
  path = workdir / "metrics.jsonl"
  return [json.loads(line) for line in path.read_text().splitlines()]


def _series(workdir, kind):
  """The (step, value) of every name in metrics.jsonl."""
  series = collections.defaultdict(list)
  for line in _lines(workdir):
    for name, value in line.items():
      if name != "step" and isinstance(value, kind):
        series[name].append((line["step"], value))
  return dict(series)


# MARK: a training's files


def test_results_hold_what_was_measured(trained):
  results = trained.results()
  assert set(results) >= RESULTS
  for name in RESULTS - WORDS:
    assert math.isfinite(results[name]) and results[name] > 0, name
  assert results["ppl_bound"] == pytest.approx(
    math.exp(results["nelbo_per_token"])
  )
  assert results["tokens_per_second"] == pytest.approx(
    results["tokens_seen"] / results["wall_seconds"]
  )
  rates = [float(rate) for rate in results["ce_by_mask_rate"]]
  assert rates == [round(0.05 * i, 2) for i in range(1, 21)]
  assert all(0 < ce < 10 for ce in results["ce_by_mask_rate"].values())
  assert results["updates"] in (12, 24, 36)
  assert len(results["samples"]) == 4
  assert all(isinstance(text, str) for text in results["samples"])


def test_samples_are_measured_beside_held_out_text(trained):
  results = trained.results()
  found = dict(results["text_metrics"])
  assert "8-gram" in found.pop("judge")
  assert found.pop("test text").startswith("8 texts of 128 tokens from ")
  assert list(found) == ["sampling", "untruncated", "held_out"]
  for name, measured in found.items():
    assert list(measured)[-2:] == ["copied_8gram", "judge_nll"], name
    # Pooled metrics of test text are known better from more texts.
    pooled = {n for n in measured if n.startswith(("distinct", "unique"))}
    more = pooled if name == "held_out" else set()
    assert {m["n"] for n, m in measured.items() if n not in more} == {8}
    assert all(measured[n]["n"] > 8 for n in more) and len(pooled) == 4
    assert math.isfinite(measured["unigram_entropy"]["stderr"])
  nll = {name: m["judge_nll"]["value"] for name, m in found.items()}
  assert nll["held_out"] < min(nll["sampling"], nll["untruncated"])
  entropy = {n: m["unigram_entropy"]["value"] for n, m in found.items()}
  assert entropy["sampling"] < entropy["untruncated"]  # T = 0.6 against 1
  assert [t["passed"] for t in results["targets"]].count(True) >= 1
  assert len(results["targets"]) == 8
  for word in (
    "samples, T = 1",
    "the guide's targets",
    "exp of CE at mask",
  ):
    assert word in trained.out


def test_a_sample_is_kept_step_by_step(trained):
  kept = json.loads((trained.workdir / "unmasking.json").read_text())
  steps = kept["steps"]
  assert len(steps) == 25 + 1
  masked = [step.count(None) for step in steps]
  assert masked[0] == len(steps[0]) and masked[-1] == 0
  assert masked == sorted(masked, reverse=True)
  for before, after in zip(steps, steps[1:], strict=False):
    shown = [
      (a, b) for a, b in zip(before, after, strict=True) if a is not None
    ]
    assert all(a == b for a, b in shown)


def test_what_the_stages_read_is_kept_and_told(trained, events):
  kept = json.loads((trained.workdir / "data.json").read_text())
  counts = kept["rows"]["stage_1"]
  cut, bars = counts["difficulty"]["cut"], counts["difficulty"]["histogram"]
  assert sum(bars) == counts["units_found"] > counts["units_selected"]
  assert len(counts["examples"]) == 5
  told = _text(events, "data/1 I foundational")[0]
  for text in (told, trained.out):
    assert f"cut at {cut:.3f}" in text
    assert f"the easiest {counts['units_selected']:,} of" in text


def test_the_last_line_is_the_results(trained):
  assert json.loads(trained.out.splitlines()[-1]) == trained.results()


def test_the_workdir_is_named_after_the_config(trained):
  saved = json.loads((trained.workdir / "config.json").read_text())
  assert saved["name"] == trained.workdir.name == "quickstart_quick"


def test_config_versions_and_tokenizer_are_saved(trained):
  saved = json.loads((trained.workdir / "config.json").read_text())
  config = config_lib.from_dict(saved)
  assert config.train.log_every == 1
  assert config_lib.to_dict(config) == saved
  versions = json.loads((trained.workdir / "versions.json").read_text())
  assert versions["packages"]["jax"] == jax.__version__
  content = (trained.workdir / "tokenizer.model").read_bytes()
  digest = hashlib.sha256(content).hexdigest()
  assert versions["tokenizer_sha256"] == digest


def test_training_learns(trained):
  series = _series(trained.workdir, float)
  losses = [loss for _, loss in series["train/loss"]]
  bounds = [bound for _, bound in series["validation/nelbo_per_token"]]
  assert np.mean(losses[-8:]) < np.mean(losses[:4]) - 0.5
  assert bounds == sorted(bounds, reverse=True)


def test_every_update_is_logged_once(trained):
  series = _series(trained.workdir, float)
  assert [step for step, _ in series["train/loss"]] == list(range(1, 37))
  evaluated = [step for step, _ in series["validation/nelbo_per_token"]]
  assert evaluated == [12, 24, 36]


# MARK: TensorBoard


@pytest.fixture(scope="session")
def events(trained):
  """What TensorBoard reads back."""
  return _events(trained.workdir)


def _events(workdir):
  accumulators = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator"
  )
  sizes = {"scalars": 0, "tensors": 0}
  found = accumulators.EventAccumulator(str(workdir / "tensorboard"), sizes)
  return found.Reload()


def _text(events, name):
  return {
    e.step: e.tensor_proto.string_val[0].decode()
    for e in events.Tensors(f"{name}/text_summary")
  }


def test_tensorboard_shows_every_curve(events):
  assert set(events.Tags()["scalars"]) >= CURVES


def test_tensorboard_and_metrics_file_hold_the_same(trained, events):
  series = _series(trained.workdir, (int, float))
  # TensorBoard has these twice: it shows them first.
  first = "train/loss", "validation/nelbo_per_token"
  tags = set(series) | {f"curves/{name}" for name in first}
  assert sorted(tags) == sorted(events.Tags()["scalars"])
  assert min(tags) == "curves/train/loss"
  for name, points in series.items():
    shown = [(e.step, e.value) for e in events.Scalars(name)]
    assert shown == [(step, np.float32(value)) for step, value in points]


def test_tensorboard_shows_samples_of_each_evaluation(trained, events):
  written = _series(trained.workdir, str)
  for i in range(4):
    shown = _text(events, f"samples/{i}")
    assert sorted(shown) == [12, 24, 36]
    for step, text in written[f"samples/{i}"]:
      lines = [line[4:] for line in shown[step].split("\n")]
      assert lines == (text.splitlines() or [""])


def test_tensorboard_shows_the_config(events):
  text = _text(events, "config")[0]
  for word in ("quickstart_quick", "learning_rate", "III refinement"):
    assert word in text


# MARK: the same command again


def test_a_finished_run_says_so_and_stays_as_it_is(trained):
  files = [
    p
    for p in trained.workdir.rglob("*")
    if p.is_file() and p.name not in ATTEMPT
  ]
  before = {p: p.read_bytes() for p in files}
  done = call(trained.folder, trained.env, *trained.args, "--json")
  assert _last_json(done) == trained.results()
  assert "finished" in done.stdout
  assert {p: p.read_bytes() for p in before} == before
  after = {p for p in trained.workdir.rglob("*") if p.is_file()}
  assert {p for p in after if p.name not in ATTEMPT} == set(files)
  told = json.loads((trained.workdir / "exit.json").read_text())
  assert told["code"] == 0 and told["committed"] == 36


def test_another_model_does_not_spoil_a_finished_run(trained, copied):
  before = (copied / "config.json").read_text()
  wide = "--config.model.embed_dim=32"
  call(trained.folder, trained.env, *trained.args, f"--workdir={copied}", wide)
  assert (copied / "config.json").read_text() == before


def test_another_model_can_not_resume(trained, copied):
  before = (copied / "config.json").read_text()
  done = call(
    *(trained.folder, trained.env, *trained.args),
    *(f"--workdir={copied}", "--config.model.embed_dim=32"),
    "--config.stages[2].updates=20",
  )
  assert done.returncode == 2, done.stderr
  assert done.stderr.startswith("error: this run was started with other")
  assert "model.embed_dim" in done.stderr and "Traceback" not in done.stderr
  assert (copied / "config.json").read_text() == before


def _interrupt(folder, env, args, workdir, number, after):
  """Starts a run and sends it a signal after so many logged updates."""
  process = Command(folder, env, "mdm_jax.main", *args, f"--workdir={workdir}")
  try:
    log = workdir / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
      steps = log.read_text().count("train/loss") if log.exists() else 0
      if steps >= after:
        process.send_signal(number)
        break
      time.sleep(0.02)
    out, err = process.communicate(timeout=100)
    return process.returncode, out + err
  finally:
    process.kill()


@pytest.mark.slow  # faults_test has the like of it in every run
def test_signals_save_and_the_run_continues_bit_for_bit(trained, tmp_path):
  workdir = tmp_path / "interrupted"
  parts = (trained.folder, trained.env, trained.args, workdir)
  stopped = []
  for number, after in ((signal.SIGTERM, 3), (signal.SIGINT, 15)):
    code, out = _interrupt(*parts, number, after)
    assert code == 42, out
    assert number.name in out and "resumes" in out
    stopped.append(len(_series(workdir, float)["train/loss"]))
    assert (workdir / "checkpoints" / str(stopped[-1])).is_dir()
  assert 3 <= stopped[0] < stopped[1] < 36
  assert not (workdir / "results.json").exists()
  done = call(
    trained.folder, trained.env, *trained.args, f"--workdir={workdir}"
  )
  assert done.returncode == 0, done.stderr
  assert f"at update {stopped[1]}" in " ".join(done.stdout.split())

  _check_same(trained, workdir)


@pytest.mark.slow  # faults_test has the like of it in every run
def test_a_crash_resumes_from_the_last_checkpoint(trained, copied):
  # As if it had been killed while it saved.
  (copied / "checkpoints" / "36" / "manifest.json").unlink()
  log = copied / "checkpoints.jsonl"
  log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
  (copied / "results.json").unlink()
  with (copied / "metrics.jsonl").open("a") as file:
    file.write('{"step": 36, "train/lo')
  done = call(trained.folder, trained.env, *trained.args, f"--workdir={copied}")
  assert done.returncode == 0, done.stderr
  assert "at update 24" in " ".join(done.stdout.split())
  _check_same(trained, copied)


def _check_same(trained, workdir):
  """A run in pieces has the numbers and texts of the one in one piece."""
  whole, resumed = (
    _series(w, (int, float, str)) for w in (trained.workdir, workdir)
  )
  assert set(resumed) == set(whole)
  for name in (n for n in set(whole) - TIMINGS if not n.startswith(TIMED)):
    assert resumed[name] == whole[name], name
  shown = [e.step for e in _events(workdir).Scalars("train/loss")]
  assert shown == list(range(1, 37))
  results = json.loads((workdir / "results.json").read_text())
  for name in RESULTS - {"wall_seconds", "tokens_per_second"}:
    assert results[name] == trained.results()[name], name


# MARK: evaluation and samples, from the workdir alone


def test_evaluation_needs_only_the_workdir(trained, copied):
  trained.marker.unlink(missing_ok=True)
  (copied / "results.json").write_text("{}")
  done = call(
    trained.folder, trained.env, "--mode=eval", f"--workdir={copied}", "--json"
  )
  results = _last_json(done)
  assert results == json.loads((copied / "results.json").read_text())
  assert results == trained.results()
  assert not trained.marker.exists()


def test_samples_begin_with_the_prompt(trained):
  trained.marker.unlink(missing_ok=True)
  prompt = "Fellow citizens,\n we  "
  args = ["--mode=sample", f"--workdir={trained.workdir}", "--json"]
  args += [f"--prompt={prompt}", "--num_samples=3"]
  texts = _last_json(call(trained.folder, trained.env, *args))
  assert len(texts) == 3
  given = prompt.removesuffix(" ")  # the last is the next word's own
  assert all(text.startswith(given) for text in texts)
  assert any(len(text) > len(prompt) for text in texts)
  changed = ["--config.sample.temperature=0.3", "--config.sample.top_k=None"]
  others = _last_json(call(trained.folder, trained.env, *args, *changed))
  assert len(others) == 3 and others != texts
  assert all(text.startswith(given) for text in others)
  assert not trained.marker.exists()


def test_samples_without_a_prompt_are_those_of_the_evaluation(
  trained, tmp_path
):
  env = trained.env | {"XDG_CACHE_HOME": str(tmp_path)}
  del env["JAX_COMPILATION_CACHE_DIR"]
  done = call(
    *(trained.folder, env, "--mode=sample", "--json"),
    f"--workdir={trained.workdir}",
  )
  texts = _last_json(done)
  assert texts == trained.results()["samples"]
  assert done.stdout.count("── sample ") == len(texts)
  assert list((tmp_path / "mdm_jax" / "xla").iterdir())


def test_how_samples_were_drawn_is_shown_and_stored(trained, copied, tmp_path):
  page = tmp_path / "page.html"
  args = ["--mode=sample", f"--workdir={copied}", "--num_samples=2", "--json"]
  args += ["--prompt=The [MASK:4] of", "--trace", f"--html={page}"]
  args += ["--config.sample.order=margin"]
  done = call(trained.folder, trained.env, *args)
  texts = _last_json(done)
  assert all(text.startswith("The") for text in texts)
  assert all(text.endswith(" of") for text in texts)
  lines = [line for line in done.stdout.splitlines() if "1 new" in line]
  assert len(lines) == 4  # four tokens, one a step
  samples, settings = trace.load(copied / "samples")
  assert samples.texts == texts
  assert settings["order"] == "margin"
  assert samples.calls.tolist() == [4, 4]
  assert page.read_text() == (copied / "samples" / "samples.html").read_text()
  assert (copied / "samples" / "samples.svg").read_text().startswith("<svg ")


def test_prompts_can_be_typed(trained):
  typed = ["We", "/temperature 0.4", "We", "/ordr x", "/top_k", "[MASK:x]"]
  typed += ["/seed 3", "/settings", "/num_steps 5", "We [MASK:2]", "/quit"]
  done = call(
    *(trained.folder, trained.env, "--mode=sample", "--interactive", "--json"),
    f"--workdir={trained.workdir}",
    typed="\n".join([*typed, "not read"]),
  )
  texts = _last_json(done)
  assert len(texts) == 3
  assert all(text.startswith("We") for text in texts)
  assert texts[0] != texts[1]
  assert done.stderr.count("error: ") == 2
  assert "did you mean 'order'" in done.stderr
  assert "[MASK:x] is not a valid mask" in done.stderr
  for told in ("temperature 0.4", "seed 3", "num_steps 5", "2 denoiser calls"):
    assert told in done.stdout, told


@pytest.mark.slow  # evaluate_test has it in its own process
def test_ways_to_draw_are_compared(trained, copied):
  args = ["--mode=compare", f"--workdir={copied}", "--config.eval.samples=4"]
  args += ["--config.sample.length=30", "--json", "--ways=threshold"]
  rows = _last_json(call(trained.folder, trained.env, *args))
  assert [row["settings"] for row in rows] == [
    *(f"confidence, threshold {t}" for t in (0.5, 0.2)),
    "validation text",
  ]
  assert all(0 < row["calls"] <= 30 and row["n"] == 4 for row in rows[:-1])
  assert len((copied / "ways.csv").read_text().splitlines()) == 4
  assert len((copied / "ways.md").read_text().splitlines()) == 5
  assert (copied / "ways.png").read_bytes().startswith(b"\x89PNG")


# MARK: before a training, and after it


def test_the_plan_is_printed_without_training(env, tmp_path):
  done = call(tmp_path, env, QUICK, "--json", module="mdm_jax.plan")
  plan = _last_json(done)
  assert [s["updates"] for s in plan["stages"]] == [12, 12, 12]
  assert all(s["seconds"] > 0 for s in plan["stages"])
  assert plan["seconds"] == pytest.approx(
    sum(s["seconds"] for s in plan["stages"])
  )
  assert plan["laws"]["in_fitted_range"] is False
  assert f"{plan['params']:,} parameters" in done.stdout
  assert not (tmp_path / "runs").exists()


def test_the_data_is_printed_without_training(env, trained, tmp_path):
  short = "--config.objective=masked"  # for objective.name
  done = call(tmp_path, env, "--mode=data", QUICK, short, "--json")
  kept = json.loads((trained.workdir / "data.json").read_text())
  assert _last_json(done) == kept
  assert "cut at" in done.stdout
  assert not (tmp_path / "runs").exists()


def test_the_report_needs_only_the_workdir(trained, copied):
  args = ["--mode=report", f"--workdir={copied}"]
  done = call(trained.folder, trained.env, *args, "--json")
  assert _last_json(done) == str(copied / "report.html")
  page = (copied / "report.html").read_text()
  results = trained.results()
  for word in (f"{results['bits_per_byte']:.4f}", "III refinement", "<svg"):
    assert word in page
  (copied / "results.json").unlink()  # a run that goes on has a page too
  assert call(trained.folder, trained.env, *args).returncode == 0
  assert "--mode=eval" in (copied / "report.html").read_text()


@pytest.mark.slow  # evaluate_test has it in its own process
def test_the_frontier_is_a_table_and_a_plot(trained, copied):
  args = ["--mode=frontier", f"--workdir={copied}", "--json"]
  done = call(trained.folder, trained.env, *args)
  points = _last_json(done)
  header, *lines = (copied / "frontier.csv").read_text().splitlines()
  assert header.startswith("settings,num_steps,calls,judge_nll,") and len(
    lines
  ) == len(points)
  swept = [p for p in points if p["settings"].startswith("T = ")]
  assert len(swept) == 8 and points[-1]["settings"] == "validation text"
  assert swept[0]["unigram_entropy"] < swept[-1]["unigram_entropy"]
  own = trained.results()["text_metrics"]["sampling"]["judge_nll"]["value"]
  assert points[0]["judge_nll"] == pytest.approx(own)
  assert (copied / "frontier.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_quick_fix_starts_from_a_finished_run(trained, env, tmp_path):
  config = f"--config={CONFIGS / 'quick_fix.py'}:quick"
  check_mistake(call(tmp_path, env, config), "init_from", "runs/baseline")
  given = [f"--config.init_from={trained.workdir}"]
  # What the quickstart's model has and the guide's hasn't.
  given += ["--config.model.qkv_bias=True", "--config.model.rope_theta=100"]
  done = call(tmp_path, env, config, *given, "--config.train.log_every=1")
  assert done.returncode == 0, done.stderr
  assert "starting from the parameters of" in done.stdout
  losses = _series(tmp_path / "runs" / "quick_fix_quick", float)["train/loss"]
  assert len(losses) == 12  # the last stage alone
  first = _series(trained.workdir, float)["train/loss"][0][1]
  assert losses[0][1] < first - 0.5  # nothing was learned in one update
  results = tmp_path / "runs" / "quick_fix_quick" / "results.json"
  assert set(json.loads(results.read_text())) >= RESULTS


# MARK: every config


@pytest.mark.slow  # recipe_test trains some updates of the recommended one
@pytest.mark.parametrize("name", OTHERS)
def test_every_config_runs_quickly(name, env, tmp_path):
  done = call(tmp_path, env, f"--config={CONFIGS / name}.py:quick", "--json")
  results = _last_json(done)
  workdir = tmp_path / "runs" / f"{name}_quick"
  assert results == json.loads((workdir / "results.json").read_text())
  exact = name in ("autoregressive", "shakespeare")
  own = OF_AUTOREGRESSIVE if exact else OF_MASKED
  # Bytes are those of whole texts, and answers are only a part.
  parts = name in ("sft", "infill")
  left_out = {"bits_per_byte", "text_metrics"} if parts else set()
  assert set(results) >= (RESULTS - OF_MASKED - left_out) | own
  assert math.isfinite(results["nll_per_token" if exact else "nelbo_per_token"])
  if name == "infill":
    args = ["--mode=infill", f"--workdir={workdir}", "--config.eval.samples=4"]
    found = _last_json(call(tmp_path, env, *args, "--json"))
    assert found["holes"] == 4 and "learned" in found["lengths"]
    for way in ("untold", "together"):
      assert found[f"nats_{way}"]["value"] > 0


# MARK: mistakes

QUICK = f"--config={CONFIGS / 'quickstart.py'}:quick"
# The commonest ones are those of fault 36, in data/faults_test.py.
MISTAKES = {
  "section": ([QUICK, "--config.dat.batch_size=4"], "dat;|'data'"),
  "stage_field": ([QUICK, "--config.stages[0].lenth=4"], "lenth|'length'"),
  "stage_index": ([QUICK, "--config.stages[9].length=4"], "stage"),
  "none": ([QUICK, "--config.data.batch_size=None"], "data.batch_size|None"),
  "fraction": ([QUICK, "--config.data.batch_size=4.5"], "data.batch_size|4.5"),
  "boolean": ([QUICK, "--config.model.qk_norm=maybe"], "qk_norm|maybe"),
  "section_value": ([QUICK, "--config.data=3"], "config.data"),
  "range": ([QUICK, "--config.sample.top_p=2"], "sample.top_p|[0, 1]"),
  "rates": (
    [QUICK, "--config.stages[0].mask_rate=(0.5,2)"],
    "mask_rate|[0, 1]",
  ),
  "config": (["--config=nothing.py"], "nothing.py|does not exist"),
  "near": ([f"--config={CONFIGS / 'quickstrt.py'}"], "quickstart.py"),
  "config_argument": ([QUICK[:-5] + "quik"], "'quik'|'quick'"),
  "no_value": (["--config"], "config"),
  "nothing": ([], "--config|--workdir"),
  "mode": ([QUICK, "--mode=evl"], "evl|eval"),
  "number": ([QUICK, "--num_samples=x"], "num_samples"),
  "zero": ([QUICK, "--num_samples=0"], "num_samples=0|[1, "),
  "prompts": (
    [QUICK, "--mode=sample", "--prompt=a", "--prompts=b", "--interactive"],
    "give only one of --prompt, --prompts, --interactive",
  ),
  "extra": ([QUICK, "extra"], "'extra'"),
  "corpus": ([QUICK, "--config.data.corpus=sotv"], "data.corpus|'sotu'"),
  "text": ([QUICK, "--config.data.corpus=text:none/*.txt"], "none|not exist"),
  "judge": ([QUICK, "--config.eval.judge=hf:none"], "eval.judge|config.json"),
  "mesh": ([QUICK, "--config.mesh.fsdp=3"], "fsdp=3|1 device"),
  "no_run": (["--mode=eval", "--workdir=none"], "none|config.json"),
  "empty_run": (["--mode=sample", "--workdir=."], "config.json"),
  "stages": (
    [
      *(QUICK, "--config.stages[1].min_words=900"),
      "--config.stages[1].max_words=None",
    ],
    "stages[1] has no",
  ),
  "words": ([QUICK, "--config.stages[1].min_words=900"], "max_words=100"),
}
BROKEN = {
  "syntax": ("def get_config(:\n", "line 1"),
  "no_function": ("x = 1\n", "get_config"),
  "no_argument": ("def get_config():\n  return 1\n", "get_config"),
  "import": ("\nimport no_such_module\n", "line 2|no_such_module"),
  "typo": (
    "from mdm_jax import config\n\n\ndef get_config(arg=''):\n"
    "  c = config.default_config()\n  c.data.batchsize = 4\n  return c\n",
    "line 6|batch_size",
  ),
  "wrong_type": (
    "from mdm_jax import config\n\n\ndef get_config(arg=''):\n"
    "  c = config.default_config()\n  c.data.batch_size = 'x'\n  return c\n",
    "line 6|batch_size",
  ),
  "stage": (
    "from mdm_jax import config\n\n\ndef get_config(arg=''):\n"
    "  c = config.default_config()\n  c.stages = (config.stage(lenth=4),)\n"
    "  return c\n",
    "lenth|'length'",
  ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, env, tmp_path):
  args, words = MISTAKES[name]
  check_mistake(call(tmp_path, env, *args), *words.split("|"))


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_config_file_is_one_line(name, env, tmp_path):
  source, words = BROKEN[name]
  (tmp_path / "broken.py").write_text(source)
  done = call(tmp_path, env, "--config=broken.py:x")
  check_mistake(done, *words.split("|"))


def test_a_model_that_devices_can_not_divide(env, tmp_path):
  env = env | {"JAX_NUM_CPU_DEVICES": "3"}
  done = call(tmp_path, env, QUICK)
  check_mistake(done, "model.embed_dim=64", "mesh.replica=-1 with mesh.fsdp=1")


def test_a_prompt_that_is_too_long(trained):
  args = ["--mode=sample", f"--workdir={trained.workdir}"]
  done = call(trained.folder, trained.env, *args, f"--prompt={'We ' * 99}")
  check_mistake(done, "prompt", "sample.length")


def test_a_run_without_a_checkpoint(trained, tmp_path):
  for name in ("config.json", "versions.json", "tokenizer.model"):
    shutil.copy(trained.workdir / name, tmp_path)
  args = ["--mode=sample", f"--workdir={tmp_path}"]
  done = call(trained.folder, trained.env, *args)
  check_mistake(done, "no checkpoint yet")


def test_a_run_with_another_tokenizer(trained, copied):
  versions = json.loads((copied / "versions.json").read_text())
  versions["tokenizer_sha256"] = "0" * 64
  (copied / "versions.json").write_text(json.dumps(versions))
  for mode in ("eval", "sample"):
    args = [f"--mode={mode}", f"--workdir={copied}"]
    done = call(trained.folder, trained.env, *args)
    check_mistake(done, "another tokenizer")


def test_a_field_from_the_command_line_is_used(env, tmp_path):
  done = call(
    *(tmp_path, env, QUICK, "--config.mesh.fsdp=3", "--workdir=w"),
  )
  check_mistake(done, "mesh")
