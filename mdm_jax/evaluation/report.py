"""A run's page: one HTML file that needs nothing beside it.

`report_template.html` holds prose, style and script; what follows fills it from
plain data. Plots are SVG made here, without a plotting library: in percent of
their frame, so that the text beside them keeps its size at any width.
"""

import dataclasses
import html
import importlib.resources
import itertools
import json
import math
import statistics
import string
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from mdm_jax.core import strict_json
from mdm_jax.core.progress import duration

_CE = "nats per masked token"
_ERRORS = {"eval/nelbo_per_token": "eval/nelbo_stderr"}
_MOST_POINTS = 160  # of a curve; of more, each is the mean of a few
_TEXTS = {
  "sampling": "the run's sampling",
  "untruncated": "untruncated, T = 1",
  "held_out": "held-out text",
}

Json = dict[str, Any]
Number = int | float


@dataclasses.dataclass(frozen=True)
class RunReport:
  """What the page tells, as read from a run's folder.

  Attributes:
    name: of the run.
    config: as in config.json.
    metrics: the lines of metrics.jsonl.
    data: the stages' text in numbers and examples, as in data.json.
    results: of the last evaluation, as in results.json.
    unmasking: how one text was drawn. Its `steps` are lists of pieces, None
      where masked: the first before any denoiser call, the last the text.
  """

  name: str
  config: Json
  metrics: list[Json]
  data: Json | None
  results: Json | None
  unmasking: Json | None


def render(report: RunReport) -> str:
  """Returns the page."""
  results, stages = report.results or {}, report.config["stages"]
  targets, texts = results.get("targets"), results.get("text_metrics")
  parts = {
    "name": _join([report.name]),
    "corpus": _join([report.config["data"]["corpus"]]),
    "headline": results and _headline(results),
    "targets": targets and _targets(targets),
    "stages": _stages(stages),
    "curves": _curves(report.metrics, stages),
    "ce": results and _ce_by_mask_rate(results["ce_by_mask_rate"], stages),
    "texts": texts and _text_metrics(texts),
    "data": report.data and _data(report.data, stages),
    "samples": results and _samples(results),
    "unmasking": report.unmasking and _unmasking(report.unmasking),
    "settings": _facts(_flat(report.config), "settings"),
  }
  shown = {name: part or _missing(name) for name, part in parts.items()}
  page = importlib.resources.files(__package__) / "report_template.html"
  return string.Template(page.read_text("utf-8")).substitute(shown)


def _missing(name: str) -> "_Html":
  mode = "train" if name in ("curves", "data") else "eval"
  mode = _el("code", f"--mode={mode}")
  return _el("p", "Not here yet: ", mode, " gives it.", class_="missing")


# MARK: markup


class _Html(str):
  """Markup. Any other string is escaped where it becomes a part of some."""


def _join(parts: Iterable[Any]) -> _Html:
  safe = (p if isinstance(p, _Html) else html.escape(str(p)) for p in parts)
  return _Html("".join(safe))


def _el(tag: str, *children: Any, **attributes: Any) -> _Html:
  """Returns an element; `class_` gives class, `aria_label` aria-label."""
  written = "".join(
    f' {name.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
    for name, value in attributes.items()
  )
  return _Html(f"<{tag}{written}>{_join(children)}</{tag}>")


def _small(value: str, note: str) -> _Html:
  return _join([value, " ", _el("small", note)])


def _facts(pairs: Iterable[tuple[str, Any]], class_: str) -> _Html:
  items = [_el("div", _el("dt", k), _el("dd", v)) for k, v in pairs]
  return _el("dl", *items, class_=class_)


def _table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> _Html:
  """Returns a table; the first cell of each row names it."""
  top = _el("tr", *[_el("th", cell, scope="col") for cell in head])
  body = [
    _el("tr", _el("th", key, scope="row"), *[_el("td", c) for c in cells])
    for key, *cells in rows
  ]
  table = _el("table", _el("thead", top), _el("tbody", *body))
  # A wide one scrolls within itself, by keyboard too.
  return _el("div", table, class_="scroll", tabindex=0)


def _number(value: Number | None, form: str = "") -> str:
  """Returns a number in a given form, or with four digits; a dash for none."""
  if value is None or not math.isfinite(value):
    return "\u2013"
  return format(value, form or (",.0f" if abs(value) >= 1000 else ".4g"))


# MARK: numbers and texts


def _headline(results: Json) -> _Html:
  known = {k: math.nan if v is None else v for k, v in results.items()}
  number = lambda name, form=",.0f": _number(known[name], form)
  nelbo, error = (number(f"nelbo_{n}", ".4f") for n in ("per_token", "stderr"))
  # To first order, bits have the relative error of the nats.
  share = known["nelbo_stderr"] / (known["nelbo_per_token"] or math.nan)
  bits_error = _number(known["bits_per_byte"] * share, ".4f")
  rows = f"{number('eval_rows')} rows, {number('eval_tokens')} tokens"
  seconds = known["wall_seconds"]
  time = duration(seconds) if math.isfinite(seconds) else _number(None)
  speed = number("tokens_per_second") + " a second"
  facts = {
    "bits per byte": ("≤ " + number("bits_per_byte", ".4f"), "± " + bits_error),
    "NELBO, nats per token": (f"{nelbo} ± {error}", rows),
    "perplexity bound": ("≤ " + number("ppl_bound", ",.2f"), "per token"),
    "tokens seen": (number("tokens_seen"), speed),
    "time": (time, number("updates") + " updates"),
    "checkpoint": (number("checkpoint"), "update, the best bound"),
  }
  return _facts(((k, _small(*v)) for k, v in facts.items()), "headline")


def _targets(targets: list[Json]) -> _Html:
  head = ("target", "measure", "this run", "held-out text", "verdict")
  rows = []
  for t in targets:
    name, measure = _small(t["target"], t["meaning"]), _el("code", t["measure"])
    word = "pass" if t["passed"] else "miss"
    numbers = _number(t["value"]), _number(t["reference"])
    rows.append((name, measure, *numbers, _el("span", word, class_=word)))
  met = sum(t["passed"] for t in targets)
  return _join([_el("p", f"{met} of {len(targets)} met."), _table(head, rows)])


def _text_metrics(found: Json) -> _Html:
  columns = [found.get(text, {}) for text in _TEXTS]
  names = dict.fromkeys(name for column in columns for name in column)
  rows = [
    (name.replace("_", " "), *[_measured(c.get(name)) for c in columns])
    for name in names
  ]
  facts = [(k, v) for k, v in found.items() if k not in _TEXTS]
  table = _table(("measure", *_TEXTS.values()), rows)
  return _join([_facts(facts, "inline"), table])


def _measured(found: Json | None) -> Any:
  if found is None:
    return _number(None)
  error = f"±\xa0{_number(found['stderr'], '.2g')}, n\xa0=\xa0{found['n']}"
  return _small(_number(found["value"]), error)


def _samples(results: Json) -> _Html:
  facts = _facts(results["sampling"].items(), "inline")
  texts = [_el("li", text, class_="text") for text in results["samples"]]
  return _join([facts, _el("ol", *texts, class_="samples")])


def _unmasking(unmasking: Json) -> _Html:
  """Returns the last text; the script hides what a step has not revealed."""
  steps = unmasking["steps"]
  tokens = [
    _el("span", over[-1] or "", class_="token", data_step=over.count(None))
    for over in zip(*steps, strict=True)
  ]
  canvas = _el("p", *tokens, id="canvas", data_last=len(steps) - 1)
  return _join([_facts(unmasking["settings"].items(), "inline"), canvas])


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
  """Gives every setting by the name that the command line knows it by."""
  if isinstance(value, dict):
    for key, part in value.items():
      yield from _flat(part, f"{name}.{key}" if name else key)
  elif isinstance(value, list) and value and isinstance(value[0], dict):
    for i, part in enumerate(value):
      yield from _flat(part, f"{name}[{i}]")
  else:
    yield name, repr(value)


# MARK: stages


def _stages(stages: list[Json]) -> _Html:
  """Returns the key to the colours of the plots."""
  items = []
  for stage in stages:
    rows = f"{stage['unit']}, rows of {stage['length']:,} tokens"
    rates = "mask rate {:g}\u2013{:g}".format(*stage["mask_rate"] or (0, 1))
    if stage["rehearsal"]:
      rates += f", any in {stage['rehearsal']:.0%} of rows"
    parts = _el("b", stage["name"]), _el("span", rows), _el("span", rates)
    items.append(_el("li", *parts))
  return _el("ol", *items, class_="stages")


def _data(data: Json, stages: list[Json]) -> _Html:
  names = [stage["name"] for stage in stages] + ["held-out"]
  counts = list(data["rows"].values())
  plain = [name for name, count in counts[0].items() if isinstance(count, int)]
  rows = [(k.replace("_", " "), *[f"{c[k]:,}" for c in counts]) for k in plain]
  figures = _el("div", *map(_examples, names, counts), class_="figures")
  documents = {f"documents, {k}": v for k, v in data["documents"].items()}
  facts = (documents | data["tokenizer"]).items()
  return _join([_facts(facts, "inline"), _table(("", *names), rows), figures])


def _examples(name: str, counts: Json) -> _Html:
  """Returns a stage's histogram of difficulty, and some of its units."""
  drawing = _el("p", "Running text, not ranked.", class_="missing")
  if counts["difficulty"]:
    drawing = _histogram(counts["difficulty"])
  texts = [_el("li", text, class_="text") for text in counts["examples"]]
  summary = _el("summary", f"{len(texts)} examples")
  examples = _el("details", summary, _el("ol", *texts))
  return _figure(name, "difficulty of its units", drawing, examples)


def _figure(title: str, unit: str, *parts: _Html) -> _Html:
  return _el("figure", _el("figcaption", _small(title, unit)), *parts)


# MARK: plots


class _Point(NamedTuple):
  x: Number
  y: Number
  error: Number
  label: str


class _Axis(NamedTuple):
  """An interval, drawn from 0 to 100 percent."""

  low: Number
  high: Number

  def at(self, value: Number) -> float:
    return round(100 * (value - self.low) / (self.high - self.low), 2)

  def ticks(self) -> list[Number]:
    power = 10 ** math.floor(math.log10((self.high - self.low) / 4))
    steps = (step * power for step in (1, 2, 5, 10))
    step = next(s for s in steps if (self.high - self.low) / s <= 5)
    first, last = math.ceil(self.low / step), math.floor(self.high / step)
    return [step * n for n in range(first, last + 1)]


def _axis(values: Iterable[Number], low: Number | None = None) -> _Axis:
  """Returns an axis with some room around the values, or from `low`."""
  finite = [v for v in values if math.isfinite(v)] or [0.0]
  room = 0.08 * (max(finite) - min(finite)) or abs(finite[0]) / 100 or 1
  return _Axis(min(finite) - room if low is None else low, max(finite) + room)


def _band(x: _Axis, low: Number, high: Number, name: str, index: int) -> _Html:
  style = f"left:{x.at(low)}%;width:{x.at(high) - x.at(low):.2f}%"
  return _el("span", name, class_=f"band stage-{index % 4 + 1}", style=style)


def _plot(x: _Axis, y: _Axis, parts: list, paths: Json, **more: str) -> _Html:
  """Returns a frame with ticks; in the drawing, 0 is made the bottom by CSS."""
  ticks = [
    _el("span", _number(tick), class_=side, style=f"{side}:{axis.at(tick)}%")
    for axis, side in ((x, "left"), (y, "bottom"))
    for tick in axis.ticks()
  ]
  drawn = [_el("path", d=path, class_=name) for name, path in paths.items()]
  svg = _el("svg", *drawn, viewBox="0 0 100 100", preserveAspectRatio="none")
  return _el("div", *parts, *ticks, svg, class_="plot", role="img", **more)


def _curve(points: list[_Point], bands: list, low: Number | None) -> _Html:
  """Returns a curve over named bands; it breaks where a number is missing."""
  if not points:
    return _el("p", "No number yet.", class_="missing")
  x = _Axis(0, max([points[-1].x, *[high for _, high, *_ in bands]]))
  y = _axis([p.y + s * p.error for p in points for s in (-1, 1)], low)
  way = lambda run: "L".join(f"{x.at(p.x)} {y.at(p.y)}" for p in run)
  bar = lambda p: f"M{x.at(p.x)} {y.at(p.y - p.error)}V{y.at(p.y + p.error)}"
  runs = itertools.groupby(points, lambda p: math.isfinite(p.y))
  runs = [list(run) for finite, run in runs if finite]
  known = [p for run in runs for p in run]
  measured = [p for p in known if p.error > 0]
  paths = {
    "line": "".join(f"M{way(run)}h0" for run in runs),
    "errors": "".join(map(bar, measured)),
    "dots": "".join(f"M{way([p])}h0" for p in measured),
  }
  if low == 0:
    area = "".join(f"M{x.at(run[0].x)} 0L{way(run)}V0z" for run in runs)
    paths = {"area": area} | paths
  label = f"{points[0].label} to {points[-1].label}"
  data = json.dumps([(x.at(p.x), y.at(p.y), p.label) for p in known])
  parts = [_band(x, *band) for band in bands]
  return _plot(x, y, parts, paths, aria_label=label, data_points=data)


def _curves(lines: list[Json], stages: list[Json]) -> _Html:
  stage = "train/stage"
  ends = {round(line[stage]): line["step"] for line in lines if stage in line}
  if not ends:
    return _Html()
  cuts = itertools.pairwise([0, *ends.values()])
  bands = [
    (*cut, stages[number - 1]["name"], number - 1)
    for number, cut in zip(ends, cuts, strict=True)
  ]
  lost = sum(line.get("train/skipped", 0) > 0 for line in lines)
  told = f"; {lost} points hold updates that were not finite" if lost else ""
  curves = {
    "train/loss": ("Training loss", _CE + told, None),
    "eval/nelbo_per_token": ("Held-out NELBO", "nats per token", None),
    "train/learning_rate": ("Learning rate", "of an update", 0),
    "train/mask_rate": ("Mask rate", "mean over rows", 0),
  }
  return _join(
    _figure(title, unit, _curve(_series(lines, name), bands, low))
    for name, (title, unit, low) in curves.items()
  )


def _series(lines: list[Json], name: str) -> list[_Point]:
  """Returns one number over updates; of very many, means of neighbours."""
  found = list({line["step"]: line for line in lines if name in line}.values())
  size = math.ceil(len(found) / _MOST_POINTS) or 1
  points = []
  for part in (found[i : i + size] for i in range(0, len(found), size)):
    values = [strict_json.number(line[name]) for line in part]
    step, mean = part[-1]["step"], statistics.fmean(values)
    error = (part[-1][_ERRORS[name]] or 0) if name in _ERRORS else 0
    label = f"update {step:,}: {_number(mean)}"
    points.append(_Point(step, mean, error, label))
  return points


def _ce_by_mask_rate(curve: Json, stages: list[Json]) -> _Html:
  points = []
  for rate, loss in curve.items():
    known, label = math.nan if loss is None else loss, _number(loss, ".3f")
    points.append(_Point(float(rate), known, 0, f"{rate}: {label}"))
  bands = [
    (*(s["mask_rate"] or (0, 1)), s["name"], i) for i, s in enumerate(stages)
  ]
  table = _table(("mask rate", "CE"), [p.label.split(": ") for p in points])
  more = _el("details", _el("summary", "the numbers"), table)
  return _figure("Cross-entropy", _CE, _curve(points, bands, 0), more)


def _histogram(difficulty: Json) -> _Html:
  """Returns the units by difficulty; those beyond the cut are left out."""
  counts, cut = difficulty["histogram"], difficulty["cut"]
  x, y, bins = _Axis(0, 1), _Axis(0, max(counts) or 1), len(counts)
  bars = lambda stop: "".join(
    f"M{x.at(i / bins)} 0V{y.at(count)}H{x.at(min((i + 1) / bins, stop))}V0z"
    for i, count in enumerate(counts)
    if i / bins < stop
  )
  paths = {"rest": bars(1), "kept": bars(cut)}
  label = f"cut {cut:.2f}"
  mark = _el("span", label, class_="cut", style=f"left:{x.at(cut)}%")
  return _plot(x, y, [mark], paths, aria_label=f"histogram, {label}")
