"""Checks a model's results against the numeric targets of the training guide.

Held-out text itself may miss the guide's numbers, so each result is compared to
the text's own value, too. Numbers that are not a likelihood of the model's
tokens, or are undefined for a script, are shown but not judged.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from mdm_jax.objectives.measured import BITS, PERPLEXITY, SCORE, Measured

_PERPLEXITY = 4.0
_REPETITION = 0.10
_GRADE = 8.0
# Most grades above the held-out text's. The guide has no upper limit, but
# run-on sentences reach grade 26.
_ABOVE_OWN = 3.0
_UNIQUE_STARTS = 0.7
_OF_OWN = 0.9  # fraction of the held-out text's unique starts that suffices


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
  """

  target: str
  measure: str
  value: float | None
  reference: float | None
  passed: bool | None
  meaning: str


@dataclasses.dataclass(frozen=True)
class _Own:
  """A metric of held-out text, with its standard error."""

  value: float | None
  stderr: float

  def most(self) -> float:
    """Returns the value plus two standard errors; -inf without a value."""
    return -math.inf if self.value is None else self.value + 2 * self.stderr


def check(measured: Measured, results: Mapping[str, Any]) -> list[Target]:
  """Returns all targets with an evaluation's results.

  Args:
    measured: the model's measurements on held-out text.
    results: contents of results.json; only its baselines and text metrics are
      read.
  """
  text = results.get("text_metrics")
  others = results.get("baselines", {})
  return _perplexity(measured, others) + (_samples(text) if text else [])


def _perplexity(
  measured: Measured, baselines: Mapping[str, Any]
) -> list[Target]:
  """Returns three numbers that are called perplexity; one is judged."""
  # The guide means perplexity per token. The bound per byte is below 4 even for
  # models worse than an n-gram model, so baselines stand beside it.
  others = [
    f"{2 ** found['bits_per_byte']:.2f} by {found['name']}"
    for found in baselines.values()
    if found["bits_per_byte"] is not None
  ]
  lines = []
  for name, found in measured.with_role(PERPLEXITY).items():
    kind = "a bound" if found.bound else "exact"
    passed = found.value < _PERPLEXITY
    lines.append((f"{name} per token", found.value, passed, kind))
    beside = f"not judged; {', '.join(others)}" if others else "not judged"
    for bits in measured.with_role(BITS).values():
      lines.append((f"{name} per byte", 2**bits.value, None, beside))
  for found in measured.with_role(SCORE).values():
    measure = f"exp of {found.title}"
    meaning = "not judged: no likelihood of the text"
    lines.append((measure, math.exp(found.value), None, meaning))
  return [
    Target("perplexity < 4.0", name, value, None, passed, meaning)
    for name, value, passed, meaning in lines
  ]


def _samples(text: Mapping[str, Any]) -> list[Target]:
  lines = [
    _compare(
      text,
      "repetition < 10 %",
      f"seq_rep_{n}",
      lambda x, own: x < _REPETITION or x <= own.most(),
      "or not above the text's own + 2 standard errors",
    )
    for n in (2, 3, 4)
  ]
  lines.append(
    _compare(
      text,
      "grade 8+",
      "grade",
      lambda x, own: _GRADE <= x and x <= own.value + _ABOVE_OWN,
      "and at most 3 above the text's own; says nothing of sense",
    )
  )
  lines.append(
    _compare(
      text,
      "unique starts > 0.7",
      "unique_starts@1",
      lambda x, own: (
        x > _UNIQUE_STARTS
        or (own.value is not None and x >= _OF_OWN * own.value)
      ),
      "or 0.9 of the text's own",
    )
  )
  return lines


def _compare(
  text: Mapping[str, Any],
  target: str,
  measure: str,
  will_do: Callable[[float, _Own], bool],
  meaning: str,
) -> Target:
  value = text["sampling"][measure]["value"]
  own = text["held_out"][measure]
  found = _Own(own["value"], own["stderr"] or 0.0)  # no error: one document
  if measure == "grade" and found.value is None:
    why = "not judged: the text has no grade, by its script or its sentences"
    return Target(target, measure, value, None, None, why)
  passed = value is not None and bool(will_do(value, found))
  return Target(target, measure, value, found.value, passed, meaning)
