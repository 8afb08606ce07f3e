"""What a tuning of the sampling settings tried, as data for the report."""

from collections.abc import Iterator, Mapping
from typing import Any

from mdm_jax.evaluation.pages import plots
from mdm_jax.evaluation.pages.page import number
from mdm_jax.sampling.config import SampleConfig
from mdm_jax.sampling.generate import effective

Json = dict[str, Any]

_ENTROPY = "unigram_entropy"
_CHARTS = {
  "judge_nll": ("Judge against entropy", "nats per byte"),
  "seq_rep_2": ("Repetition against entropy", "repeated 2-grams"),
}
# Metrics of a row of the rounds' tables, with their headings.
COLUMNS = {
  "judge_nll": "judge, nats per byte",
  _ENTROPY: "entropy, nats",
  "seq_rep_2": "repeated 2-grams",
  "distinct_2": "distinct 2-grams",
}


def charts(tuning: Json) -> Iterator[tuple[str, str, plots.Plot]]:
  """Yields title, unit and plot of what was tried, by entropy.

  Args:
    tuning: contents of sampling.json.
  """
  last = tuning["rounds"][-1]
  chosen, text = last["tried"][0], last["validation"]
  for metric, (title, unit) in _CHARTS.items():
    at = lambda found, name: plots.Point(
      *(found[_ENTROPY]["value"], found[metric]["value"]),  # noqa: B023
      *(0, name),
    )
    tried = [
      at(trial, in_words(trial["settings"]))
      for part in tuning["rounds"]
      for trial in part["tried"]
    ]
    marked = {
      "chosen": at(chosen, f"chosen: {in_words(chosen['settings'])}"),
      "own": at(text, "validation text"),
    }
    yield title, unit, plots.scatter(tried, marked)


def rows(part: Json) -> Iterator[tuple[str, list[str]]]:
  """Yields a name and cells for each settings of a round, the best first."""
  name = lambda trial: in_words(trial["settings"])
  lines = [(name(trial), trial) for trial in part["tried"]]
  for name, found in [*lines, ("validation text", part["validation"])]:
    beyond = found.get("beyond")
    violated = "" if beyond is None else number(beyond, ".1f")
    cells = (number(found[metric]["value"], ".3f") for metric in COLUMNS)
    yield name, [violated, *cells]


def in_words(settings: Mapping[str, Any]) -> str:
  """Returns the settings that take effect, except the denoiser calls."""
  used = effective(SampleConfig(**settings))
  plain = {"schedule": "linear"}
  return ", ".join(
    f"{name} {value}"
    for name, value in used.items()
    if name not in ("seed", "num_steps") and plain.get(name) != value
  )
