"""Sweeps the temperature: likelihood by a judge against entropy of the texts.

A low temperature gives likely but monotonous text, so neither number means much
without the other. Validation text shows where both should be.
"""

import dataclasses
import io
from typing import Any

from mdm_jax import sample
from mdm_jax.config import Config
from mdm_jax.core import tables
from mdm_jax.core.progress import console, with_error
from mdm_jax.core.standard_errors import Clusters
from mdm_jax.data.prepared import PreparedData, training_texts
from mdm_jax.evaluation import samples as samples_lib
from mdm_jax.evaluation.judge import Judge, make_judge, nll_per_byte
from mdm_jax.evaluation.running_text import running_texts
from mdm_jax.evaluation.text_metrics import measure
from mdm_jax.measured_text import open_rows
from mdm_jax.workdir import Workdir

TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)


@dataclasses.dataclass(frozen=True)
class Point:
  """One way to sample, and what its texts are like.

  Attributes:
    drawn: name of the settings.
    judge_nll: the judge's nats per byte.
    judge_nll_stderr: its standard error.
    unigram_entropy: entropy of a text's own tokens, in nats.
    unigram_entropy_stderr: its standard error.
    n: number of texts.
  """

  drawn: str
  judge_nll: float
  judge_nll_stderr: float
  unigram_entropy: float
  unigram_entropy_stderr: float
  n: int


def frontier_workdir(config: Config, workdir: Workdir) -> list[dict[str, Any]]:
  """Sweeps the temperature of a run's best checkpoint; writes CSV and PNG.

  Args:
    config: the run's config, perhaps with other settings.
    workdir: the run's folder.

  Returns:
    The points as plain values: the run's own settings, the temperatures without
    filters, validation text.
  """
  data, config = open_rows(config, workdir)
  judge = make_judge(config.eval.judge, training_texts(config.rows))
  points = _sweep(sample.load_with(config, workdir), data, judge)
  _show(points, judge.name)  # before the write, which may fail
  workdir.write_frontier(_as_csv(points), _as_png(points, judge.name))
  return [dataclasses.asdict(point) for point in points]


def _sweep(
  model: sample.Model, data: PreparedData, judge: Judge
) -> list[Point]:
  config = model.config
  # Filters would hide what the temperature does.
  plain = samples_lib.untruncated(config.sample)
  ways = {"the run's settings": config.sample} | {
    f"T = {t:g}": dataclasses.replace(plain, temperature=t)
    for t in TEMPERATURES
  }
  count = max(config.eval.samples, config.sample.num_samples)
  points = []
  for name, settings in ways.items():
    settings = dataclasses.replace(settings, num_samples=count)
    texts = model.generate("", **dataclasses.asdict(settings)).texts
    points.append(_point(name, judge, texts))
  own = running_texts(
    data.validation, data.tokenizer, points[0].n, config.sample_length
  )
  text = _point("validation text", judge, own.texts, own.documents)
  return [*points, text]


def _point(
  drawn: str, judge: Judge, texts: list[str], documents: Clusters = None
) -> Point:
  nll = nll_per_byte(judge, texts, documents)
  entropy = measure(texts, documents=documents)["unigram_entropy"]
  return Point(
    drawn, nll.value, nll.stderr, entropy.value, entropy.stderr, len(texts)
  )


# MARK: CSV, PNG and a table


def _as_csv(points: list[Point]) -> str:
  names = [field.name for field in dataclasses.fields(Point)]
  return tables.as_csv(names, map(dataclasses.astuple, points))


def _as_png(points: list[Point], judge: str) -> bytes:
  # Imported here: matplotlib takes longer than the rest of a start.
  from matplotlib.figure import Figure

  own, *swept, text = points
  figure = Figure(figsize=(7, 5), dpi=150, layout="constrained")
  axes = figure.add_subplot()
  for group, name, color in (
    (swept, f"{swept[0].drawn} to {TEMPERATURES[-1]:g}, nothing cut off", "C0"),
    ([own], own.drawn, "C1"),
    ([text], text.drawn, "black"),
  ):
    axes.errorbar(
      [p.unigram_entropy for p in group],
      [p.judge_nll for p in group],
      xerr=[p.unigram_entropy_stderr for p in group],
      yerr=[p.judge_nll_stderr for p in group],
      marker="o",
      color=color,
      label=name,
    )
  for p in (swept[0], swept[-1]):
    at = p.unigram_entropy, p.judge_nll
    axes.annotate(
      p.drawn, at, xytext=(0, 8), textcoords="offset points", ha="center"
    )
  axes.set_xlabel("unigram entropy of a text, nats: more is more diverse")
  axes.set_ylabel("nats a byte to the judge: less is likelier")
  axes.set_title(f"{own.n} texts a point, judged by {judge}", fontsize="medium")
  axes.legend()
  file = io.BytesIO()
  figure.savefig(file, format="png")
  return file.getvalue()


def _show(points: list[Point], judge: str) -> None:
  names = "drawn", "judge, nats a byte", "unigram entropy, nats"
  rows = (
    (
      p.drawn,
      with_error(p.judge_nll, p.judge_nll_stderr),
      with_error(p.unigram_entropy, p.unigram_entropy_stderr),
    )
    for p in points
  )
  console.print(tables.for_terminal(names, rows, f"judged by {judge}"))
