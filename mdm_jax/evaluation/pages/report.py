"""Renders the report of a run as one self-contained HTML page.

`report_template.html` has the text, style and script; this module fills in the
data. Plots are hand-made SVG in percent of their frame, so that labels, which
are HTML, keep their size at any width.
"""

import dataclasses
import importlib.resources
import itertools
import math
import statistics
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mdm_jax.core import strict_json
from mdm_jax.core.progress import duration
from mdm_jax.evaluation.pages import markup, plots
from mdm_jax.objectives.measured import (
  PERPLEXITY,
  Chart,
  Curve,
  Measured,
  Value,
  from_json,
)

_LEARNING_RATE = Chart("Learning rate", "of an update", low=0)
_MOST_POINTS = 160  # of a curve; of more, neighbours are averaged
_TEXTS = {
  "sampling": "the run's sampling",
  "untruncated": "untruncated, T = 1",
  "held_out": "test text",
}

_VERDICTS = {True: "pass", False: "miss", None: "not judged"}

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class RunReport:
  """The content of a report, as read from a run's folder.

  Attributes:
    name: name of the run.
    config: contents of config.json.
    metrics: lines of metrics.jsonl.
    data: contents of data.json: counts and examples of each stage's text.
    results: contents of results.json, from the last evaluation.
    unmasking: the sampling path of one text. Its `steps` are lists of token
      texts, None where masked, from before the first denoiser call to the end.
    asked: what each stage trains on, as described by the objective.
    charts: logged numbers to plot over updates, by name.
  """

  name: str
  config: Json
  metrics: list[Json]
  data: Json | None
  results: Json | None
  unmasking: Json | None
  asked: Sequence[str] = ()
  charts: Mapping[str, Chart] = dataclasses.field(default_factory=dict)


def render(report: RunReport) -> str:
  """Returns the report as HTML; missing parts say how to create them."""
  results, stages = report.results or {}, report.config["stages"]
  measured = from_json(results) if results else Measured()
  targets, texts = results.get("targets"), results.get("text_metrics")
  parts = {
    "name": markup.join([report.name]),
    "corpus": markup.join([report.config["data"]["corpus"]]),
    "headline": results and _headline(measured, results),
    "targets": targets and _targets(targets),
    "stages": _stages(stages, report.asked),
    "charts": _charts(report.metrics, stages, report.charts),
    "curves": results and _curves(measured, stages),
    "texts": texts and _text_metrics(texts),
    "data": report.data and _data(report.data, stages),
    "samples": results and _samples(results),
    "unmasking": report.unmasking and _unmasking(report.unmasking),
    "settings": markup.facts(_flat(report.config), "settings"),
  }
  shown = {name: part or _missing(name) for name, part in parts.items()}
  page = importlib.resources.files(__package__) / "report_template.html"
  return string.Template(page.read_text("utf-8")).substitute(shown)


def _missing(name: str) -> "markup.Html":
  mode = "train" if name in ("charts", "data") else "eval"
  mode = markup.el("code", f"--mode={mode}")
  return markup.el("p", "Not here yet: ", mode, " gives it.", class_="missing")


# MARK: numbers and texts


def _headline(measured: Measured, results: Json) -> markup.Html:
  number = lambda name, form=",.0f": markup.number(results.get(name), form)
  facts = {
    found.title: _with_error(found) for found in measured.all_values().values()
  }
  seconds = strict_json.number(results["wall_seconds"])
  time = duration(seconds) if math.isfinite(seconds) else markup.number(None)
  speed = number("tokens_per_second") + " a second"
  facts |= {
    "tokens seen": (number("tokens_seen"), speed),
    "time": (time, number("updates") + " updates"),
    "checkpoint": (
      number("checkpoint"),
      f"update, the best by {measured.head().title}",
    ),
  }
  numbers = [(name, markup.small(*told)) for name, told in facts.items()]
  beside = markup.facts(_beside(results), "inline")
  return markup.join([markup.facts(numbers, "headline"), beside])


def _with_error(found: Value) -> tuple[str, str]:
  """Returns a value, and its error and unit as a note."""
  form = ",.2f" if found.role == PERPLEXITY else ".4f"
  number = ("≤ " if found.bound else "") + markup.number(found.value, form)
  error = markup.number(found.error, form)
  return number, f"± {error} {found.unit}".rstrip()


def _beside(results: Json) -> list[tuple[str, str]]:
  """Returns the held-out text's size, and baselines on the same text."""
  if "text" not in results:  # written by an older version
    return []
  text = results["text"]
  sizes = ("documents", "rows", "tokens", "bytes")
  told = ", ".join(f"{results[name]:,} {name}" for name in sizes)
  facts = [(f"{text['split']} text of {text['corpus']}", told)]
  for found in results["baselines"].values():
    bits = markup.number(found["bits_per_byte"], ".4f")
    error = f" ± {found['stderr']:.4f}" if found["stderr"] else ""
    facts.append((found["name"], f"{bits}{error} bits per byte"))
  return facts


def _targets(targets: list[Json]) -> markup.Html:
  head = ("target", "measure", "this run", "test text", "verdict")
  rows = []
  for t in targets:
    name = markup.small(t["target"], t["meaning"])
    numbers = markup.number(t["value"]), markup.number(t["reference"])
    verdict = _VERDICTS[t["passed"]]
    word = markup.el("span", verdict, class_=verdict.replace(" ", "-"))
    rows.append((name, markup.el("code", t["measure"]), *numbers, word))
  judged = [t["passed"] for t in targets if t["passed"] is not None]
  told = f"{sum(judged)} of {len(judged)} met."
  return markup.join([markup.el("p", told), markup.table(head, rows)])


def _text_metrics(found: Json) -> markup.Html:
  columns = [found.get(text, {}) for text in _TEXTS]
  titles = {k: m["title"] for column in columns for k, m in column.items()}
  rows = [
    (title, *[_measured(c.get(name)) for c in columns])
    for name, title in titles.items()
  ]
  facts = [(k, v) for k, v in found.items() if k not in _TEXTS]
  table = markup.table(("measure", *_TEXTS.values()), rows)
  return markup.join([markup.facts(facts, "inline"), table])


def _measured(found: Json | None) -> Any:
  if found is None:
    return markup.number(None)
  error = (
    f"±\xa0{markup.number(found['stderr'], '.2g')}, n\xa0=\xa0{found['n']}"
  )
  return markup.small(markup.number(found["value"]), error)


def _samples(results: Json) -> markup.Html:
  facts = markup.facts(results["sampling"].items(), "inline")
  texts = [markup.el("li", text, class_="text") for text in results["samples"]]
  return markup.join([facts, markup.el("ol", *texts, class_="samples")])


def _unmasking(unmasking: Json) -> markup.Html:
  """Returns the final text; the script hides tokens not revealed yet."""
  steps = unmasking["steps"]
  tokens = [
    markup.el(
      "span", over[-1] or "", class_="token", data_step=over.count(None)
    )
    for over in zip(*steps, strict=True)
  ]
  canvas = markup.el("p", *tokens, id="canvas", data_last=len(steps) - 1)
  return markup.join(
    [markup.facts(unmasking["settings"].items(), "inline"), canvas]
  )


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
  """Yields (name, value) of every setting, named as on the command line."""
  if isinstance(value, dict):
    for key, part in value.items():
      yield from _flat(part, f"{name}.{key}" if name else key)
  elif isinstance(value, list) and value and isinstance(value[0], dict):
    for i, part in enumerate(value):
      yield from _flat(part, f"{name}[{i}]")
  else:
    yield name, repr(value)


# MARK: stages


def _stages(stages: list[Json], asked: Sequence[str]) -> markup.Html:
  """Returns the list of stages, which is the legend of the plots' colours."""
  items = []
  for stage, told in itertools.zip_longest(stages, asked, fillvalue=""):
    rows = f"{stage['unit']}, rows of {stage['length']:,} tokens"
    parts = (
      markup.el("b", stage["name"]),
      markup.el("span", rows),
      *([markup.el("span", told)] if told else []),
    )
    items.append(markup.el("li", *parts))
  return markup.el("ol", *items, class_="stages")


def _data(data: Json, stages: list[Json]) -> markup.Html:
  names = [stage["name"] for stage in stages] + ["validation", "test"]
  counts = list(data["rows"].values())
  plain = [name for name, count in counts[0].items() if isinstance(count, int)]
  cells = lambda name: [markup.number(c.get(name), ",") for c in counts]
  rows = [(name.replace("_", " "), *cells(name)) for name in plain]
  figures = markup.el("div", *map(_examples, names, counts), class_="figures")
  documents = {f"documents, {k}": v for k, v in data["documents"].items()}
  facts = (documents | data["tokenizer"]).items()
  return markup.join(
    [markup.facts(facts, "inline"), markup.table(("", *names), rows), figures]
  )


def _examples(name: str, counts: Json) -> markup.Html:
  """Returns a stage's histogram of difficulty, and examples of its units."""
  drawing = markup.el("p", "Running text, not ranked.", class_="missing")
  if counts["difficulty"]:
    drawing = _histogram(counts["difficulty"])
  texts = [markup.el("li", text, class_="text") for text in counts["examples"]]
  summary = markup.el("summary", f"{len(texts)} examples")
  examples = markup.el("details", summary, markup.el("ol", *texts))
  return _figure(name, "difficulty of its units", drawing, examples)


def _figure(title: str, unit: str, *parts: markup.Html) -> markup.Html:
  return markup.el(
    "figure", markup.el("figcaption", markup.small(title, unit)), *parts
  )


# MARK: plots


def _charts(
  lines: list[Json], stages: list[Json], charts: Mapping[str, Chart]
) -> markup.Html:
  stage = "train/stage"
  # The last update of each stage; later lines overwrite earlier ones.
  ends = {round(line[stage]): line["step"] for line in lines if stage in line}
  if not ends:
    return markup.Html()
  cuts = itertools.pairwise([0, *ends.values()])
  bands = [
    (*cut, stages[number - 1]["name"], number - 1)
    for number, cut in zip(ends, cuts, strict=True)
  ]
  lost = sum(line.get("train/skipped", 0) > 0 for line in lines)
  told = f"; {lost} points hold updates that were not finite" if lost else ""
  drawn = {**charts, "train/learning_rate": _LEARNING_RATE}
  return markup.join(
    _figure(
      chart.title,
      chart.unit + (told if name == "train/loss" else ""),
      plots.curve(_series(lines, name, chart.error), bands, chart.low),
    )
    for name, chart in drawn.items()
  )


def _series(
  lines: list[Json], name: str, error_name: str = ""
) -> list[plots.Point]:
  """Returns a logged number over updates, averaged to `_MOST_POINTS`."""
  found = list({line["step"]: line for line in lines if name in line}.values())
  size = math.ceil(len(found) / _MOST_POINTS) or 1
  points = []
  for part in (found[i : i + size] for i in range(0, len(found), size)):
    values = [strict_json.number(line[name]) for line in part]
    step, mean = part[-1]["step"], statistics.fmean(values)
    error = part[-1].get(error_name) or 0
    label = f"update {step:,}: {markup.number(mean)}"
    points.append(plots.Point(step, mean, error, label))
  return points


def _curves(measured: Measured, stages: list[Json]) -> markup.Html:
  """Returns the curves on test text; validation text is for model choice."""
  drawn = [
    _curve(curve, stages)
    for curve in measured.curves.values()
    if curve.split == "test"
  ]
  return markup.join(drawn)


def _curve(curve: Curve, stages: list[Json]) -> markup.Html:
  names = [stage["name"] for stage in stages]
  bands = [
    (low, high, name, names.index(name) if name in names else i)
    for i, (low, high, name) in enumerate(curve.bands)
  ]
  points = [
    plots.Point(float(x), y, 0, f"{x}: {markup.number(y, '.3f')}")
    for x, y in curve.points().items()
  ]
  rows = [p.label.split(": ") for p in points]
  table = markup.table((curve.x_title, curve.unit), rows)
  more = markup.el("details", markup.el("summary", "the numbers"), table)
  note = [markup.el("p", curve.note)] if curve.note else []
  drawing = plots.curve(points, bands, 0)
  return _figure(curve.title, curve.unit, *note, drawing, more)


def _histogram(difficulty: Json) -> markup.Html:
  """Returns a histogram of units by difficulty, with the stage's cut."""
  counts, cut = difficulty["histogram"], difficulty["cut"]
  x, y, bins = plots.Axis(0, 1), plots.Axis(0, max(counts) or 1), len(counts)
  bars = lambda stop: "".join(
    f"M{x.at(i / bins)} 0V{y.at(count)}H{x.at(min((i + 1) / bins, stop))}V0z"
    for i, count in enumerate(counts)
    if i / bins < stop
  )
  # Bars up to the cut are drawn over all bars, in another colour.
  paths = {"rest": bars(1), "kept": bars(cut)}
  label = f"cut {cut:.2f}"
  mark = markup.el("span", label, class_="cut", style=f"left:{x.at(cut)}%")
  return plots.plot(x, y, [mark], paths, aria_label=f"histogram, {label}")
