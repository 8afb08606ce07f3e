"""The plot of the study of repeated text: losses over epochs and on test."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from mdm_jax.studies import cells as cells_lib
from mdm_jax.studies.cell_report import Group, groups
from mdm_jax.studies.cells import Found, Preset


def as_png(preset: Preset, found: Found) -> bytes:
  """Returns the plot: validation over epochs by amount of text, then test."""
  # Imported here: matplotlib takes longer than the rest of a start.
  from matplotlib.figure import Figure

  every = groups(preset, found)
  size = next(iter(preset.sizes))
  parts = [n for n in preset.parts if any(g.part == n for g in every)]
  figure = Figure(
    figsize=(4 * (len(parts) + 1), 4.5), dpi=110, layout="constrained"
  )
  total = cells_lib.count(preset)
  figure.suptitle(
    f"{len(found)} of {total} cells; the {size} model; dots: best checkpoints",
    fontsize="medium",
  )
  *curves, last = figure.subplots(1, len(parts) + 1, squeeze=False)[0]
  color = {arm: f"C{i}" for i, arm in enumerate(preset.arms)}
  for axes, part in zip(curves, parts, strict=True):
    for group in every:
      if (group.size, group.part) != (size, part):
        continue
      x, y = zip(*group.curve, strict=True)
      axes.plot(x, y, color=color[group.arm], label=group.arm)
      best = int(np.argmin(y))
      axes.plot(x[best], y[best], "o", color=color[group.arm])
      axes.set_title(f"{group.runs[0]['characters']:,} characters")
    axes.set_xscale("log")
    axes.set_xlabel("epochs")
  curves[0].set_ylabel("validation, bits per byte")
  curves[0].legend(fontsize="small")
  _plot_test(last, [g for g in every if g.size == size], preset, color)
  file = io.BytesIO()
  figure.savefig(file, format="png")
  return file.getvalue()


def _plot_test(
  axes: Any, every: list[Group], preset: Preset, color: Mapping[str, str]
) -> None:
  for name, style in (("bits_per_byte", "o-"), ("chain_rule", "x--")):
    for arm in preset.arms:
      of_arm = [g for g in every if g.arm == arm and name in g.runs[0]]
      if not of_arm:
        continue
      axes.plot(
        [g.runs[0]["characters"] for g in of_arm],
        [np.mean([r[name]["value"] for r in g.runs]) for g in of_arm],
        style,
        color=color[arm],
        label=f"{arm}, chain rule" if name == "chain_rule" else arm,
      )
  axes.set_xscale("log")
  axes.set_xlabel("unique characters")
  axes.set_title("test, best checkpoint")
  axes.legend(fontsize="small")
