"""Tables and the plot of `block_lengths.py`."""

import io
from collections.abc import Mapping
from typing import Any

from mdm_jax.benchmarks import block_speed
from mdm_jax.core import tables
from mdm_jax.core.progress import with_error

AR, MASKED = "autoregressive", "masked"
HIGH, LOW = THRESHOLDS = 0.9, 0.5  # of a token's probability
COLUMNS = "model", "test, bits per byte", "CPU seconds"


def title(name: str) -> str:
  """Returns the name of a run for people."""
  return name.replace("block_", "blocks of ")


def cells(runs: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
  """Returns the rows of a table with `COLUMNS`."""
  return [
    [
      title(name),
      ("<= " if run["is_bound"] else "") + with_error(**run["bits_per_byte"]),
      f"{run['cpu_seconds']:.0f}",
    ]
    for name, run in runs.items()
  ]


def as_svg(found: Mapping[str, Any]) -> bytes:
  """Returns the plot: bits per byte and speed by block length."""
  # Imported here: matplotlib takes longer than the rest of a start.
  import matplotlib
  from matplotlib.figure import Figure

  figure = Figure(figsize=(10, 4), layout="constrained")
  left, right = figure.subplots(1, 2)
  runs = found["runs"]
  of_blocks = {int(n.split("_")[1]): r for n, r in runs.items() if "_" in n}
  bits = [run["bits_per_byte"] for run in of_blocks.values()]
  value, error = ([one[key] for one in bits] for key in ("value", "stderr"))
  left.errorbar(list(of_blocks), value, yerr=error, fmt="o-", label="blocks")
  for color, name in enumerate((AR, MASKED), 1):
    y = runs[name]["bits_per_byte"]["value"]
    left.axhline(y, color=f"C{color}", linestyle="--", label=name)
  left.set_ylabel("test, bits per byte (bounds but for 1)")
  for way, color in (("one token a step", "C0"), (f"threshold {LOW}", "C3")):
    of_way = [s for s in found["speed"] if s["name"].endswith(way)]
    for kind, style in (("cache", "o-"), ("whole_rows", "x:")):
      points = [
        (s["block"], s[kind]["tokens_per_second"])
        for s in of_way
        if kind in s and s["name"].startswith("blocks")
      ]
      label = f"{way}, {kind.replace('_', ' ')}"
      right.plot(*zip(*points, strict=True), style, color=color, label=label)
  speed = found["speed"][0]["cache"]["tokens_per_second"]
  right.axhline(speed, color="C1", linestyle="--", label=AR)
  right.set_ylabel("tokens per second")
  right.set_yscale("log")
  for axes in (left, right):
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(of_blocks), list(map(str, of_blocks)))
    axes.set_xlabel("tokens per block")
    axes.legend(fontsize="small")
  file = io.BytesIO()
  # The same file for the same numbers.
  with matplotlib.rc_context({"svg.hashsalt": "mdm_jax"}):
    figure.savefig(file, format="svg", metadata={"Date": None})
  return file.getvalue()


def as_markdown(found: Mapping[str, Any]) -> str:
  """Returns all tables as Markdown."""
  speed = lambda key: tables.as_markdown(
    block_speed.COLUMNS, block_speed.cells(found[key])
  )
  runs = tables.as_markdown(COLUMNS, cells(found["runs"]))
  return "\n".join([runs, speed("speed"), speed("long_rows")])
