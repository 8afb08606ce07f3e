"""Sweeps the temperature: likelihood by a judge against entropy of the texts.

A low temperature gives likely but monotonous text, so neither number means much
without the other. Validation text shows where both should be.
"""

import dataclasses
from typing import Any

from mdm_jax.config import Config
from mdm_jax.core import modules
from mdm_jax.studies import sampled
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
  own, *swept, text = found
  groups = {own.settings: [own], "T, no filters": swept, text.settings: [text]}
  workdir.write("frontier.png", sampled.as_png(groups, title))
  return [dataclasses.asdict(row) for row in found]
