"""Draws line plots as SVG with HTML labels, in percent of their frame."""

import itertools
import json
import math
from collections.abc import Iterable
from typing import NamedTuple

from mdm_jax.evaluation.pages import markup
from mdm_jax.evaluation.pages.markup import Number


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


def axis_of(values: Iterable[Number], low: Number | None = None) -> Axis:
  """Returns an axis around the finite values with a margin, or from `low`."""
  finite = [v for v in values if math.isfinite(v)] or [0.0]
  # A constant curve needs an interval, too.
  room = 0.08 * (max(finite) - min(finite)) or abs(finite[0]) / 100 or 1
  return Axis(min(finite) - room if low is None else low, max(finite) + room)


def _band(
  x: Axis, low: Number, high: Number, name: str, index: int
) -> markup.Html:
  style = f"left:{x.at(low)}%;width:{x.at(high) - x.at(low):.2f}%"
  return markup.el(
    "span", name, class_=f"band stage-{index % 4 + 1}", style=style
  )


def plot(
  x: Axis, y: Axis, parts: list, paths: dict[str, str], **more: str
) -> markup.Html:
  """Returns a plot: a frame with ticks, parts as labels, and SVG paths.

  Paths are in percent, with y upwards: CSS flips the drawing.
  """
  ticks = [
    markup.el(
      "span", markup.number(tick), class_=side, style=f"{side}:{axis.at(tick)}%"
    )
    for axis, side in ((x, "left"), (y, "bottom"))
    for tick in axis.ticks()
  ]
  drawn = [
    markup.el("path", d=path, class_=name) for name, path in paths.items()
  ]
  svg = markup.el(
    "svg", *drawn, viewBox="0 0 100 100", preserveAspectRatio="none"
  )
  return markup.el(
    "div", *parts, *ticks, svg, class_="plot", role="img", **more
  )


def curve(points: list[Point], bands: list, low: Number | None) -> markup.Html:
  """Returns a line plot over named bands, with gaps at non-finite values.

  Args:
    points: points in the order of x.
    bands: (low, high, name, index of the stage's colour) on the x axis.
    low: lower end of the y axis; None to fit the values. At 0 the area below
      the curve is filled.
  """
  if not points:
    return markup.el("p", "No number yet.", class_="missing")
  x = Axis(0, max([points[-1].x, *[high for _, high, *_ in bands]]))
  y = axis_of([p.y + s * p.error for p in points for s in (-1, 1)], low)
  way = lambda run: "L".join(f"{x.at(p.x)} {y.at(p.y)}" for p in run)
  bar = lambda p: f"M{x.at(p.x)} {y.at(p.y - p.error)}V{y.at(p.y + p.error)}"
  runs = itertools.groupby(points, lambda p: math.isfinite(p.y))
  runs = [list(run) for finite, run in runs if finite]
  known = [p for run in runs for p in run]
  measured = [p for p in known if p.error > 0]
  # h0 draws a segment of length 0, which a round line cap shows as a dot.
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
  return plot(x, y, parts, paths, aria_label=label, data_points=data)
