"""Samples from a run with several settings, and measures each set of texts."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mdm_jax import sample
from mdm_jax.config import Config
from mdm_jax.core import tables
from mdm_jax.core.progress import console, with_error
from mdm_jax.core.standard_errors import Clusters
from mdm_jax.data.prepared import training_texts
from mdm_jax.evaluation.judge import Judge, make_judge, nll_per_byte
from mdm_jax.evaluation.running_text import running_texts
from mdm_jax.evaluation.text_metrics import measure
from mdm_jax.measured_text import open_rows
from mdm_jax.workdir import Workdir

COLUMNS = "settings", "calls", "judge, nats/byte", "entropy, nats"


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
    n: number of texts.
  """

  settings: str
  num_steps: int
  calls: float
  judge_nll: float
  judge_nll_stderr: float
  unigram_entropy: float
  unigram_entropy_stderr: float
  n: int

  @property
  def cells(self) -> tuple[str, ...]:
    """The row of a table with `COLUMNS`."""
    return (
      self.settings,
      f"{self.calls:.1f}",
      with_error(self.judge_nll, self.judge_nll_stderr),
      with_error(self.unigram_entropy, self.unigram_entropy_stderr),
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
    UserError: there is no checkpoint, or the run had other data.
  """
  data, config = open_rows(config, workdir)
  judge = make_judge(config.eval.judge, training_texts(config.rows))
  model = sample.load(workdir, config=config)
  count = max(config.eval.samples, config.sample.num_samples)
  found = []
  for name, changed in settings.items():
    drawn = model.generate("", **{**changed, "num_samples": count})
    steps = changed.get("num_steps", config.sample.num_steps)
    calls = float(drawn.calls.mean())
    found.append(_measured(name, steps, calls, judge, drawn.texts))
    console.print(f"{len(found)}: {name}", soft_wrap=True)
  own = running_texts(
    data.validation, data.tokenizer, count, config.sample_length
  )
  name = "validation text"
  found.append(_measured(name, 0, 0.0, judge, own.texts, own.documents))
  title = f"{count} texts each, judged by {judge.name}"
  cells = [row.cells for row in found]
  console.print(tables.for_terminal(COLUMNS, cells, title))
  return found, title


def as_csv(found: list[Sampled]) -> str:
  """Returns a CSV table with a column per field of `Sampled`."""
  names = [field.name for field in dataclasses.fields(Sampled)]
  return tables.as_csv(names, map(dataclasses.astuple, found))


def _measured(
  name: str,
  num_steps: int,
  calls: float,
  judge: Judge,
  texts: list[str],
  documents: Clusters = None,
) -> Sampled:
  nll = nll_per_byte(judge, texts, documents)
  entropy = measure(texts, documents=documents)["unigram_entropy"]
  numbers = nll.value, nll.stderr, entropy.value, entropy.stderr
  return Sampled(name, num_steps, calls, *numbers, len(texts))
