"""Writes a run's report: one HTML page, made from the files of its folder."""

from mdm_jax import tuned_sampling
from mdm_jax.config import Config, to_dict
from mdm_jax.core.progress import console
from mdm_jax.evaluation.pages.report import RunReport, render
from mdm_jax.objectives.config import OBJECTIVES
from mdm_jax.workdir import Workdir


def report_workdir(config: Config, workdir: Workdir) -> str:
  """Writes report.html into a run's folder; prints and returns its path.

  A run that still trains, or was not evaluated, gets a page with less on it.
  """
  page = render(
    RunReport(
      name=config.name,
      config=to_dict(config),
      metrics=workdir.read_metrics(),
      data=workdir.read("data.json"),
      results=workdir.read("results.json"),
      unmasking=workdir.read("unmasking.json"),
      descriptions=[stage.objective.describe() for stage in config.stages],
      tuning=workdir.read(tuned_sampling.FILE),
      charts=OBJECTIVES[config.objective.name].charts,
    )
  )
  workdir.write("report.html", page)
  path = str(workdir.path / "report.html")
  console.print(f"written: {path}", soft_wrap=True)
  return path
