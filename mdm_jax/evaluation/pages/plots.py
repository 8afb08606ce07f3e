"""Line plots and histograms, as data for the template `plots.html`."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from mdm_jax.evaluation.pages.page import Number


class Point(NamedTuple):
  x: Number
  y: Number
  error: Number
  label: str


class Axis(NamedTuple):
  """An interval, drawn from 0 to 100 percent."""

  low: Number
  high: Number

  def at(self, value: Number) -> float:
    return round(100 * (value - self.low) / (self.high - self.low), 2)

  def ticks(self) -> list[Number]:
    # The smallest step of 1, 2, 5 or 10 times a power of ten with <= 5 steps.
    power = 10 ** math.floor(math.log10((self.high - self.low) / 4))
    steps = (step * power for step in (1, 2, 5, 10))
    step = next(s for s in steps if (self.high - self.low) / s <= 5)
    first, last = math.ceil(self.low / step), math.floor(self.high / step)
    return [step * n for n in range(first, last + 1)]


@dataclasses.dataclass(frozen=True)
class Plot:
  """A plot in percent of its frame.

  Attributes:
    x: horizontal axis.
    y: vertical axis.
    label: description for screen readers.
    paths: SVG paths by CSS class.
    bands: (low, high, name, index of the stage's colour) on the x axis.
    points: (x, y, label) to show under the pointer.
    cutoff: position of a marked value on the x axis.
  """

  x: Axis
  y: Axis
  label: str
  paths: Mapping[str, str]
  bands: Sequence[tuple[Number, Number, str, int]] = ()
  points: Sequence[tuple[float, float, str]] = ()
  cutoff: float | None = None


def _axis_of(values: Iterable[Number], low: Number | None) -> Axis:
  """Returns an axis around the finite values with a margin, or from `low`."""
  finite = [v for v in values if math.isfinite(v)] or [0.0]
  # A constant curve needs an interval, too.
  room = 0.08 * (max(finite) - min(finite)) or abs(finite[0]) / 100 or 1
  return Axis(min(finite) - room if low is None else low, max(finite) + room)


def curve(points: list[Point], bands: list, low: Number | None) -> Plot | None:
  """Returns a line plot over named bands, with gaps at non-finite values.

  Args:
    points: points in the order of x.
    bands: as in `Plot`.
    low: lower end of the y axis; None to fit the values. At 0 the area below
      the curve is filled.

  Returns:
    The plot, or None without points.
  """
  if not points:
    return None
  x = Axis(0, max([points[-1].x, *[high for _, high, *_ in bands]]))
  y = _axis_of([p.y + s * p.error for p in points for s in (-1, 1)], low)
  through = lambda run: "L".join(f"{x.at(p.x)} {y.at(p.y)}" for p in run)
  bar = lambda p: f"M{x.at(p.x)} {y.at(p.y - p.error)}V{y.at(p.y + p.error)}"
  runs = itertools.groupby(points, lambda p: math.isfinite(p.y))
  runs = [list(run) for finite, run in runs if finite]
  known = [p for run in runs for p in run]
  measured = [p for p in known if p.error > 0]
  # h0 draws a segment of length 0, which a round line cap shows as a dot.
  paths = {
    "line": "".join(f"M{through(run)}h0" for run in runs),
    "errors": "".join(map(bar, measured)),
    "dots": "".join(f"M{through([p])}h0" for p in measured),
  }
  if low == 0:
    area = "".join(f"M{x.at(run[0].x)} 0L{through(run)}V0z" for run in runs)
    paths = {"area": area} | paths
  label = f"{points[0].label} to {points[-1].label}"
  shown = [(x.at(p.x), y.at(p.y), p.label) for p in known]
  return Plot(x, y, label, paths, bands, shown)


def scatter(points: list[Point], marked: Mapping[str, Point]) -> Plot:
  """Returns a plot of single points.

  Args:
    points: all points.
    marked: points in a colour of their own, by CSS class.
  """
  every = [*points, *marked.values()]
  x = _axis_of([p.x for p in every], None)
  y = _axis_of([p.y for p in every], None)
  dot = lambda p: f"M{x.at(p.x)} {y.at(p.y)}h0"
  paths = {"tried": "".join(map(dot, points))}
  paths |= {name: dot(point) for name, point in marked.items()}
  label = f"{len(points)} points, {', '.join(p.label for p in marked.values())}"
  shown = sorted((x.at(p.x), y.at(p.y), p.label) for p in every)
  return Plot(x, y, label, paths, points=shown)


def histogram(difficulty: dict[str, Any]) -> Plot:
  """Returns a histogram of units by difficulty, with the stage's cutoff."""
  counts, cut = difficulty["histogram"], difficulty["cut"]
  x, y, bins = Axis(0, 1), Axis(0, max(counts) or 1), len(counts)
  bars = lambda stop: "".join(
    f"M{x.at(i / bins)} 0V{y.at(count)}H{x.at(min((i + 1) / bins, stop))}V0z"
    for i, count in enumerate(counts)
    if i / bins < stop
  )
  # Bars up to the cutoff are drawn over all bars, in another colour.
  paths = {"rest": bars(1), "kept": bars(cut)}
  return Plot(x, y, f"histogram, cutoff {cut:.2f}", paths, cutoff=cut)
