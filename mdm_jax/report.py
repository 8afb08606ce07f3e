"""From a run's folder to one page a person can look at."""

from mdm_jax.config import Config, to_dict
from mdm_jax.core.progress import console
from mdm_jax.evaluation.pages.report import RunReport, render
from mdm_jax.objectives import bound
from mdm_jax.workdir import Workdir


def report_workdir(config: Config, workdir: Workdir) -> str:
  """Writes report.html from the run's files, prints and returns its path.

  A run that goes on or was not evaluated has a page too, with less on it.
  """
  page = render(
    RunReport(
      name=config.name,
      config=to_dict(config),
      metrics=workdir.read_metrics(),
      data=workdir.read_data(),
      results=workdir.read_results(),
      unmasking=workdir.read_unmasking(),
      asked=[bound.describe(stage) for stage in config.stages],
      charts=bound.CHARTS,
    )
  )
  path = str(workdir.write_page(page))
  console.print(f"written: {path}", soft_wrap=True)
  return path
