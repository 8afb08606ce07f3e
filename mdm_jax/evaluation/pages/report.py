"""Renders the report of a run as one self-contained HTML page.

`templates/report.html` has the layout and text; this module prepares the data.
"""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mdm_jax.core import strict_json
from mdm_jax.evaluation.pages import page, plots, tuning
from mdm_jax.objectives.measured import (
  PERPLEXITY,
  Chart,
  Curve,
  Measured,
  from_json,
)

_LEARNING_RATE = Chart("Learning rate", "of an update", low=0)
_MOST_POINTS = 160  # of a curve; of more, neighbours are averaged

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
    descriptions: what each stage trains on, as described by the objective.
    charts: logged numbers to plot over updates, by name.
    tuning: contents of sampling.json: sampling settings that were tried.
  """

  name: str
  config: Json
  metrics: list[Json]
  data: Json | None
  results: Json | None
  unmasking: Json | None
  descriptions: Sequence[str] = ()
  charts: Mapping[str, Chart] = dataclasses.field(default_factory=dict)
  tuning: Json | None = None


def render(report: RunReport) -> str:
  """Returns the report as HTML; missing parts say how to create them."""
  results, stages = report.results or {}, report.config["stages"]
  measured = from_json(results) if results else Measured()
  tokens = (
    zip(*report.unmasking["steps"], strict=True) if report.unmasking else []
  )
  return page.render(
    "report.html",
    report=report,
    settings=_flat(report.config),
    results=results,
    measured=measured,
    perplexity=PERPLEXITY,
    text_titles=_text_titles(results),
    histogram=plots.histogram,
    tokens=tokens,
    tuning=tuning,
    charts=list(_charts(report.metrics, stages, report.charts)),
    # Test text only: validation text is for the choice of a checkpoint.
    curves=[
      (curve, _drawn(curve, stages))
      for curve in measured.curves.values()
      if curve.split == "test"
    ],
  )


def _text_titles(results: Json) -> dict[str, str]:
  """Returns the title of every text metric of any column, by name."""
  columns = results.get("text_metrics", {}).values()
  return {
    name: metric["title"]
    for column in columns
    if isinstance(column, dict)
    for name, metric in column.items()
  }


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


def _charts(
  lines: list[Json], stages: list[Json], charts: Mapping[str, Chart]
) -> Iterator[Json]:
  """Yields title, unit and plot of each logged number, over updates."""
  stage = "train/stage"
  # The last update of each stage; later lines overwrite earlier ones.
  ends = {round(line[stage]): line["step"] for line in lines if stage in line}
  if not ends:
    return
  cuts = itertools.pairwise([0, *ends.values()])
  bands = [
    (*cut, stages[number - 1]["name"], number - 1)
    for number, cut in zip(ends, cuts, strict=True)
  ]
  lost = sum(line.get("train/skipped", 0) > 0 for line in lines)
  for name, chart in {**charts, "train/learning_rate": _LEARNING_RATE}.items():
    unit = chart.unit
    if lost and name == "train/loss":
      unit += f"; {lost} points include skipped, non-finite updates"
    points = _series(lines, name, chart.error)
    drawing = plots.curve(points, bands, chart.low)
    yield {"title": chart.title, "unit": unit, "plot": drawing}


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
    label = f"update {step:,}: {page.number(mean)}"
    points.append(plots.Point(step, mean, error, label))
  return points


def _drawn(curve: Curve, stages: list[Json]) -> plots.Plot | None:
  names = [stage["name"] for stage in stages]
  bands = [
    (low, high, name, names.index(name) if name in names else i)
    for i, (low, high, name) in enumerate(curve.bands)
  ]
  points = [
    plots.Point(float(x), y, 0, f"{x}: {page.number(y, '.3f')}")
    for x, y in curve.points().items()
  ]
  return plots.curve(points, bands, 0)
