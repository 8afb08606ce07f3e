"""Ways to draw texts from one checkpoint: what each is like, and costs.

All use the run's temperature and filters, so that the ways differ in where and
how many tokens a step reveals, and in nothing else. Neither number of a row
means much without the other, nor without the calls it took: a way is better if
the judge likes its texts more at the same entropy and the same calls.
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
_IN_FULL = "random", "spread", "confidence"  # also one token a step
_STEPS = 12, 24, 48


@dataclasses.dataclass(frozen=True)
class Way:
  """One way to draw texts, and what they are like.

  Attributes:
    way: the settings.
    num_steps: denoiser calls that were allowed.
    calls: the mean number of them that a text took.
    judge_nll: nats a byte, with its standard error.
    unigram_entropy: nats, with its standard error.
    n: texts.
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
  """Returns the settings that are compared, by name."""
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
  """Draws from a run's best checkpoint in many ways; writes ways.csv and .md.

  Args:
    config: the run's, or with another temperature or other filters.
    workdir: the run's folder.
    only: compares the ways whose name holds it.

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
  # First: it may be that nothing can be stored.
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
