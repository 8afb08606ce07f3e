"""The targets of the training guide, each with how it is measured here.

A target passes by its own number or, where the text itself may not reach that
number, by being near what held-out text cut to the same length has.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

_PERPLEXITY = 4.0
_REPETITION = 0.10
_GRADE = 8.0
_UNIQUE_STARTS = 0.7


@dataclasses.dataclass(frozen=True)
class Target:
  """One line of the table.

  Attributes:
    target: what the guide asks for.
    measure: what is measured.
    value: of the model or its samples; None where it can't be measured.
    reference: the same of held-out text; None where it has none.
    passed: whether the value will do.
    meaning: when it will, or what the number is.
  """

  target: str
  measure: str
  value: float | None
  reference: float | None
  passed: bool
  meaning: str


def check(results: Mapping[str, Any]) -> list[Target]:
  """Returns the table for an evaluation's results."""
  text = results.get("text_metrics")
  return _perplexity(results) + (_samples(text) if text else [])


def _perplexity(results: Mapping[str, Any]) -> list[Target]:
  """Three numbers go by this name; only the first bounds a likelihood."""
  per_byte = 2 ** results["bits_per_byte"]
  lines = [
    ("ppl_bound per token", results["ppl_bound"], "a bound; depends on tokens"),
    ("ppl_bound per byte", per_byte, "a bound; comparable across tokenizers"),
  ]
  for where, loss in results["stage_ce"].items():
    meaning = "a denoising score at the last stage's rates, no likelihood"
    lines.append((f"masked_ppl@[{where}]", math.exp(loss), meaning))
  return [
    Target(
      "perplexity < 4.0", name, value, None, bool(value < _PERPLEXITY), meaning
    )
    for name, value, meaning in lines
  ]


def _samples(text: Mapping[str, Any]) -> list[Target]:
  lines = [
    _compare(
      text,
      "repetition < 10 %",
      f"seq_rep_{n}",
      lambda x, own: x < _REPETITION and x <= 2 * own,
      "and at most twice the text's own",
    )
    for n in (2, 3, 4)
  ]
  lines.append(
    _compare(
      text,
      "grade 8+",
      "grade",
      lambda x, own: x >= _GRADE or (own is not None and abs(x - own) <= 1),
      "or within 1 of the text's own; says nothing of sense",
    )
  )
  lines.append(
    _compare(
      text,
      "unique starts > 0.7",
      "unique_starts@1",
      lambda x, own: x > _UNIQUE_STARTS or x >= 0.9 * own,
      "or 0.9 of the text's own",
    )
  )
  return lines


def _compare(
  text: Mapping[str, Any],
  target: str,
  measure: str,
  will_do: Callable[[float, float | None], bool],
  meaning: str,
) -> Target:
  value = text["sampling"][measure]["value"]
  own = text["held_out"][measure]["value"]
  passed = value is not None and bool(will_do(value, own))
  return Target(target, measure, value, own, passed, meaning)
