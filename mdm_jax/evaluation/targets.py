"""Checks a model's results against the numeric targets of the training guide.

Held-out text itself may miss the guide's numbers, so each result is compared to
the text's own value, too. Numbers that are not a likelihood of the model's
tokens, or are undefined for a script, are shown but not judged.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from mdm_jax.objectives.measured import BITS, PERPLEXITY, SCORE, Measured

_PERPLEXITY = 4.0


def _repeats_little(x: float, own: float | None, error: float) -> bool:
  return x < 0.10 or (own is not None and x <= own + 2 * error)


def _is_grown_up(x: float, own: float, error: float) -> bool:
  # The guide has no upper limit, but run-on sentences reach grade 26.
  return 8.0 <= x <= own + 3.0


def _starts_differ(x: float, own: float | None, error: float) -> bool:
  return x > 0.7 or (own is not None and x >= 0.9 * own)


_OWN = "or not above the text's own + 2 standard errors"
# The guide's target; the text metric; whether it is met, by the metric's value,
# its value for held-out text and the standard error of that; and what the
# criterion is beyond the target.
_CRITERIA = (
  *(
    ("repetition < 10 %", f"seq_rep_{n}", _repeats_little, _OWN)
    for n in (2, 3, 4)
  ),
  (
    "grade 8+",
    "grade",
    _is_grown_up,
    "and at most 3 above the text's own; says nothing about sense",
  ),
  (
    "unique starts > 0.7",
    "unique_starts@1",
    _starts_differ,
    "or at least 0.9 of the text's own",
  ),
)


@dataclasses.dataclass(frozen=True)
class Target:
  """A target and how it was met: one line of the table.

  Attributes:
    target: the guide's target.
    measure: name of the number that is measured.
    value: of the model or its samples; None if undefined.
    reference: the same number of held-out text; None if undefined.
    passed: whether the target is met; None if it is not judged.
    meaning: the criterion, why it is not judged, or what the number is.
    texts: which samples were measured, as in `text_metrics` of results.json:
      "sampling" or "tuned"; "" for numbers that are not of samples.
  """

  target: str
  measure: str
  value: float | None
  reference: float | None
  passed: bool | None
  meaning: str
  texts: str = ""


def check(measured: Measured, results: Mapping[str, Any]) -> list[Target]:
  """Returns all targets with an evaluation's results.

  Args:
    measured: the model's measurements on held-out text.
    results: contents of results.json; only its baselines and text metrics are
      read.
  """
  text = results.get("text_metrics")
  others = results.get("baselines", {})
  lines = _perplexity(measured, others)
  if text:
    lines += _samples(text, "sampling")
    lines += _samples(text, "tuned") if "tuned" in text else []
  return lines


def _perplexity(
  measured: Measured, baselines: Mapping[str, Any]
) -> list[Target]:
  """Returns three numbers that are called perplexity; one is judged."""
  lines = []
  add = lambda measure, value, passed, meaning: lines.append(
    Target("perplexity < 4.0", measure, value, None, passed, meaning)
  )
  # The guide means perplexity per token. The bound per byte is below 4 even for
  # models worse than an n-gram model, so baselines stand beside it.
  others = [
    f"{2 ** found['bits_per_byte']:.2f} by {found['name']}"
    for found in baselines.values()
    if found["bits_per_byte"] is not None
  ]
  for name, found in measured.with_role(PERPLEXITY).items():
    kind = "a bound" if found.bound else "exact"
    add(f"{name} per token", found.value, found.value < _PERPLEXITY, kind)
    beside = f"not judged; {', '.join(others)}" if others else "not judged"
    for bits in measured.with_role(BITS).values():
      add(f"{name} per byte", 2**bits.value, None, beside)
  for found in measured.with_role(SCORE).values():
    meaning = "not judged: not a likelihood of the text"
    add(f"exp of {found.title}", math.exp(found.value), None, meaning)
  return lines


def _samples(text: Mapping[str, Any], texts: str) -> list[Target]:
  lines = []
  for target, measure, is_met, meaning in _CRITERIA:
    value = text[texts][measure]["value"]
    own = text["held_out"][measure]["value"]
    error = text["held_out"][measure]["stderr"] or 0.0  # None: one document
    passed = None
    if measure == "grade" and own is None:
      meaning = "not judged: the test text has no grade (script or sentences)"
    else:
      passed = value is not None and bool(is_met(value, own, error))
    line = Target(target, measure, value, own, passed, meaning, texts)
    lines.append(line)
  return lines
