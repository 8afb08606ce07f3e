"""The study of repeated text: its cells, their text, and what is reported."""

import dataclasses
import json
import re
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest
from command_harness import environment

from mdm_jax import config as config_lib
from mdm_jax.core.errors import Stopped, UserError
from mdm_jax.planning import data_reuse, scaling_laws
from mdm_jax.studies import cell_plot, cell_report, cell_runs, cell_text, cells
from mdm_jax.studies.cells import PRESETS, Cell, Setting

NIGHT, QUICK = PRESETS["night"], PRESETS["quick"]
BEST = Setting(rate=2.0, decay=0.8, dropout=0.1)


LEAST = dataclasses.replace(BEST, rate=1.0)  # the best with the least text


def _loss(cell):
  """The lowest at `BEST`, and with the least text at `LEAST`."""
  s, best = cell.setting, LEAST if cell.part == 128 else BEST
  wrong = abs(s.rate - best.rate), abs(s.decay - 0.8), abs(s.dropout - 0.1)
  return 2.0 + sum(wrong) + cell.seed / 100


def _all_losses(preset):
  losses = {}
  while todo := cells.left(preset, losses):
    losses[todo[0]] = _loss(todo[0])
  return losses


def _found(losses):
  return {cell: {"validation": loss} for cell, loss in losses.items()}


def test_every_arm_runs_untuned_first_then_is_tuned_then_compared():
  losses = _all_losses(NIGHT)
  order = list(losses)
  # Tuning at two amounts; three seeds of two sizes and amounts, without those;
  # and at the middle, where the largest rate is best, a larger one.
  whole = 4 * (2 * 8 + (3 + 3) * 3 - 2)
  assert cells.count(NIGHT, {}) == whole == 128
  assert len(order) == cells.count(NIGHT, _found(losses)) == whole + 4
  assert [c.arm for c in order[:4]] == list(NIGHT.arms)
  # 8 settings an arm, all of them at the middle and with one seed; the rate of
  # every arm is tuned before the decay of any.
  tuned = order[:32]
  assert {(c.part, c.size, c.seed) for c in tuned} == {(32, "small", 0)}
  assert [c.setting.decay for c in order[:12]] == [0.1] * 12
  further = order[32:36]
  assert [c.arm for c in further] == list(NIGHT.arms)
  assert {(c.part, c.setting) for c in further} == {
    (32, dataclasses.replace(BEST, rate=4.0))
  }
  # With the least text again, from what is best at the middle.
  again = order[36:68]
  assert {(c.part, c.size, c.seed) for c in again} == {(128, "small", 0)}
  assert [c.setting for c in again if c.arm == "ar"][:3] == [
    dataclasses.replace(BEST, rate=rate) for rate in (0.5, 1.0, 2.0)
  ]
  final = order[68:]
  for cell in final:
    assert cell.setting == (LEAST if cell.part == 128 else BEST)
  # Seed 0 for the other amounts; then all for other seeds.
  assert [(c.part, c.seed) for c in final[::4]] == [
    (8, 0),
    *((32, 1), (128, 1), (8, 1)),
    *((32, 2), (128, 2), (8, 2)),
    *((part, seed) for seed in range(3) for part in (32, 128, 8)),
  ]
  # The larger model last, with the settings of the small one.
  assert [c.size for c in final] == ["small"] * (len(final) - 36) + (
    ["medium"] * 36
  )


def test_a_tuned_field_is_tried_with_the_best_of_those_before_it():
  losses = {
    Cell("ar", 32, "small", 0, Setting(rate=r)): abs(r - 2)
    for r in (0.5, 1.0, 2.0)
  }
  tuning = cells.tuning(NIGHT, "ar", 32, losses)
  assert tuning.best == Setting(rate=2.0) and tuning.fields == 1
  settings = [c.setting for c in tuning.missing]
  assert settings == [Setting(2.0, decay) for decay in (0.4, 0.8, 1.6)]
  # Other amounts have it until then, and are not tuned before it.
  for part in (8, 128):
    other = cells.tuning(NIGHT, "ar", part, losses)
    assert other == cells.Tuning(Setting(rate=2.0), [], 0)


def test_larger_values_are_tried_as_long_as_they_help():
  # Best at dropout 0.4 and at weight decay 3.2, of which 0.2 and 1.6 are the
  # largest of the grid; learning rates are best within it.
  def loss(cell):
    s = cell.setting
    return abs(s.rate - 1) + abs(s.decay - 3.2) + abs(s.dropout - 0.4)

  losses, tried = {}, []
  while missing := cells.tuning(NIGHT, "ar", 32, losses).missing:
    tried += [cell.setting for cell in missing]
    losses |= {cell: loss(cell) for cell in missing}
  middle = cells.tuning(NIGHT, "ar", 32, losses)
  assert tried[-5:] == [
    *(Setting(1.0, 3.2, 0.2), Setting(1.0, 6.4, 0.2)),
    *(Setting(1.0, 3.2, 0.3), Setting(1.0, 3.2, 0.4), Setting(1.0, 3.2, 0.5)),
  ]
  assert middle.best == Setting(1.0, 3.2, 0.4) and middle.is_finished(NIGHT)
  elsewhere = Cell("ar", 32, "small", 0, Setting(8.0, 3.2, 0.2))
  lower = losses | {elsewhere: -1.0}
  assert cells.tuning(NIGHT, "ar", 32, lower).best == elsewhere.setting
  # An amount that isn't tuned has it; another one begins within the grid.
  assert cells.tuning(NIGHT, "ar", 8, losses).best == middle.best
  begin = cells.tuning(NIGHT, "ar", 128, losses)
  assert begin.best == Setting(1.0, 1.6, 0.2) and len(begin.missing) == 3


def test_cells_of_a_setting_that_is_no_longer_the_best_are_no_part_of_it():
  losses = _all_losses(NIGHT)
  stale = [Cell("plain", 128, "small", seed, BEST) for seed in (0, 1, 2)]
  assert stale[0] in losses  # it was tried
  found = _found(losses) | {cell: {"validation": 9.0} for cell in stale[1:]}
  kept = cells.in_study(NIGHT, found)
  assert list(kept) == list(losses)


# MARK: the text


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  folder = tmp_path_factory.mktemp("text")
  return cell_text.write_text("python_docs", NIGHT, folder, 400_000)


def _documents(text, name):
  lines = (text.folder / f"{name}.jsonl").read_text().splitlines()
  return [json.loads(line)["text"] for line in lines]


def test_parts_of_the_text_are_nested_and_held_out_text_is_none_of_them(text):
  whole = _documents(text, "train_1_1")
  small, middle, large = (
    _documents(text, f"train_1_{n}") for n in (128, 32, 8)
  )
  assert small == middle[: len(small)] and middle == large[: len(middle)]
  assert large == whole[: len(large)] and len(small) >= 2
  assert 3.5 < text.characters["train_1_8"] / text.characters["train_1_32"] < 5
  held = [*_documents(text, "validation"), *_documents(text, "test")]
  assert not {*held} & {*whole}
  assert sum(map(len, [*whole, *held])) == pytest.approx(400_000, abs=1000)


def test_all_cells_are_measured_on_the_same_text(text):
  names = {}
  for cell in _all_losses(NIGHT):
    config = cell_runs.config_of(cell, NIGHT, text)
    config = config_lib.from_config_dict(config)  # all of them are valid
    data, setting = config.data, cell.setting
    assert data.corpus.endswith(f"train_1_{cell.part}.jsonl")
    # Only how often differs: the curve of autoregression has a sharp minimum.
    assert config.eval.every == (50 if cell.arm in cells.IS_AR else 200)
    measured = dataclasses.replace(config.eval, every=1)
    names[data.validation_corpus, data.test_corpus, measured] = cell
    assert config.optimizer.learning_rate == NIGHT.rate * setting.rate
    assert config.optimizer.weight_decay == setting.decay
    assert config.model.dropout == setting.dropout
    updates = sum(stage.updates for stage in config.stages)
    assert updates == NIGHT.updates and config.optimizer.min_lr_ratio == 1
  assert len(names) == 1


def test_too_little_text_is_said(tmp_path):
  (tmp_path / "a.txt").write_text("To be, or not.\n" * 900)
  with pytest.raises(UserError, match="13,499 characters, too few"):
    cell_text.write_text(str(tmp_path / "a.txt"), NIGHT, tmp_path / "w", None)


# MARK: runs


def _write_log(folder, losses, every=10):
  lines = [
    json.dumps({"step": every * (i + 1), "validation/bits_per_byte": loss})
    for i, loss in enumerate(losses)
  ]
  (folder / "metrics.jsonl").write_text("\n".join(["{}", *lines]) + "\n")


@pytest.mark.parametrize(
  "losses, reason",
  [
    ([4.0, 3.0, 3.5], None),  # 30 of 60 updates: the best is 20 of 30
    ([4.0, 3.0, 3.5, 3.6], "overfits since update 20"),
    ([3.0, 3.1], None),  # twice the best, but in the first 30 updates
    ([3.0, 3.1, 2.9, 2.8, 2.7, 2.6], None),
  ],
)
def test_a_run_ends_when_it_is_twice_as_old_as_its_best(
  tmp_path, losses, reason
):
  _write_log(tmp_path, losses)
  workdir = cell_runs.Workdir(tmp_path)
  # Made anew, as at a resume: only the log decides.
  assert cell_runs._StopWhenOverfitting(workdir, 30.0, 10).reason() == reason


def test_the_recipe_does_not_end_in_its_first_stages(text):
  least = {}
  for arm in NIGHT.arms:
    config = cell_runs.config_of(Cell(arm, 32, "small", 0), NIGHT, text)
    least[arm] = cell_runs._least(config_lib.from_config_dict(config))
  assert least == {"ar": 1600, "plain": 1600, "ar_masked": 1600} | {
    "recipe": 1600 + round(0.21 * 16_000)
  }


def test_the_seconds_of_a_stopped_cell_are_added_up(
  tmp_path, text, monkeypatch
):
  def train(config, workdir, hooks):
    workdir.create()
    raise Stopped("a signal")

  clock = iter([0.0, 30.0, 100.0, 112.0])
  monkeypatch.setattr(cell_runs, "_cpu_seconds", lambda: next(clock))
  monkeypatch.setattr(cell_runs, "train_and_evaluate", train)
  cell = Cell("ar", 32, "small", 0)
  for _ in range(2):
    with pytest.raises(Stopped):
      cell_runs.run(cell, NIGHT, text, tmp_path)
  spent = json.loads((tmp_path / cell.name / "cpu_seconds.json").read_text())
  assert spent == {"seconds": 42.0}


def _cell_json(cell, text, preset=NIGHT, **more):
  epochs = np.geomspace(1, 50, 12)
  loss = _loss(cell) + np.abs(np.log(epochs / 20)) / 10
  bound = cell.arm in ("plain", "recipe")
  chain = {"chain_rule": {"value": 2.4, "stderr": 0.1}} if bound else {}
  return {
    **cell_runs._what(cell, preset, text),
    "updates": 100,
    "best_update": 40,
    "bits_per_byte": {"value": 2.5, "stderr": 0.1},
    "is_bound": bound,
    "baselines": {"ngram": 2.7},
    "curve": [[x, y] for x, y in zip(epochs, loss, strict=True)],
    "validation": float(loss.min()),
    "cpu_seconds": 60.0,
    **chain,
    **more,
  }


def test_finished_cells_are_read_back_and_those_of_another_text_refused(
  tmp_path, text
):
  cell = Cell("plain", 32, "small", 1, BEST)
  folder = tmp_path / cell.name
  folder.mkdir()
  found = _cell_json(cell, text)
  (folder / "cell.json").write_text(json.dumps(found))
  read = cell_runs.finished(NIGHT, text, tmp_path)
  assert read == {cell: found}
  (folder / "cell.json").write_text(json.dumps(found | {"text": "other"}))
  with pytest.raises(UserError, match="another text: other, now"):
    cell_runs.finished(NIGHT, text, tmp_path)


def test_a_study_goes_on_from_the_cells_that_were_published(
  tmp_path, text, capsys
):
  file = tmp_path / "study.json"
  assert cell_runs.published(file, NIGHT, text) == {}
  cell = Cell("plain", 32, "small", 1, BEST)
  found = {cell: _cell_json(cell, text)}
  content = cell_report.as_json(NIGHT, found, {"characters": 1})
  file.write_text(json.dumps(content))
  assert cell_runs.published(file, NIGHT, text) == found
  assert not capsys.readouterr().out
  larger = _cell_json(Cell("ar", 32, "small", 2), text)
  larger["run"] = larger["run"] | {"updates": 17_000}
  unknown = _cell_json(cell, text) | {"cell": cells.plain(cell)}
  unknown["cell"]["size"] = "large"
  content["cells"] += [larger, unknown]
  file.write_text(json.dumps(content))
  assert cell_runs.published(file, NIGHT, text) == found
  assert "2 cells of another text" in capsys.readouterr().out


# MARK: the report


def test_a_partial_study_says_so_and_shows_what_it_has(text):
  losses = list(_all_losses(NIGHT))[:6]
  found = {cell: _cell_json(cell, text) for cell in losses}
  about = {"characters": 400_000, "sha256": text.sha256}
  page = cell_report.as_markdown(NIGHT, found, about, "the command")
  assert "a partial result: 6 of 128 cells; 360 CPU seconds" in page
  assert "next `ar-1_32-small-seed0-rate2-decay0.1-dropout0`" not in page
  following = cells.left(NIGHT, cells.losses_of(found))[0]
  assert f"Not finished: 122, next `{following.name}`" in page
  size = text.characters["train_1_32"]
  assert f"| small, {size:,}, ar | 1 of 3 | 2.500 ± 0.100 | - |" in page
  line = f"| small, {size:,}, plain | 1 of 3 | <= 2.500 ± 0.100 | 2.400 ± 0.100"
  assert line in page and f"| {size:,}, ngram |  | 2.700 |" in page
  assert "decay 0.1, dropout 0 (0 of 3 tuned)" in page
  assert "no fit: too few amounts of text" in page
  content = cell_report.as_json(NIGHT, found, about)
  assert not content["is_complete"] and len(content["cells"]) == 6
  assert cell_plot.as_png(NIGHT, found).startswith(b"\x89PNG")


def test_a_complete_study_has_every_seed_and_nothing_left(text):
  found = {c: _cell_json(c, text) for c in _all_losses(NIGHT)}
  page = cell_report.as_markdown(
    NIGHT, found, {"characters": 1, "sha256": ""}, ""
  )
  assert "from all 132 of 132 cells" in page and "Not finished" not in page
  assert len(re.findall(r"\| 3 of 3 \|", page)) == 2 * 3 * 4
  assert (
    page.count(
      "with 1/32 of the text, learning rate x 2, weight decay 0.8, dropout 0.1"
      " (3 of 3 tuned); with 1/128 of the text, learning rate x 1, weight"
    )
    == 4
  )
  for part, rate in ((32, 2), (128, 1)):
    size = text.characters[f"train_1_{part}"]
    assert f"| {size:,}, ar (chosen) | {rate} | 0.8 | 0.1 | 2.0" in page
  assert "| small, recipe | - | not fitted: its stages differ |" in page
  assert re.search(r"\| medium, plain \| \d+ \| \d+ to \d+, error", page)
  # A row of plots for each size: three amounts of text, and the test text.
  image = cell_plot.as_png(NIGHT, found)
  assert struct.unpack(">II", image[16:24]) == (4 * 440, 2 * 495)


def test_the_recipe_is_compared_at_equal_updates_and_slow_runs_are_named(text):
  def run(arm, losses):
    cell = Cell(arm, 32, "small", 0, NIGHT.start)
    all_epochs = NIGHT.updates * 1024 / text.characters["train_1_32"]
    epochs = np.linspace(0.25, 1, 4) * all_epochs
    curve = [[x, y] for x, y in zip(epochs.tolist(), losses, strict=True)]
    return {cell: _cell_json(cell, text, curve=curve, validation=min(losses))}

  recipe = run("recipe", [3.5, 3.0, 2.8, 2.9])
  found = recipe | run("plain", [3.4, 3.3, 3.2, 3.1])
  page = cell_report.as_markdown(
    NIGHT, found, {"characters": 1, "sha256": ""}, ""
  )
  size = text.characters["train_1_32"]
  assert f"| small, {size:,} | +0.100 | -0.300 | -0.300 |" in page
  assert f"Not converged: small, {size:,}, plain." in page
  page = cell_report.as_markdown(
    NIGHT, recipe, {"characters": 1, "sha256": ""}, ""
  )
  assert "Every one of these passed its best" in page
  assert "Neither has a finished run" in page


def test_the_crossing_is_the_last_change_of_the_better_best():
  ar = [(1.0, 4.0), (2.0, 3.0), (3.0, 3.5)]  # ends early, at its best of 3.0
  behind = [(1.0, 5.0), (2.0, 4.0), (4.0, 3.1)]
  crosses = [(1.0, 3.9), (2.0, 3.5), (4.0, 2.9), (8.0, 3.5)]
  assert cell_report.crossing(ar, behind) is None
  assert cell_report.crossing(ar, crosses) == 4.0
  assert cell_report.crossing(ar, [(1.0, 3.0)]) is None  # no lower than AR's


@pytest.mark.parametrize(
  "r_star", [scaling_laws.AR_R_STAR, 8.0, 150.0], ids="{:g}".format
)
def test_the_fit_finds_the_constants_of_a_known_law(r_star):
  rng = np.random.default_rng(0)
  points = []
  for unique in (16e3, 63e3, 250e3):
    for epochs in np.geomspace(1, 8 * r_star, 12).tolist():
      d = scaling_laws.effective_tokens(unique, epochs, r_star)
      loss = 1.2 + 40 / d**0.4 + rng.normal(scale=1e-3)
      points.append((unique, epochs, loss))
  fit = data_reuse.fit(points)
  assert fit.r_star == pytest.approx(r_star, rel=0.1) and fit.is_decided
  assert 0.97 * fit.low <= r_star <= 1.03 * fit.high
  assert fit.exponent == pytest.approx(0.4, abs=0.05)
  assert fit.floor == pytest.approx(1.2, abs=0.1)
  assert fit.error == pytest.approx(1e-3, rel=0.5)


def test_no_r_star_is_claimed_where_the_data_do_not_decide_it():
  # Read at most twice: any R* fits.
  points = [
    (u, e, 1 + 40 / scaling_laws.effective_tokens(u, e, 30.0) ** 0.4)
    for u in (16e3, 63e3)
    for e in (1.0, 1.2, 1.5, 2.0)
  ]
  noise = np.random.default_rng(0).normal(scale=0.02, size=len(points))
  noisy = [(u, e, y + n) for (u, e, y), n in zip(points, noise, strict=True)]
  assert not data_reuse.fit(noisy).is_decided
  assert data_reuse.fit(points[:4] * 3) is None  # one amount of text


# MARK: the program


@pytest.mark.slow
def test_a_killed_study_continues_with_the_cell_it_was_at(tmp_path):
  command = [sys.executable, "-m", "mdm_jax.study", "--quick"]
  command += ["--text=python_docs", "--out=out", "--workdir=w"]
  env = environment(tmp_path / "cache", PYTHONUNBUFFERED="1")
  start = {"cwd": tmp_path, "env": env, "text": True}
  listed = subprocess.run([*command, "--list"], capture_output=True, **start)
  assert "0 of 4 cells are finished" in listed.stdout
  running = subprocess.Popen(command, stdout=subprocess.PIPE, **start)
  for line in running.stdout:
    if line.startswith("cell 2"):
      running.send_signal(signal.SIGTERM)
      break
  running.communicate()
  # 42 while it trains, when there is something to save.
  assert running.returncode in (42, -signal.SIGTERM)
  content = json.loads((tmp_path / "out/study.json").read_text())
  assert len(content["cells"]) == 1 and not content["is_complete"]
  first = {p: p.stat().st_mtime for p in tmp_path.glob("w/quick/*/cell.json")}
  assert len(first) == 1
  done = subprocess.run(command, capture_output=True, **start)
  assert done.returncode == 0, done.stderr
  assert "1 of 4 cells are finished" in done.stdout
  assert {p: p.stat().st_mtime for p in first} == first
  content = json.loads((tmp_path / "out/study.json").read_text())
  assert len(content["cells"]) == 4 and content["is_complete"]
  plain = [run for run in content["cells"] if run["cell"]["arm"] == "plain"]
  assert all(run["is_bound"] and run["chain_rule"]["value"] for run in plain)
  page = (tmp_path / "out/study.md").read_text()
  assert "from all 4 of 4 cells" in page and "](study.png)" in page
