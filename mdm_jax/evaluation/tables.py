"""Prints the results of an evaluation as tables on the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from mdm_jax.core.progress import console, with_error
from mdm_jax.core.tables import for_terminal
from mdm_jax.objectives.measured import BITS, PERPLEXITY, Measured, Value

_POINTS = 6  # of a curve that are printed


def show(measured: Measured, results: Mapping[str, Any]) -> None:
  """Prints measurements, text metrics, targets and samples.

  Args:
    measured: the model's measurements on held-out text.
    results: contents of results.json.
  """
  console.print(_measured_table(measured, results))
  if "text_metrics" in results:
    console.print(text_table(results["text_metrics"]))
  if "answers" in results:
    console.print(answer_table(results["answers"]))
  if results["targets"]:
    console.print(target_table(results["targets"]))
  settings = ", ".join(f"{k} {v}" for k, v in results["sampling"].items())
  console.print(f"samples are drawn with {settings}", soft_wrap=True)
  for i, text in enumerate(results["samples"], start=1):
    console.rule(f"sample {i}")
    console.print(text, soft_wrap=True)


def _measured_table(measured: Measured, results: Mapping[str, Any]) -> Table:
  text = results["text"]
  whose = text["split"] if text["own"] else text["corpus"]
  title = f"{whose} text, update {results['checkpoint']:,}"
  table = for_terminal(["metric", "value"], title=title)
  rows = [(v.heading, _number(v)) for v in measured.values.values()]
  # The model's own bits say little alone: what to compare them with is next.
  roles = [v.role for v in measured.values.values()]
  below = roles.index(BITS) + 1 if BITS in roles else len(rows)
  rows[below:below] = map(_baseline, results["baselines"].values())
  for row in rows:
    table.add_row(*row)
  for curve in measured.curves.values():
    if curve.split == text["split"]:
      for x, y in _some(list(curve.points().items())):
        table.add_row(curve.point.format(x), with_error(y, None))
  names = "documents", "rows", "tokens", "bytes"
  sizes = ", ".join(f"{results[name]:,} {name}" for name in names)
  table.caption = f"on {sizes}"
  table.add_row("tokens seen", f"{results['tokens_seen']:,.0f}")
  table.add_row("wall seconds", f"{results['wall_seconds']:,.0f}")
  return table


def _baseline(found: Mapping[str, Any]) -> tuple[str, str]:
  bits = with_error(found["bits_per_byte"], found["stderr"], ".4f")
  return f"bits per byte, {found['name']}", bits


def in_a_line(measured: Measured) -> str:
  """Returns the headline and bits per byte on one line, for the log."""
  head = measured.head()
  parts = [f"{head.title} {_number(head)} {head.unit}".rstrip()]
  bits = measured.with_role(BITS).values()
  parts += [f"{b.value:.3f} {b.title}" for b in bits]
  return ", ".join(parts)


def _number(value: Value) -> str:
  form = ".2f" if value.role == PERPLEXITY else ".4f"
  # The exact value is at most the bound.
  below = "<= " if value.bound else ""
  return below + with_error(value.value, value.error, form)


def _some(points: list[Any]) -> list[Any]:
  """Returns evenly spaced points, including the first and the last."""
  size = len(points)
  if size <= _POINTS:
    return points
  return [points[i * (size - 1) // (_POINTS - 1)] for i in range(_POINTS)]


def answer_table(metrics: Mapping[str, Any]) -> Table:
  """Returns the metrics of answers in results.json as a table."""
  count = next(iter(metrics.values()))["n"]
  table = for_terminal(["answers", "mean"], title=f"{count} held-out prompts")
  for found in metrics.values():
    table.add_row(found["title"], _cell(found["value"], found["stderr"]))
  return table


def text_table(metrics: Mapping[str, Any]) -> Table:
  """Returns the text metrics of results.json as a table."""
  # Keys of results.json, and titles; without a tuning there is no "tuned".
  titles = {"sampling": "samples", "tuned": "tuned"}
  titles |= {"untruncated": "samples, T = 1", "held_out": "test text"}
  titles = {k: v for k, v in titles.items() if k in metrics}
  count = next(iter(metrics["sampling"].values()))["n"]
  title = f"{count} samples, judged by {metrics['judge']}"
  table = for_terminal(["metric", *titles.values()], title=title)
  table.collapse_padding = len(titles) > 3  # fits 80 characters
  for name, measured in metrics["sampling"].items():
    found = (metrics[source][name] for source in titles)
    cells = (_cell(m["value"], m["stderr"]) for m in found)
    table.add_row(measured["title"], *cells)
  return table


def _cell(value: float | None, stderr: float | None) -> str:
  # Four columns fit 80 characters if none is wider than "0.123 ± 0.456".
  wide = value is not None and abs(value) >= 10
  return with_error(value, stderr, ".2f" if wide else ".3f")


def target_table(lines: list[Mapping[str, Any]]) -> Table:
  """Returns the targets of results.json as a table.

  Targets of tuned samples are in a column beside those of the run's own.
  """
  tuned = {t["measure"]: t for t in lines if t.get("texts") == "tuned"}
  names = ["target", "measured", *(["tuned"] if tuned else []), "test text"]
  table = for_terminal(names, title="the guide's targets")
  for t in (t for t in lines if t.get("texts") != "tuned"):
    name = Text.assemble(
      f"{t['target']}: {t['measure']}\n  ", (t["meaning"], "dim")
    )
    beside = [_result(tuned.get(t["measure"]))] if tuned else []
    reference = "-" if t["reference"] is None else f"{t['reference']:.3f}"
    table.add_row(name, _result(t), *beside, reference)
  return table


def _result(target: Mapping[str, Any] | None) -> str:
  if target is None:
    return ""
  value = target["value"]
  number = "-" if value is None else f"{value:.3f}"
  result = {True: " pass", False: " miss", None: ""}[target["passed"]]
  return number + result
