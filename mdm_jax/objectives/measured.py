"""Evaluation results of an objective: metrics and curves with their titles.

results.json holds every metric under its name, such as `nelbo_per_token`, and
under "measured" its title, unit and role. So tables, targets, the report and
the choice of the best checkpoint work for any objective: they show titles and
look metrics up by role, never by name.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from jaxtyping import Array, Float, Int, Key, Shaped

from mdm_jax.core import strict_json
from mdm_jax.core.errors import UserError

# Roles: what a metric means, for code that needs e.g. "the perplexity".
NATS = "nats per token"
PERPLEXITY = "perplexity per token"
BITS = "bits per byte"
SCORE = "nats, not a likelihood"
LOSS_BY_MASKED_SHARE = "loss by masked share"

Number = int | float
# Ranges of a curve's x axis, each (low, high, name of the stage).
Bands = tuple[tuple[Number, Number, str], ...]

_KEY = "measured"  # of results.json


@dataclasses.dataclass(frozen=True)
class Value:
  """A metric on held-out text.

  Attributes:
    value: the number; nan if undefined.
    title: its name in tables and plots.
    unit: in words; "" if the title says it.
    error: standard error; nan if unknown.
    role: one of the roles above, or any other word.
    bound: True if the value is an upper bound.
    lower_is_better: True if the best checkpoint has the lowest value.
  """

  value: float
  title: str
  unit: str = ""
  error: float = math.nan
  role: str = ""
  bound: bool = False
  lower_is_better: bool = True

  @property
  def heading(self) -> str:
    """Title and unit, separated by a comma."""
    return f"{self.title}, {self.unit}" if self.unit else self.title


@dataclasses.dataclass(frozen=True)
class Curve:
  """A metric on held-out text as a function of another quantity.

  Attributes:
    x: in increasing order.
    y: the metric at each x; nan if undefined.
    title: its name in plots.
    unit: unit of y, in words.
    role: as in `Value`.
    x_title: title of the x axis.
    point: name of a single point in tables, with {} for x.
    form: format specification of x, such as ".2f".
    note: an explanation for readers, in a sentence or two.
    split: the text it was measured on.
    bands: the ranges of x that the stages train on.
  """

  x: tuple[float, ...]
  y: tuple[float, ...]
  title: str
  unit: str = ""
  role: str = ""
  x_title: str = "x"
  point: str = "{}"
  form: str = "g"
  note: str = ""
  split: Literal["validation", "test"] = "test"
  bands: Bands = ()

  def points(self) -> dict[str, float]:
    """Returns y by x, with x formatted as `form`."""
    return {f"{x:{self.form}}": y for x, y in zip(self.x, self.y, strict=True)}


def likelihood(
  name: str,
  title: str,
  total_nats: float,
  tokens: int,
  num_bytes: int | None,
  stderr: float,
  exact: bool,
) -> dict[str, Value]:
  """Returns a negative log-likelihood, or an upper bound on it, as metrics.

  Args:
    name: prefix of the first metric: NAME_per_token.
    title: its name in tables.
    total_nats: sum over the text.
    tokens: size of the text.
    num_bytes: size of the text in UTF-8; None if unknown.
    stderr: standard error of the nats per token; nan if unknown.
    exact: False if it is a bound.

  Returns:
    Nats per token, perplexity and, if the bytes are known, bits per byte.
  """
  bound, per_token = not exact, total_nats / tokens
  kind = " bound" if bound else ""
  found = {
    f"{name}_per_token": Value(
      per_token, title, "nats per token", stderr, NATS
    ),
    "ppl_bound" if bound else "ppl": Value(
      *(_exp(per_token), f"perplexity{kind}", "per token"),
      role=PERPLEXITY,
      bound=bound,
    ),
  }
  if num_bytes:
    bits = total_nats / math.log(2) / num_bytes
    # To first order, bits have the relative error of the nats.
    error = bits * (stderr * tokens / (total_nats or math.nan))
    numbers = bits, "bits per byte", "", error
    found["bits_per_byte"] = Value(*numbers, BITS, bound=bound)
  return found


@dataclasses.dataclass(frozen=True)
class Measured:
  """All metrics of an evaluation.

  Attributes:
    values: by name; a "/" in a name makes a nested dictionary in results.json.
    curves: by name.
    headline: name of the value that selects the best checkpoint.
  """

  values: Mapping[str, Value] = dataclasses.field(default_factory=dict)
  curves: Mapping[str, Curve] = dataclasses.field(default_factory=dict)
  headline: str = ""

  def with_role(self, role: str) -> dict[str, Value]:
    """Returns the values with a role, by name."""
    found = self.values.items()
    return {name: value for name, value in found if value.role == role}

  def curve_with_role(self, role: str, split: str = "test") -> Curve | None:
    """Returns the first curve with a role on a split, or None."""
    found = (
      curve
      for curve in self.curves.values()
      if (curve.role, curve.split) == (role, split)
    )
    return next(found, None)

  def joined(self, other: "Measured") -> "Measured":
    """Returns the union of both; `other` wins where names are the same."""
    return Measured(
      {**self.values, **other.values},
      {**self.curves, **other.curves},
      other.headline or self.headline,
    )

  def beside(self, name: str) -> "Measured":
    """Returns the same metrics under NAME/, without roles or a headline.

    So code that looks for e.g. "the perplexity" finds one only.
    """
    told = lambda x: dataclasses.replace(x, title=f"{name}: {x.title}", role="")
    return Measured(
      {f"{name}/{key}": told(value) for key, value in self.values.items()},
      {f"{name}/{key}": told(curve) for key, curve in self.curves.items()},
    )

  def scalars(self) -> dict[str, float]:
    """Returns all numbers by name, with NAME_stderr for each NAME_per_token."""
    errors = {
      f"{name.removesuffix('_per_token')}_stderr": value.error
      for name, value in self.values.items()
      if name.endswith("_per_token")
    }
    return {name: v.value for name, v in self.values.items()} | errors

  def head(self) -> Value:
    """Returns the value that selects the best checkpoint."""
    return self.values[self.headline]


def _exp(nats: float) -> float:
  # Above 709 nats this is inf, where `math.exp` would raise.
  with np.errstate(over="ignore"):
    return float(np.exp(nats))


# MARK: how it is measured


# The parts of an evaluation: the likelihood, further scalars, and curves. The
# last two are measured on fewer rows.
Part = Literal["likelihood", "values", "curves"]
# Seed of all draws on held-out text. It is not the run's: every checkpoint of
# every run must be measured on the same masks.
SEED = 0


@dataclasses.dataclass(frozen=True)
class Jobs:
  """Evaluation jobs: each scores one random draw of one held-out row.

  Attributes:
    key: the key that the jobs' keys are derived from, by row and draw.
    rows: index of each job's row.
    draws: index of each job's draw.
    asked: maximum number of tokens that each job predicts.
    given: other inputs of `Objective.pose`, one entry per job.
  """

  key: Key[Array, ""]
  rows: Int[np.ndarray, "N"]
  draws: Int[np.ndarray, "N"]
  asked: Int[np.ndarray, "N"]
  given: Mapping[str, Shaped[np.ndarray, "N ..."]] = dataclasses.field(
    default_factory=dict
  )

  def __len__(self) -> int:
    return len(self.rows)


@dataclasses.dataclass(frozen=True)
class Nats:
  """Costs of evaluation jobs, in nats.

  Attributes:
    by_row: total of each job.
    by_text: the share of each of the first S texts of the job's row.
  """

  by_row: Float[np.ndarray, "N"]
  by_text: Float[np.ndarray, "N S"]


# MARK: as JSON


def to_json(measured: Measured) -> dict[str, Any]:
  """Returns metrics and curves by name, and under "measured" their titles."""
  plain: dict[str, Any] = {}
  for name, number in measured.scalars().items():
    *folders, last = name.split("/")
    inside = plain
    for folder in folders:
      inside = inside.setdefault(folder, {})
    inside[last] = number
  for name, curve in measured.curves.items():
    plain[name] = curve.points()
  described = lambda part, *numbers: {
    k: v for k, v in dataclasses.asdict(part).items() if k not in numbers
  }
  plain[_KEY] = {
    "headline": measured.headline,
    "values": {n: described(v, "value") for n, v in measured.values.items()},
    "curves": {n: described(c, "x", "y") for n, c in measured.curves.items()},
  }
  return plain


def from_json(results: Mapping[str, Any]) -> Measured:
  """Reads the result of `to_json`, with the likelihood's numbers as values.

  Raises:
    UserError: an older version wrote it.
  """
  described = results.get(_KEY)
  if described is None:
    raise UserError(
      "results.json was written by an older version of mdm_jax, without the"
      " titles of its metrics: run --mode=eval again"
    )
  values = {
    name: Value(
      **part
      | {
        "value": strict_json.number(_found(results, name.split("/"))),
        "error": strict_json.number(part["error"]),
      }
    )
    for name, part in described["values"].items()
  }
  curves = {
    name: _curve(results.get(name, {}), part)
    for name, part in described["curves"].items()
  }
  return Measured(values, curves, described["headline"])


def _found(numbers: Any, path: list[str]) -> float | None:
  for name in path:
    numbers = (numbers or {}).get(name)
  return numbers


def _curve(
  points: Mapping[str, float | None], described: dict[str, Any]
) -> Curve:
  x = tuple(map(float, points))
  y = tuple(map(strict_json.number, points.values()))
  bands = tuple((low, high, name) for low, high, name in described["bands"])
  return Curve(x, y, **described | {"bands": bands})


def curve_in(
  results: Mapping[str, Any] | None, role: str, split: str
) -> Curve | None:
  """Returns the curve of results.json with a role on a split, or None."""
  if not results or _KEY not in results:
    return None
  return from_json(results).curve_with_role(role, split)


def evaluation(measured: Measured) -> dict[str, Any]:
  """Returns the content of evaluation.json: all metrics, and the headline."""
  head = measured.head()
  headline = {
    "name": measured.headline,
    "value": head.value,
    "lower_is_better": head.lower_is_better,
  }
  return measured.scalars() | {"headline": headline}


# MARK: over updates


@dataclasses.dataclass(frozen=True)
class Chart:
  """How the report plots a logged metric over updates.

  Attributes:
    title: title of the plot.
    unit: unit of the y axis, in words.
    error: name of the metric's standard error in the log, if there is one.
    low: start of the y axis (None: below the smallest value).
  """

  title: str
  unit: str
  error: str = ""
  low: Number | None = None
