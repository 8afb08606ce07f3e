"""The plot of the study of repeated text: losses over epochs and on test."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from mdm_jax.core.standard_errors import mean
from mdm_jax.studies import cells as cells_lib
from mdm_jax.studies.cell_report import Group, groups
from mdm_jax.studies.cells import Found, Preset


def as_png(preset: Preset, found: Found) -> bytes:
  """Returns the plot: a row for each size of the model that has finished cells.

  Validation over epochs by amount of text, then the best checkpoints on test
  text, with standard errors over seeds and the n-gram model of the same text.
  """
  # Imported here: matplotlib takes longer than the rest of a start.
  from matplotlib.figure import Figure

  every = groups(preset, found)
  sizes = [size for size in preset.sizes if any(g.size == size for g in every)]
  parts = [n for n in preset.parts if any(g.part == n for g in every)]
  columns = len(parts) + 1
  figure = Figure(
    figsize=(4 * columns, 4.5 * len(sizes)), dpi=110, layout="constrained"
  )
  finished = len(cells_lib.in_study(preset, found))
  figure.suptitle(
    f"{finished} of {cells_lib.count(preset, found)} cells. Dots: best"
    " checkpoints; bars: standard error over seeds; losses above the first"
    " checkpoint's are out of the frame",
    fontsize="medium",
  )
  color = {arm: f"C{i}" for i, arm in enumerate(preset.arms)}
  rows = figure.subplots(len(sizes), columns, squeeze=False)
  for size, (*curves, last) in zip(sizes, rows, strict=True):
    of_size = [g for g in every if g.size == size]
    for axes, part in zip(curves, parts, strict=True):
      _plot_curves(axes, [g for g in of_size if g.part == part], color)
    drawn = [axes for axes in curves if axes.lines]
    drawn[0].set_ylabel(f"{size} model: validation, bits per byte")
    drawn[0].legend(fontsize="small")
    _plot_test(last, of_size, preset, color)
  file = io.BytesIO()
  figure.savefig(file, format="png")
  return file.getvalue()


def _plot_curves(
  axes: Any, every: list[Group], color: Mapping[str, str]
) -> None:
  if not every:
    axes.set_axis_off()  # nothing has been finished here yet
    return
  first = []
  for group in every:
    x, y = zip(*group.curve, strict=True)
    axes.plot(x, y, color=color[group.arm], label=group.arm)
    best = int(np.argmin(y))
    axes.plot(x[best], y[best], "o", color=color[group.arm])
    first.append(y[0])
  # A stage that trains on few mask rates can have a far higher bound than the
  # first checkpoint: drawn in full, it would flatten all that matters.
  axes.set_ylim(top=max(first) + 0.1)
  axes.set_title(f"{every[0].runs[0]['characters']:,} characters")
  axes.set_xscale("log")
  axes.set_xlabel("epochs")


def _plot_test(
  axes: Any, every: list[Group], preset: Preset, color: Mapping[str, str]
) -> None:
  for name, style in (("bits_per_byte", "o-"), ("chain_rule", "x--")):
    for arm in preset.arms:
      of_arm = [g for g in every if g.arm == arm and name in g.runs[0]]
      if not of_arm:
        continue
      seeds = [mean([r[name]["value"] for r in g.runs]) for g in of_arm]
      kind = "bound" if of_arm[0].runs[0]["is_bound"] else "exact"
      axes.errorbar(
        [g.runs[0]["characters"] for g in of_arm],
        [of.value for of in seeds],
        # One seed has none.
        yerr=[of.stderr if np.isfinite(of.stderr) else 0.0 for of in seeds],
        fmt=style,
        color=color[arm],
        label=f"{arm}, {'left to right' if name == 'chain_rule' else kind}",
      )
  texts = {g.runs[0]["characters"]: g.runs[0]["baselines"] for g in every}
  axes.plot(
    sorted(texts),
    [texts[n]["ngram"] for n in sorted(texts)],
    ".:",
    color="grey",
    label="n-gram model",
  )
  axes.set_xscale("log")
  axes.set_xlabel("unique characters")
  axes.set_title("test, best checkpoint")
  axes.legend(fontsize="small")
