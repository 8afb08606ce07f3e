"""The page of a run: what it says, and how it behaves in a browser."""

import dataclasses
import json
import math
import re
import time

import browser_harness
import pytest
from browser_harness import Page, visible_text

from mdm_jax.evaluation.pages import plots
from mdm_jax.evaluation.pages import report as report_lib
from mdm_jax.evaluation.pages.report import RunReport, render
from mdm_jax.objectives.measured import (
  BITS,
  NATS,
  PERPLEXITY,
  Chart,
  Curve,
  Measured,
  Value,
  to_json,
)

NASTY = "</script><script>window.owned=1</script>&amp;<b onclick='x'>\"'$name\n"
STEPS = [
  [None, "the ", None, None, None, None],
  ["Of ", "the ", None, None, None, None],
  ["Of ", "the ", None, "</p>", None, ""],
  ["Of ", "the ", None, "</p>", "\n\n", ""],
  ["Of ", "the ", "<b>people</b>", "</p>", "\n\n", ""],
]
CE = {f"{i / 20:.2f}": 4.4 + i / 20 for i in range(1, 21)}


def _stage(number, unit, rates, rehearsal):
  return {
    "name": f"{number} {unit}",
    "unit": unit,
    "length": 128,
    "epochs": 1.0,
    "updates": None,
    "mask_rate": rates,
    "rehearsal": rehearsal,
  }


CONFIG = {
  "name": "tiny",
  "data": {"corpus": "sotu", "cache_dir": ""},
  "model": {"num_layers": 4, "num_kv_heads": None},
  "stages": [
    _stage("I", "sentences", [0.75, 0.9], 0.25),
    _stage("II", "pairs", [0.4, 0.6], 0.0),
    _stage("III", "paragraphs", None, 0.0),
  ],
  "optimizer": {"learning_rate": 2e-4},
}
SAMPLING = {"num_steps": 25, "temperature": 0.6, "top_k": None, "seed": 7}
TEXT_METRIC = {"value": 0.3125, "stderr": 0.0123, "n": 64}
# The numbers of an objective that the page has never heard of.
VALUES = {
  "loss": Value(4.95718, "LOSS", "nats per token", 0.01094, NATS),
  "ppl": Value(
    *(1142.19319, "perplexity bound", "per token"),
    role=PERPLEXITY,
    bound=True,
  ),
  "bits": Value(2.29513, "bits per byte", "", 0.00507, BITS, bound=True),
}
CURVE = Curve(
  *(tuple(map(float, CE)), tuple(CE.values()), "A loss by a share"),
  unit="nats",
  x_title="a share",
  form=".2f",
  note="The area under it is the loss.",
  bands=((0.75, 0.9, "I sentences"), (0.4, 0.6, "II pairs"))
  + ((0, 1, "III paragraphs"),),
)
MEASURED = Measured(VALUES, {"loss_by_share": CURVE}, "loss")
CHARTS = {
  "train/loss": Chart("Training loss", "nats"),
  "validation/loss": Chart("Validation loss", "", "validation/error"),
  "train/share": Chart("Share", "mean over rows", low=0),
}
RESULTS = {
  **to_json(MEASURED),
  "text": {"split": "test", "own": True, "corpus": "sotu", "sha256": "0" * 64},
  "baselines": {
    "ngram": {"name": "8-grams", "bits_per_byte": 1.419, "stderr": 0.0312},
    "xz": {"name": "xz, given it", "bits_per_byte": 1.7362, "stderr": None},
  },
  "rows": 319,
  "tokens": 35266,
  "documents": 14,
  "bytes": 152001,
  "checkpoint": 1060,
  "updates": 1080,
  "tokens_seen": 895799.0,
  "wall_seconds": 161.16,
  "tokens_per_second": 5558.28,
  "sampling": SAMPLING,
  "samples": ["We the people.", NASTY],
  "text_metrics": {
    "sampling": {"d": TEXT_METRIC | {"title": "distinct 2"}},
    "untruncated": {
      "d": TEXT_METRIC | {"title": "distinct 2", "value": 0.7411}
    },
    "held_out": {
      "b": TEXT_METRIC | {"title": "self bleu", "value": 0.1234, "n": 99}
    },
    "judge": "5-grams",
  },
  "targets": [
    {
      "target": "few repeats",
      "measure": "repeated_4_grams",
      "value": 0.0625,
      "reference": 0.0312,
      "passed": True,
      "meaning": "what came before",
    },
    {
      "target": "fluent",
      "measure": "judge",
      "value": None,
      "reference": math.nan,
      "passed": False,
      "meaning": "as a reader sees it",
    },
    {
      "target": "fluent",
      "measure": "bits",
      "value": 3.5,
      "reference": None,
      "passed": None,
      "meaning": "beside 2.83",
    },
  ],
}
COUNTS = {
  "units_found": 9033,
  "units_selected": 3011,
  "texts_too_long": 17,
  "rows": 1201,
  "tokens": 70001,
  "capacity": 76864,
  "difficulty": {"histogram": [10] * 20, "cut": 0.425},
  "examples": ["It is so.", "Is it?", "Why not?", "We shall see.", "At last."],
}
PLAIN_COUNTS = COUNTS | {"difficulty": None}
DATA = {
  "rows": {
    "stage_1": COUNTS,
    "stage_2": COUNTS | {"units_found": 4321},
    "stage_3": PLAIN_COUNTS,
    "validation": PLAIN_COUNTS | {"rows": 777},
    "test": PLAIN_COUNTS | {"rows": 778},
  },
  "documents": {"train": 205, "validation": 17, "test": 17},
  "tokenizer": {"kind": "char", "sha256": "8" * 64, "vocab_size": 4224},
}


def _metrics():
  lines = [{"step": 0, "config": "name: tiny"}]
  for step in range(20, 401, 20):
    lines.append(
      {
        "step": step,
        "train/loss": 7 - step / 200,
        "train/learning_rate": 2e-4 * (1 - step / 800),
        "train/share": 0.8 if step <= 100 else 0.5,
        "train/stage": 1 if step <= 100 else 2 if step <= 200 else 3,
        "train/skipped": 0.0,
      }
    )
  for step in (200, 400, 400):
    bound = {"validation/loss": 6.0 - step / 400}
    lines.append({"step": step, **bound, "validation/error": 0.05})
  return lines + [{"step": 400, "samples/0": "Of the"}]


@pytest.fixture
def report():
  """A whole run, small."""
  settings = {"num_steps": 4, "seed": 7}
  unmasking = {"settings": settings, "steps": STEPS}
  return RunReport(
    *("tiny", CONFIG, _metrics(), DATA, RESULTS, unmasking),
    descriptions=["shares 0.75\u20130.9", "shares 0.4\u20130.6", "any share"],
    charts=CHARTS,
  )


# MARK: what it says


def test_every_number_of_the_results_is_printed(report):
  told = visible_text(render(report))
  expected = "2.2951 0.0051 4.9572 0.0109 1,142.19 319 35,266 895,799 5,558"
  for number in expected.split():
    assert number in told, number
  for phrase in ("≤ 2.2951 ± 0.0051", "4.9572 ± 0.0109", "≤ 1,142.19", "2:41"):
    assert phrase in told
  for title in ("LOSS", "A loss by a share", "The area under it is the loss."):
    assert title in told
  assert "1,080 updates" in told and "checkpoint 1,060" in told
  for phrase in (
    "test text of sotu 14 documents, 319 rows, 35,266 tokens, 152,001 bytes",
    "8-grams 1.4190 ± 0.0312 bits per byte xz, given it 1.7362 bits per byte",
  ):
    assert phrase in told
  for rate, loss in CE.items():
    assert f"{rate} {loss:.3f}" in told
  for name, value in SAMPLING.items():
    assert f"{name} {value}" in told


def test_texts_are_measured_in_three_columns(report):
  told = visible_text(render(report))
  head = "metric the run's settings untruncated, T = 1 test text"
  assert f"{head} distinct 2 0.3125 ± 0.012, n = 64 0.7411" in told
  assert "judge 5-grams" in told
  assert "self bleu – – 0.1234 ± 0.012, n = 99" in told


def _trial(temperature, entropy, judge, repeated, beyond):
  numbers = {"unigram_entropy": entropy, "judge_nll": judge}
  numbers |= {"seq_rep_2": repeated, "distinct_2": 0.8}
  found = {name: {"value": value} for name, value in numbers.items()}
  if beyond is None:
    return found
  settings = {"temperature": temperature, "temperature_range": None}
  return found | {"settings": settings, "beyond": beyond}


def test_what_a_tuning_tried_is_plotted_and_listed(report):
  text = _trial(0, 4.0, 1.0, 0.05, None)
  tried = [_trial(0.9, 3.9, 1.5, 0.04, 0.0), _trial(0.5, 2.0, 0.8, 0.5, 88.0)]
  rounds = [
    {"varies": "heat", "texts": 8, "validation": text, "tried": tried},
    {"varies": "all", "texts": 9, "validation": text, "tried": tried[:1]},
  ]
  page = render(dataclasses.replace(report, tuning={"rounds": rounds}))
  told = visible_text(page)
  assert "heat: 2 settings, 8 texts each" in told
  line = "order spread, temperature 0.9, top_k 50, top_p 0.9"
  assert f"{line} 0.0 1.500 3.900 0.040 0.800" in told
  assert "validation text 1.000 4.000 0.050 0.800" in told
  # Entropy to the right: the text is rightmost, at 4 of 2 to 4 with margins.
  page = Page(page)
  for tried, own, text in zip(
    *(page.paths(name) for name in ("tried", "chosen", "own")), strict=True
  ):
    assert len(tried) == 9 and tried[0] == pytest.approx(own[0])
    assert tried[3] < tried[0] < text[0] < 100
    assert text[0] - tried[3] == pytest.approx(100 / 1.16, abs=0.1)
  judge, repeated = page.paths("own")
  assert judge[1] < page.paths("chosen")[0][1]  # likelier than the samples
  assert repeated[1] > page.paths("chosen")[1][1]
  assert 'id="tuning"' not in render(report)


def test_targets_pass_or_miss_in_words(report):
  page = render(report)
  told = visible_text(page)
  assert "1 of 2 met." in told
  first = "few repeats what came before repeated_4_grams 0.0625 0.0312 pass"
  assert first in told
  assert "fluent as a reader sees it judge – – miss" in told
  assert "fluent beside 2.83 bits 3.5 – not judged" in told
  shapes = re.findall(r"\.(pass|miss)::before { content: \"(.)", page)
  assert len({shape for _, shape in shapes}) == 2


def test_data_of_every_stage_is_reported(report):
  told = visible_text(render(report))
  assert "units found 9,033 4,321 9,033 9,033 9,033" in told
  assert "rows 1,201 1,201 1,201 777 778" in told
  sizes = "train 205 documents, validation 17 documents, test 17"
  assert f"documents, {sizes}" in told
  assert "vocab_size 4224" in told
  assert told.count("cutoff 0.42") == 2 and told.count("not ranked") == 3
  assert told.count("Is it? Why not? We shall see.") == 5


def test_every_setting_has_its_command_line_name(report):
  told = visible_text(render(report))
  assert "optimizer.learning_rate 0.0002" in told
  assert "stages[1].mask_rate [0.4, 0.6]" in told
  assert "model.num_kv_heads None" in told and "data.cache_dir ''" in told
  for asked in ("shares 0.75–0.9", "shares 0.4–0.6", "any share"):
    assert asked in told


@pytest.mark.parametrize("missing", ["results", "data", "unmasking", "metrics"])
def test_what_is_missing_is_said_in_a_sentence(report, missing):
  whole = Page(render(report))
  value = [] if missing == "metrics" else None
  page = render(dataclasses.replace(report, **{missing: value}))
  assert whole.texts.keys() - {"canvas"} <= Page(page).texts.keys()
  told = {name: " ".join(t.split()) for name, t in Page(page).texts.items()}
  trained = missing in ("metrics", "data")
  mode = "--mode=train" if trained else "--mode=eval"
  sections = {
    "results": {"targets", "curves", "texts", "samples"},
    "metrics": {"training"},
  }.get(missing, {missing})
  said = {
    n
    for n, t in told.items()
    if f"Not available yet; run {mode} to create it." in t
  }
  assert said == sections
  if missing == "results":
    assert page.count("Not available yet") == 5  # and the headline
  assert render(report).count("Not available yet") == 0


def test_results_without_the_later_measures(report):
  names = ("text_metrics", "targets")
  results = {k: v for k, v in RESULTS.items() if k not in names}
  page = render(dataclasses.replace(report, results=results))
  assert page.count("Not available yet") == 2


def test_numbers_that_are_not_are_dashes(report):
  empty = {k: math.nan for k, v in RESULTS.items() if isinstance(v, float)}
  empty |= {"ppl": None, "checkpoint": None, "wall_seconds": None}
  curve = CE | {"0.35": None, "0.55": math.nan}
  values = RESULTS["measured"]["values"]
  values = {name: told | {"error": None} for name, told in values.items()}
  empty["measured"] = RESULTS["measured"] | {"values": values}
  lines = _metrics()
  lines[5]["train/loss"] = math.nan
  lines[-2]["validation/error"] = math.nan
  results = RESULTS | empty | {"loss_by_share": curve}
  page = render(dataclasses.replace(report, results=results, metrics=lines))
  told = visible_text(page)
  assert "bits per byte ≤ – " in told and "LOSS – nats" in told
  assert "± –" not in told  # an error that is unknown is left out
  assert "time – 1,080 updates" in told and "checkpoint – " in told
  assert "0.35 –" in told and "0.55 –" in told
  assert "nan" not in re.sub(r"<script>.*?</script>", "", page, flags=re.S)
  assert "NaN" not in page


# MARK: what it is


def test_the_page_is_well_formed_and_whole(report):
  page = Page(render(report))
  assert len(page.ids) == len(set(page.ids))
  wanted = (
    "targets training curves texts data samples unmasking settings".split()
  )
  assert [name for name in page.ids if name != "canvas"] == wanted
  links = [v["href"] for tag, v in page.tags if tag == "a"]
  assert links == [f"#{name}" for name in wanted]
  plots = [v for _, v in page.tags if v.get("class") == "plot"]
  assert len(plots) == 4 + 1 + 2
  assert all(v["role"] == "img" and v["aria-label"] for v in plots)
  assert json.loads(plots[0]["data-points"])[0][2] == "update 20: 6.9"
  (slider,) = [v for tag, v in page.tags if tag == "input"]
  assert slider["aria-label"]


def test_nothing_is_fetched(report):
  page = render(report)
  assert "default-src 'none'" in page
  for _, values in Page(page).tags:
    for name in ("src", "href", "action", "data", "srcset"):
      assert re.match(r"#|data:", values.get(name, "#"))
  assert "@import" not in page and "url(" not in page
  assert set(re.findall(r"https?://[^'\" ]+", page)) == {
    "http://www.w3.org/2000/svg"
  }


def test_the_same_run_gives_the_same_page(report):
  assert render(report) == render(report)


def test_any_text_stays_text(report):
  counts = COUNTS | {"examples": [NASTY] * 5}
  stages = [CONFIG["stages"][0] | {"name": NASTY}, *CONFIG["stages"][1:]]
  target = RESULTS["targets"][0] | {"target": NASTY, "meaning": NASTY}
  nasty = RunReport(
    NASTY,
    CONFIG | {"stages": stages, NASTY: NASTY, "data": {"corpus": NASTY}},
    [line | {NASTY: 1.0} for line in _metrics()],
    DATA | {"rows": DATA["rows"] | {"stage_2": counts}},
    RESULTS | {"samples": [NASTY] * 3, "targets": [target]},
    {"settings": {NASTY: NASTY}, "steps": [[None], [NASTY]]},
    [NASTY] * 3,
    {"train/loss": Chart(NASTY, NASTY), **CHARTS},
  )
  usual, page = Page(render(report)), Page(render(nasty))
  scripts = [tag for tag, _ in page.tags if tag == "script"]
  assert len(scripts) == 1
  assert not any("onclick" in values for _, values in page.tags)
  assert {tag for tag, _ in page.tags} == {tag for tag, _ in usual.tags}
  assert page.texts["samples"].count(NASTY) == 3
  assert page.texts["canvas"] == NASTY
  assert page.texts["data"].count(NASTY) == 5 + 2  # and the stage's name
  assert page.texts["targets"].count(NASTY) == 2


# MARK: plots


def test_a_curve_goes_through_its_points(report):
  page = Page(render(report))
  loss, bound = page.paths("line")[:2]
  x, y = loss[0:-1:2], loss[1:-1:2]
  assert len(x) == 20
  assert x == pytest.approx([5.0 * (i + 1) for i in range(20)])
  steps = [a - b for a, b in zip(y, y[1:], strict=False)]
  assert steps == pytest.approx([steps[0]] * 19, abs=0.02) and steps[0] > 4
  assert bound[0] == 50 and bound[2] == 100 and len(bound) == 5
  (bars,) = [path for path in page.paths("errors") if path]
  low, high = bars[1], bars[2]
  assert (low + high) / 2 == pytest.approx(bound[1], abs=0.02)
  # 0.5 between the two, 0.05 up and down.
  assert high - low == pytest.approx((bound[1] - bound[3]) / 5, abs=0.03)


def test_error_bars_stay_in_the_frame(report):
  lines = _metrics()
  lines[-2]["validation/error"] = 3.0
  page = Page(render(dataclasses.replace(report, metrics=lines)))
  (bars,) = [path for path in page.paths("errors") if path]
  assert min(bars) >= 0 and max(bars) <= 100 and bars[5] - bars[4] > 80


def test_a_curve_breaks_where_a_number_is_missing(report):
  lines = _metrics()
  lines[5]["train/loss"] = math.nan
  lines[5]["train/skipped"] = 0.05
  page = render(dataclasses.replace(report, metrics=lines))
  (loss, *_) = [v["d"] for t, v in Page(page).tags if v.get("class") == "line"]
  assert loss.count("M") == 2 and loss.count("L") == 17
  assert "1 points include skipped, non-finite updates" in page
  assert "non-finite" not in render(report)


def test_stages_are_bands_over_their_updates(report):
  tags = Page(render(report)).tags
  styles = [v["style"] for _, v in tags if "band" in v.get("class", "").split()]
  assert styles[:3] == [
    "left:0.0%;width:25.00%",
    "left:25.0%;width:25.00%",
    "left:50.0%;width:50.00%",
  ]
  # By mask rate: the ranges of the stages, the last one's being whole.
  assert styles[-3:] == [
    "left:75.0%;width:15.00%",
    "left:40.0%;width:20.00%",
    "left:0.0%;width:100.00%",
  ]


def test_a_run_without_an_evaluation_has_no_bound_yet(report):
  lines = [line for line in _metrics() if "train/loss" in line][:3]
  page = render(dataclasses.replace(report, metrics=lines))
  assert page.count("No values yet.") == 1


def test_the_area_is_the_bound(report):
  """CE(r) = 4.4 + r: the area, from 0.05 on, is what the page says of it."""
  page = Page(render(report))
  area = page.paths("area")[-1]  # the start on the axis, points, the end
  x, y = area[2:-1:2], area[3:-1:2]
  drawn = sum(
    (b - a) * (c + d) / 2
    for a, b, c, d in zip(x, x[1:], y, y[1:], strict=False)
  )
  height = 5.4 + 0.08 * 0.95  # room above the highest
  true = 4.4 * 0.95 + (1 - 0.05**2) / 2
  assert drawn / 1e4 * height == pytest.approx(true, rel=1e-3)


def test_the_histogram_is_cut_within_a_bar(report):
  page = Page(render(report))
  rest, kept = page.paths("rest")[0], page.paths("kept")[0]
  assert len(rest) == 5 * 20 and len(kept) == 5 * 9
  assert max(kept[3::5]) == 42.5 and max(rest[3::5]) == 100
  assert set(kept[2::5]) == {100.0}


def test_a_long_curve_is_means_of_neighbours():
  lines = [{"step": i, "x": float(i)} for i in range(1, 1001)]
  points = report_lib._series(lines, "x")
  assert len(points) == 143
  assert points[0] == (7, 4.0, 0, "update 7: 4")
  assert points[-1][:2] == (1000, 997.5)


@pytest.mark.parametrize("low", [-3.0, 0.0, 1e-6, 4.97])
@pytest.mark.parametrize("width", [2e-6, 0.034, 1.0, 7.3, 12345.0])
def test_ticks_are_few_round_and_inside(low, width):
  axis = plots.Axis(low, low + width)
  ticks = axis.ticks()
  assert 1 <= len(ticks) <= 6
  for tick in ticks:
    assert -0.01 <= axis.at(tick) <= 100.01
  steps = [b - a for a, b in zip(ticks, ticks[1:], strict=False)]
  for step in steps:
    digits = step / 10 ** math.floor(math.log10(step * (1 + 1e-9)))
    assert min(abs(digits - d) for d in (1, 2, 5)) < 1e-3


# MARK: in a browser

browser = browser_harness.browser


@pytest.fixture
def page(browser, report, tmp_path):
  """The whole page, open in the browser."""
  path = tmp_path / "report.html"
  path.write_text(render(report), "utf-8")
  browser.open(path)
  return browser


SHOWN = """(() => {
  const seen = (t) => getComputedStyle(t).color !== "rgba(0, 0, 0, 0)";
  const tokens = [...document.querySelectorAll(".token")];
  const hidden = (t) => t.getAttribute("aria-hidden") === "true";
  return {
    tokens: tokens.map((t) => seen(t) ? t.textContent : null),
    silent: tokens.map((t) => hidden(t) ? null : t.textContent),
    fresh: tokens.map((t) => t.classList.contains("new")),
    step: Number(document.querySelector("input").value),
    told: document.querySelector("output").textContent,
    spoken: document.querySelector("input").getAttribute("aria-valuetext"),
    button: document.querySelector("button").textContent,
  };
})()"""
MOVE = """(() => {
  const slider = document.querySelector("input");
  slider.value = STEP;
  slider.dispatchEvent(new Event("input", {bubbles: true}));
})()"""


def _check_step(shown, step):
  assert shown["step"] == step
  assert shown["tokens"] == shown["silent"] == STEPS[step]
  known = sum(piece is not None for piece in STEPS[step])
  assert shown["told"] == f"step {step} of 4: {known} of 6 tokens"
  assert shown["spoken"] == shown["told"]
  before = STEPS[max(step - 1, 0)]
  assert shown["fresh"] == [
    a != b for a, b in zip(before, STEPS[step], strict=True)
  ]


def test_the_page_loads_in_silence(page):
  page.run("new Promise((done) => setTimeout(done, 100))")
  names = [event["method"] for event in page.events]
  assert "Log.entryAdded" not in names, page.events
  assert "Runtime.exceptionThrown" not in names, page.events
  assert "Runtime.consoleAPICalled" not in names, page.events
  asked = [
    event["params"]["request"]["url"]
    for event in page.events
    if event["method"] == "Network.requestWillBeSent"
  ]
  others = [url for url in asked if not url.startswith("data:")]
  assert len(others) == 1 and others[0].startswith("file://")


def test_the_slider_shows_exactly_what_its_step_revealed(page):
  for step in (0, 1, 2, 3, 4, 2, 0):
    page.run(MOVE.replace("STEP", str(step)))
    _check_step(page.run(SHOWN), step)


def test_keys_move_the_slider(page):
  page.run("document.querySelector('input').focus()")
  for key, step in (
    ("Home", 0),
    ("ArrowRight", 1),
    ("End", 4),
    ("ArrowLeft", 3),
  ):
    page.press(key)
    _check_step(page.run(SHOWN), step)


def test_play_goes_to_the_end_and_pause_stops(page):
  page.run(MOVE.replace("STEP", "4"))
  page.run("document.querySelector('button').focus()")
  page.press(" ", text=" ")  # from the end it begins again
  shown = page.run(SHOWN)
  assert shown["button"] == "Pause"
  _check_step(shown, 0)
  seen, deadline = {0}, time.monotonic() + 10
  while (shown := page.run(SHOWN))["button"] == "Pause":
    _check_step(shown, shown["step"])
    seen.add(shown["step"])
    assert time.monotonic() < deadline
    time.sleep(0.05)
  assert shown["button"] == "Play" and seen | {4} == {0, 1, 2, 3, 4}
  _check_step(shown, 4)

  page.run("document.querySelector('button').click()")
  page.run("document.querySelector('button').click()")
  page.run("new Promise((done) => setTimeout(done, 600))")
  _check_step(page.run(SHOWN), 0)


def test_samples_are_text_in_the_browser(page):
  texts = page.run(
    "[...document.querySelectorAll('.samples li')].map((e) => e.textContent)"
  )
  assert texts == RESULTS["samples"]
  assert page.run("typeof window.owned") == "undefined"
  assert page.run("document.scripts.length") == 1


BOX = """(() => {
  const plot = document.querySelector(".plot");
  plot.scrollIntoView({behavior: "instant"});
  const box = plot.getBoundingClientRect();
  return [box.left, box.top, box.width, box.height];
})()"""


def test_a_pointer_reads_a_curve(page):
  left, top, width, height = page.run(BOX)
  at = {"x": left + 0.501 * width, "y": top + height / 2}
  page.call("Input.dispatchMouseEvent", type="mouseMoved", **at)
  readout = "document.querySelector('.readout')?.textContent"
  assert page.run(readout) == "update 200: 6"
  page.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
  assert page.run(readout) is None


def test_without_scripts_everything_is_there(browser, report, tmp_path):
  path = tmp_path / "report.html"
  path.write_text(render(report), "utf-8")
  browser.call("Emulation.setScriptExecutionDisabled", value=True)
  try:
    browser.open(path)
    shown = browser.run(SHOWN)
    assert shown["tokens"] == STEPS[-1]
    size = "(e) => e.getBoundingClientRect().height"
    select = "[...document.querySelectorAll('SELECTOR')]"
    heights = lambda s: browser.run(
      f"{select}.map({size})".replace("SELECTOR", s)
    )
    assert min(heights(".plot svg")) > 100 and min(heights("table")) > 0
    assert heights(".controls") == [0]
  finally:
    browser.call("Emulation.setScriptExecutionDisabled", value=False)


LUMINANCES = """(() => {
  const light = (e, name) => {
    const [r, g, b] = getComputedStyle(e)[name].match(/[\\d.]+/g).map((v) => {
      const x = Number(v) / 255;
      return x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const names = ["body", "header p", "small", "nav a", "summary", ".pass",
    ".miss", ".plot .left", ".band.stage-1", ".band.stage-2", ".band.stage-3"];
  return [light(document.body, "backgroundColor"),
    ...names.map((n) => light(document.querySelector(n), "color"))];
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(page, scheme):
  feature = {"name": "prefers-color-scheme", "value": scheme}
  page.call("Emulation.setEmulatedMedia", features=[feature])
  ground, *texts = page.run(LUMINANCES)
  page.call("Emulation.setEmulatedMedia", features=[])
  assert (ground > 0.5) == (scheme == "light")
  for text in texts:
    low, high = sorted((ground, text))
    assert (high + 0.05) / (low + 0.05) > 4.5


def test_a_phone_scrolls_one_way_only(page):
  size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
  page.call("Emulation.setDeviceMetricsOverride", **size)
  width = page.run("document.documentElement.scrollWidth")
  page.call("Emulation.clearDeviceMetricsOverride")
  assert width <= 390
