"""Compares ways to sample from one checkpoint: orders, steps and budgets.

All use the run's temperature and filters, so the ways differ only in which
positions a step reveals, and how many. The judge's number, the entropy and the
denoiser calls belong together: one way is better than another if the judge
finds its texts more likely at the same entropy and the same number of calls.
"""

import dataclasses
from typing import Any

from mdm_jax import sample
from mdm_jax.config import Config
from mdm_jax.core import tables
from mdm_jax.core.errors import UserError, nearest
from mdm_jax.core.progress import console, with_error
from mdm_jax.core.standard_errors import Clusters
from mdm_jax.data.prepared import training_texts
from mdm_jax.evaluation.judge import Judge, make_judge, nll_per_byte
from mdm_jax.evaluation.running_text import running_texts
from mdm_jax.evaluation.text_metrics import measure
from mdm_jax.measured_text import open_rows
from mdm_jax.workdir import Workdir

_ORDERS = (
  *("random", "spread", "left_to_right"),
  *("confidence", "margin", "entropy"),
)
_IN_FULL = "random", "spread", "confidence"  # also with one token per step
_STEPS = 12, 24, 48


@dataclasses.dataclass(frozen=True)
class Way:
  """One way to sample, and what its texts are like.

  Attributes:
    way: name of the settings.
    num_steps: denoiser calls allowed.
    calls: denoiser calls made, mean over the texts.
    judge_nll: the judge's nats per byte.
    judge_nll_stderr: its standard error.
    unigram_entropy: entropy of a text's own tokens, in nats.
    unigram_entropy_stderr: its standard error.
    n: number of texts.
  """

  way: str
  num_steps: int
  calls: float
  judge_nll: float
  judge_nll_stderr: float
  unigram_entropy: float
  unigram_entropy_stderr: float
  n: int


def ways(length: int) -> dict[str, dict[str, Any]]:
  """Returns the settings to compare, by name.

  Args:
    length: tokens per text; as many steps reveal one token each.
  """
  result = {
    f"{order}, {n} steps": {"order": order, "num_steps": n}
    for order in _ORDERS
    for n in (*_STEPS, length)
    if n < length or order in _IN_FULL
  }
  for schedule in ("cosine", "optimal"):
    for order in ("random", "spread"):
      name = f"{order}, {schedule}, 24 steps"
      result[name] = {"order": order, "schedule": schedule, "num_steps": 24}
  for block in (16, 32):
    name = f"confidence, blocks of {block}, 24 steps"
    fields = {"order": "confidence", "block_length": block}
    result[name] = {**fields, "num_steps": 24}
  # With a budget, num_steps is only the upper limit.
  for order, bound in (("entropy", 1), ("entropy", 20), ("spread", 20)):
    name = f"{order}, entropy bound {bound}"
    fields = {"order": order, "entropy_bound": bound}
    result[name] = {**fields, "num_steps": length}
  for threshold in (0.5, 0.2):
    name = f"confidence, threshold {threshold}"
    fields = {"order": "confidence", "threshold": threshold}
    result[name] = {**fields, "num_steps": length}
  for order, n in (("random", 24), ("spread", 24), ("random", 48)):
    for remasking in ("cap", "conf", "loop"):
      name = f"{order}, {remasking} 0.1, {n} steps"
      fields = {"order": order, "remasking": remasking, "remasking_rate": 0.1}
      result[name] = {**fields, "num_steps": n}
  return result


def compare_workdir(
  config: Config, workdir: Workdir, only: str = ""
) -> list[dict[str, Any]]:
  """Samples from a run's best checkpoint in many ways; writes ways.csv and .md.

  Args:
    config: the run's config, perhaps with other temperature or filters.
    workdir: the run's folder.
    only: compare only the ways whose names contain this.

  Returns:
    The table's rows as plain values; the last one is validation text.

  Raises:
    UserError: no way has such a name, or there is no checkpoint.
  """
  known = ways(config.sample_length)
  chosen = {name: fields for name, fields in known.items() if only in name}
  if not chosen:
    raise UserError(f"--ways={only}: {nearest(only, known)}")
  data, config = open_rows(config, workdir)
  judge = make_judge(config.eval.judge, training_texts(config.rows))
  model = sample.load_with(config, workdir)
  count = max(config.eval.samples, config.sample.num_samples)
  rows = []
  for name, settings in chosen.items():
    rows.append(_draw(model, judge, name, settings, count))
    console.print(f"{len(rows)}: {name}", soft_wrap=True)
  own = running_texts(
    data.validation, data.tokenizer, count, config.sample_length
  )
  name = "validation text"
  rows.append(_way(name, 0, 0.0, judge, own.texts, own.documents))
  # Printed before it is written, since writing may fail.
  title = f"{rows[0].n} texts each, judged by {judge.name}"
  cells = list(map(_cells, rows))
  console.print(tables.for_terminal(_COLUMNS, cells, title))
  table = tables.as_markdown(_COLUMNS, cells)
  workdir.write_ways(_as_csv(rows), table)
  return [dataclasses.asdict(row) for row in rows]


def _draw(
  model: sample.Model,
  judge: Judge,
  name: str,
  settings: dict[str, Any],
  count: int,
) -> Way:
  # The run's own settings of these must not leak into the comparison.
  base = {"order": "random", "schedule": "linear", "remasking": "none"}
  base |= dict.fromkeys(("block_length", "entropy_bound", "threshold"))
  drawn = model.generate("", count, **{**base, **settings})
  calls = float(drawn.calls.mean())
  return _way(name, settings["num_steps"], calls, judge, drawn.texts)


def _way(
  name: str,
  num_steps: int,
  calls: float,
  judge: Judge,
  texts: list[str],
  documents: Clusters = None,
) -> Way:
  nll = nll_per_byte(judge, texts, documents)
  entropy = measure(texts, documents=documents)["unigram_entropy"]
  return Way(
    name,
    num_steps,
    calls,
    nll.value,
    nll.stderr,
    entropy.value,
    entropy.stderr,
    len(texts),
  )


def _as_csv(rows: list[Way]) -> str:
  names = [field.name for field in dataclasses.fields(Way)]
  return tables.as_csv(names, map(dataclasses.astuple, rows))


def _cells(row: Way) -> tuple[str, ...]:
  return (
    row.way,
    f"{row.calls:.1f}",
    with_error(row.judge_nll, row.judge_nll_stderr),
    with_error(row.unigram_entropy, row.unigram_entropy_stderr),
  )


_COLUMNS = "way to draw", "calls", "nats a byte", "entropy, nats"
