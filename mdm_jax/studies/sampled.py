"""Samples from a run with several settings, and measures each set of texts."""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

from mdm_jax import sample
from mdm_jax.config import Config
from mdm_jax.core import tables
from mdm_jax.core.errors import UserError
from mdm_jax.core.progress import console, with_error
from mdm_jax.core.standard_errors import Clusters
from mdm_jax.data import corpora
from mdm_jax.data.prepared import training_texts
from mdm_jax.evaluation.judge import Judge, make_judge, nll_per_byte
from mdm_jax.evaluation.running_text import running_texts
from mdm_jax.evaluation.text_metrics import measure
from mdm_jax.measured_text import open_rows
from mdm_jax.workdir import Workdir

COLUMNS = (
  *("settings", "calls", "judge, nats/byte", "entropy, nats"),
  "repeated 2-grams",
)
_TEXT = "validation text"


@dataclasses.dataclass(frozen=True)
class Sampled:
  """What texts are like that were sampled with the same settings.

  Attributes:
    settings: name of the settings.
    num_steps: denoiser calls allowed; 0 for text that wasn't sampled.
    calls: denoiser calls made, mean over the texts.
    judge_nll: the judge's nats per byte.
    judge_nll_stderr: its standard error.
    unigram_entropy: entropy of a text's own tokens, in nats.
    unigram_entropy_stderr: its standard error.
    seq_rep_2: fraction of a text's 2-grams that it has before.
    seq_rep_2_stderr: its standard error.
    n: number of texts.
  """

  settings: str
  num_steps: int
  calls: float
  judge_nll: float
  judge_nll_stderr: float
  unigram_entropy: float
  unigram_entropy_stderr: float
  seq_rep_2: float
  seq_rep_2_stderr: float
  n: int

  @property
  def cells(self) -> tuple[str, ...]:
    """The row of a table with `COLUMNS`."""
    return (
      self.settings,
      f"{self.calls:.1f}",
      with_error(self.judge_nll, self.judge_nll_stderr),
      with_error(self.unigram_entropy, self.unigram_entropy_stderr),
      with_error(self.seq_rep_2, self.seq_rep_2_stderr),
    )


def sample_each(
  config: Config, workdir: Workdir, settings: Mapping[str, Mapping[str, Any]]
) -> tuple[list[Sampled], str]:
  """Samples a run's best checkpoint with each of several settings.

  Prints the table, because writing it may fail.

  Args:
    config: the run's config, perhaps with other settings.
    workdir: the run's folder.
    settings: by name, the fields of `SampleConfig` to change.

  Returns:
    What the texts are like, in the order of `settings`, then the same for
    validation text; and the table's title.

  Raises:
    UserError: there is no checkpoint, the run had other data, or its texts are
      prompts with answers.
  """
  if corpora.has_answers(config.data):
    raise UserError(
      "this run answers prompts, and free text is not what it was trained for;"
      " --mode=compare compares settings by its answers"
    )
  data, config = open_rows(config, workdir)
  judge = make_judge(
    config.eval.judge, training_texts(config.rows), config.mesh
  )
  model = sample.load(workdir, config=config)
  count = max(config.eval.samples, config.sample.num_samples)
  found = []
  for name, changed in possible(model, settings).items():
    drawn = model.generate("", **{**changed, "num_samples": count})
    steps = changed.get("num_steps", config.sample.num_steps)
    calls = float(drawn.calls.mean())
    found.append(_measured(name, steps, calls, judge, drawn.texts))
    console.print(f"{len(found)}: {name}", soft_wrap=True)
  own = running_texts(
    data.validation, data.tokenizer, count, config.sample_length
  )
  found.append(_measured(_TEXT, 0, 0.0, judge, own.texts, own.documents))
  title = f"{count} texts each, judged by {judge.name}"
  cells = [row.cells for row in found]
  console.print(tables.for_terminal(COLUMNS, cells, title))
  return found, title


def as_csv(found: Sequence[Any]) -> str:
  """Returns a CSV table of dataclasses, with a column per field."""
  names = [field.name for field in dataclasses.fields(found[0])]
  return tables.as_csv(names, map(dataclasses.astuple, found))


def as_png(groups: Mapping[str, Sequence[Sampled]], title: str) -> bytes:
  """Returns a plot of the judge's number and of repetition, by entropy.

  Args:
    groups: rows to draw in one colour and to connect, by name.
    title: of the plot.
  """
  # Imported here: matplotlib takes longer than the rest of a start.
  from matplotlib.figure import Figure

  figure = Figure(figsize=(11, 5), dpi=150, layout="constrained")
  figure.suptitle(title, fontsize="medium")
  for axes, metric, name in zip(
    figure.subplots(1, 2),
    ("judge_nll", "seq_rep_2"),
    (
      "judge, nats per byte (lower: more likely)",
      "repeated 2-grams (lower: less repetitive)",
    ),
    strict=True,
  ):
    for color, (label, rows) in enumerate(groups.items()):
      column = lambda name: [getattr(row, name) for row in rows]  # noqa: B023
      axes.errorbar(
        *(column("unigram_entropy"), column(metric)),
        xerr=column("unigram_entropy_stderr"),
        yerr=column(f"{metric}_stderr"),
        fmt="k*" if label == _TEXT else f"C{color}o-",
        label=label,
      )
    axes.set_xlabel("unigram entropy of a text, nats (higher: more diverse)")
    axes.set_ylabel(name)
  axes.legend(fontsize="small")
  file = io.BytesIO()
  figure.savefig(file, format="png")
  return file.getvalue()


def possible(
  model: sample.Model, settings: Mapping[str, Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
  """Returns the settings that the model can be sampled with; prints the rest.

  Raises:
    UserError: there are none.
  """
  possible, refused = {}, {}
  for name, changed in settings.items():
    try:
      model.method.check(model.settings(**changed))
      possible[name] = changed
    except UserError as error:
      refused[name] = error
  if not possible:
    raise next(iter(refused.values()))
  if refused:
    name, why = next(iter(refused.items()))
    console.print(
      f"left out: {len(refused)} of {len(settings)} settings, such as"
      f" {name!r}: {why}",
      soft_wrap=True,
    )
  return possible


def _measured(
  name: str,
  num_steps: int,
  calls: float,
  judge: Judge,
  texts: list[str],
  documents: Clusters = None,
) -> Sampled:
  nll = nll_per_byte(judge, texts, documents)
  found = measure(texts, documents=documents)
  metrics = nll, found["unigram_entropy"], found["seq_rep_2"]
  numbers = (x for metric in metrics for x in (metric.value, metric.stderr))
  return Sampled(name, num_steps, calls, *numbers, len(texts))
