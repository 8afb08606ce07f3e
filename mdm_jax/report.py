"""From a run's folder to one page a person can look at."""

from mdm_jax.config import Config, to_dict
from mdm_jax.core.progress import console
from mdm_jax.evaluation.pages.report import RunReport, render
from mdm_jax.objectives.config import OBJECTIVES
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
      asked=[stage.objective.describe() for stage in config.stages],
      charts=OBJECTIVES[config.objective.name].charts,
    )
  )
  path = str(workdir.write_page(page))
  console.print(f"written: {path}", soft_wrap=True)
  return path
