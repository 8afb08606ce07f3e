"""Sweeps the temperature: likelihood by a judge against entropy of the texts.

A low temperature gives likely but monotonous text, so neither number means much
without the other. Validation text shows where both should be.
"""

import dataclasses
import io
from typing import Any

from mdm_jax.config import Config
from mdm_jax.core import modules
from mdm_jax.studies import sampled
from mdm_jax.studies.sampled import Sampled
from mdm_jax.workdir import Workdir

TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)


def frontier_workdir(config: Config, workdir: Workdir) -> list[dict[str, Any]]:
  """Sweeps the temperature of a run's best checkpoint; writes CSV and PNG.

  Args:
    config: the run's config, perhaps with other settings.
    workdir: the run's folder.

  Returns:
    Rows of `Sampled` as plain values: the run's own settings, the temperatures
    without filters, validation text.

  Raises:
    UserError: there is no checkpoint, or matplotlib is not installed.
  """
  modules.need("matplotlib", "plots", "--mode=frontier")
  # Filters would hide what the temperature does.
  plain = dataclasses.asdict(config.sample.untruncated())
  settings = {"the run's settings": {}} | {
    f"T = {t:g}": plain | {"temperature": t} for t in TEMPERATURES
  }
  found, title = sampled.sample_each(config, workdir, settings)
  workdir.write("frontier.csv", sampled.as_csv(found))
  workdir.write("frontier.png", _as_png(found, title))
  return [dataclasses.asdict(row) for row in found]


def _as_png(found: list[Sampled], title: str) -> bytes:
  # Imported here: matplotlib takes longer than the rest of a start.
  from matplotlib.figure import Figure

  own, *swept, text = found
  figure = Figure(figsize=(7, 5), dpi=150, layout="constrained")
  axes = figure.add_subplot()
  for rows, name, color in (
    (swept, f"{swept[0].settings} to {TEMPERATURES[-1]:g}, no filters", "C0"),
    ([own], own.settings, "C1"),
    ([text], text.settings, "black"),
  ):
    axes.errorbar(
      [row.unigram_entropy for row in rows],
      [row.judge_nll for row in rows],
      xerr=[row.unigram_entropy_stderr for row in rows],
      yerr=[row.judge_nll_stderr for row in rows],
      marker="o",
      color=color,
      label=name,
    )
  for row in (swept[0], swept[-1]):
    at = row.unigram_entropy, row.judge_nll
    axes.annotate(
      row.settings, at, xytext=(0, 8), textcoords="offset points", ha="center"
    )
  axes.set_xlabel("unigram entropy of a text, nats (higher: more diverse)")
  axes.set_ylabel("judge, nats per byte (lower: more likely)")
  axes.set_title(title, fontsize="medium")
  axes.legend()
  file = io.BytesIO()
  figure.savefig(file, format="png")
  return file.getvalue()
