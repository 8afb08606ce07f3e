"""What an objective measures of held-out text: numbers that know their titles.

results.json holds every number under its own name, as `nelbo_per_token`, and
under `measured` what each of them is called. So tables, targets, the report and
the choice of the best checkpoint work for any objective: they draw titles and
ask for roles, and know no name of a number.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from jaxtyping import Array, Float, Int, Key, Shaped

from mdm_jax.core import strict_json
from mdm_jax.core.errors import UserError

# Roles: what a number means, for those who need one of a meaning.
NATS = "nats per token"
PERPLEXITY = "perplexity per token"
BITS = "bits per byte"
SCORE = "nats that are no likelihood"
LOSS_BY_MASKED_SHARE = "loss by masked share"

Number = int | float
# Parts of an axis, each (low, high, name of the stage).
Bands = tuple[tuple[Number, Number, str], ...]

_KEY = "measured"  # of results.json


@dataclasses.dataclass(frozen=True)
class Value:
  """A number of held-out text.

  Attributes:
    value: nan where it is not defined.
    title: what it is called, for a reader.
    unit: of the value, in words; "" where the title says it.
    error: its standard error, nan where there is none.
    role: what it means, one of the roles above, or any other word.
    bound: whether the true number may be lower.
    lower_is_better: whether the best checkpoint has the least of it.
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
    """Title and unit."""
    return f"{self.title}, {self.unit}" if self.unit else self.title


@dataclasses.dataclass(frozen=True)
class Curve:
  """A number of held-out text as a function of another one.

  Attributes:
    x: rising.
    y: the number at each of them; nan where it is not defined.
    title: what it is called, for a reader.
    unit: of y, in words.
    role: what it means, as of a `Value`.
    x_title: what x is.
    point: what one of its points is called; x takes the place of {}.
    form: how x is written, as `format` takes it.
    note: what a reader should know of it, in a sentence or two.
    split: the text it was measured on.
    bands: which part of x each stage trains on.
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
    """Returns y by x, x being written in `form`."""
    return {f"{x:{self.form}}": y for x, y in zip(self.x, self.y, strict=True)}


@dataclasses.dataclass(frozen=True)
class Likelihood:
  """A negative log-likelihood of held-out text, or a bound on it.

  Attributes:
    name: of the numbers: NAME_per_token, NAME_stderr.
    title: the name for a reader.
    total_nats: of all the text.
    tokens: of the text.
    num_bytes: of the text in UTF-8; None if that is not known.
    stderr: standard error of the nats per token; nan where there is none.
    exact: whether it is the likelihood itself, and no bound.
  """

  name: str
  title: str
  total_nats: float
  tokens: int
  num_bytes: int | None
  stderr: float
  exact: bool

  def values(self) -> dict[str, Value]:
    """Returns it per token, as a perplexity and, if it can be, per byte."""
    bound = not self.exact
    per_token = self.total_nats / self.tokens
    kind = " bound" if bound else ""
    return {
      f"{self.name}_per_token": Value(
        per_token, self.title, "nats per token", self.stderr, NATS
      ),
      "ppl_bound" if bound else "ppl": Value(
        *(_exp(per_token), f"perplexity{kind}", "per token"),
        role=PERPLEXITY,
        bound=bound,
      ),
      **self._per_byte(),
    }

  def _per_byte(self) -> dict[str, Value]:
    if not self.num_bytes:
      return {}
    bits = self.total_nats / math.log(2) / self.num_bytes
    # To first order, bits have the relative error of the nats.
    share = self.stderr * self.tokens / (self.total_nats or math.nan)
    numbers = bits, "bits per byte", "", bits * share
    return {"bits_per_byte": Value(*numbers, BITS, bound=not self.exact)}


@dataclasses.dataclass(frozen=True)
class Measured:
  """What was measured of some held-out text.

  Attributes:
    values: numbers by name; a `/` in a name makes a dictionary of them in
      results.json.
    curves: curves by name.
    headline: name of the value that tells the best checkpoint.
    likelihood: where it is one; its numbers come before the other values.
  """

  values: Mapping[str, Value] = dataclasses.field(default_factory=dict)
  curves: Mapping[str, Curve] = dataclasses.field(default_factory=dict)
  headline: str = ""
  likelihood: Likelihood | None = None

  def all_values(self) -> dict[str, Value]:
    """Returns the values, those of the likelihood first."""
    first = self.likelihood.values() if self.likelihood else {}
    return first | dict(self.values)

  def with_role(self, role: str) -> dict[str, Value]:
    """Returns the values that have a role."""
    found = self.all_values().items()
    return {name: value for name, value in found if value.role == role}

  def curve_with_role(self, role: str, split: str = "test") -> Curve | None:
    """Returns the first curve that has a role, on a side of the text."""
    found = (
      curve
      for curve in self.curves.values()
      if (curve.role, curve.split) == (role, split)
    )
    return next(found, None)

  def joined(self, other: "Measured") -> "Measured":
    """Returns what both have; of a name that both have, the other's."""
    return Measured(
      {**self.values, **other.values},
      {**self.curves, **other.curves},
      other.headline or self.headline,
      other.likelihood or self.likelihood,
    )

  def scalars(self) -> dict[str, float]:
    """Returns every value by its name, and the likelihood's error."""
    numbers = {name: v.value for name, v in self.all_values().items()}
    if self.likelihood:
      numbers[f"{self.likelihood.name}_stderr"] = self.likelihood.stderr
    return numbers

  def head(self) -> Value:
    """Returns the value that tells the best checkpoint."""
    return self.all_values()[self.headline]


def _exp(nats: float) -> float:
  with np.errstate(over="ignore"):
    return float(np.exp(nats))


# MARK: how it is measured


# What a measurement is made for: the number that counts, numbers beside it, or
# numbers as functions of others. The last two are of fewer rows.
Part = Literal["likelihood", "values", "curves"]
# Of all draws on held-out text: every checkpoint of every run meets the same.
SEED = 0


@dataclasses.dataclass(frozen=True)
class Jobs:
  """What is to be asked of held-out rows, one row a job.

  Attributes:
    key: of all draws; a job's own follows from its row and its draw.
    rows: number of each job's row.
    draws: number of each job's draw.
    asked: positions that each job asks for, at most.
    given: whatever else the objective has to know of each job.
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
  """What the answers to some jobs cost.

  Attributes:
    by_row: in all, of each job.
    by_text: the part of it that is of each of the first S texts of the row.
  """

  by_row: Float[np.ndarray, "N"]
  by_text: Float[np.ndarray, "N S"]


# MARK: as JSON


def to_json(measured: Measured) -> dict[str, Any]:
  """Returns numbers and curves by their names, and what they are called."""
  plain: dict[str, Any] = {}
  for name, number in measured.scalars().items():
    *folders, last = name.split("/")
    inside = plain
    for folder in folders:
      inside = inside.setdefault(folder, {})
    inside[last] = number
  for name, curve in measured.curves.items():
    plain[name] = curve.points()
  told = lambda part, *numbers: {
    k: v for k, v in dataclasses.asdict(part).items() if k not in numbers
  }
  plain[_KEY] = {
    "headline": measured.headline,
    "values": {n: told(v, "value") for n, v in measured.all_values().items()},
    "curves": {n: told(c, "x", "y") for n, c in measured.curves.items()},
  }
  return plain


def from_json(results: Mapping[str, Any]) -> Measured:
  """Returns what `to_json` wrote; the likelihood is among the values.

  Raises:
    UserError: an older version wrote it.
  """
  told = results.get(_KEY)
  if told is None:
    raise UserError(
      "results.json is of an older version of this library, which did not say"
      " what its numbers are: measure the run again with --mode=eval"
    )
  values = {
    name: Value(
      **part
      | {
        "value": strict_json.number(_found(results, name.split("/"))),
        "error": strict_json.number(part["error"]),
      }
    )
    for name, part in told["values"].items()
  }
  curves = {
    name: _curve(results.get(name, {}), part)
    for name, part in told["curves"].items()
  }
  return Measured(values, curves, told["headline"])


def _found(numbers: Any, path: list[str]) -> float | None:
  for name in path:
    numbers = (numbers or {}).get(name)
  return numbers


def _curve(points: Mapping[str, float | None], told: dict[str, Any]) -> Curve:
  x = tuple(map(float, points))
  y = tuple(map(strict_json.number, points.values()))
  bands = tuple((low, high, name) for low, high, name in told["bands"])
  return Curve(x, y, **told | {"bands": bands})


def curve_in(
  results: Mapping[str, Any] | None, role: str, split: str
) -> Curve | None:
  """Returns a curve of results.json by its role, None where there is none."""
  if not results or _KEY not in results:
    return None
  return from_json(results).curve_with_role(role, split)


def evaluation(measured: Measured) -> dict[str, Any]:
  """Returns what evaluation.json holds: all numbers, and which one tells."""
  head = measured.head()
  told = {
    "name": measured.headline,
    "value": head.value,
    "lower_is_better": head.lower_is_better,
  }
  return measured.scalars() | {"headline": told}


# MARK: over updates


@dataclasses.dataclass(frozen=True)
class Chart:
  """How a number of the log is drawn over updates.

  Attributes:
    title: what it is called, for a reader.
    unit: in words.
    error: name of its standard error in the log, if it has one.
    low: where the axis begins (None: below the least).
  """

  title: str
  unit: str
  error: str = ""
  low: Number | None = None
