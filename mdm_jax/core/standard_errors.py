"""Numbers from some texts, with standard errors that know what is independent.

Samples are independent draws. Pieces of running text are not: those of one
document resemble each other, so that errors over pieces come out several times
too small. Where the documents are given, a document is what is drawn.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64, Num

Clusters = Sequence[int] | Int64[np.ndarray, "N"] | None
Values = Sequence[int | float] | Num[np.ndarray, "N"]


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A number from some texts.

  Attributes:
    value: nan where it is not defined.
    stderr: its standard error, over texts or their documents; nan where there
      is none, as of a single one.
    n: texts.
    reason: why these texts can't have it, if they can't.
  """

  value: float
  stderr: float
  n: int
  reason: str | None = None


def ratio(
  parts: Values,
  sizes: Values,
  clusters: Clusters = None,
) -> Estimate:
  """Measures sum(parts) / sum(sizes).

  With P and S the sums over one of G clusters and R the ratio, the squared
  standard error is G / (G - 1) * sum((P - R S)^2) / sum(S)^2, to first order:
  that of a ratio estimate where clusters are drawn (Cochran 1977, Sampling
  Techniques, 11.2).

  Args:
    parts: of each text.
    sizes: of each text.
    clusters: what each text belongs to (None: each is its own).
  """
  columns = np.array([parts, sizes], np.float64).T
  part, size = columns.sum(axis=0)
  if not size:
    return Estimate(math.nan, math.nan, len(columns))
  sums, value = summed(columns, clusters), part / size
  stderr, count = math.nan, len(sums)
  if count > 1:
    residual = sums[:, 0] - value * sums[:, 1]
    stderr = math.sqrt(count / (count - 1) * np.square(residual).sum()) / size
  return Estimate(float(value), float(stderr), len(columns))


def mean(values: Values, clusters: Clusters = None) -> Estimate:
  """Measures the mean over texts, as `ratio` does with sizes of one."""
  return ratio(values, [1] * len(values), clusters)


def jackknife(values: Float64[np.ndarray, "M"], n: int) -> Estimate:
  """Measures a pool from its value and those without each cluster in turn.

  Where one of those is not defined, nor is the standard error (Efron and Stein
  1981).

  Args:
    values: of the pool, then without each cluster.
    n: texts.
  """
  count = len(values) - 1
  stderr = np.sqrt((count - 1) * np.var(values[1:])) if count > 1 else math.nan
  return Estimate(float(values[0]), float(stderr), n)


def without_each(
  totals: Int64[np.ndarray, "K"], own: Int64[np.ndarray, "G K"]
) -> Int64[np.ndarray, "M K"]:
  """Returns the totals, then what they are without each cluster in turn."""
  return totals - np.vstack([np.zeros_like(totals), own])


def pooled_ratio(
  part: int, own: Sequence[int], sizes: Sequence[int], n: int
) -> Estimate:
  """Measures part / sum(sizes); each cluster has its own part and a size."""
  totals = np.array([part, sum(sizes)], np.int64)
  columns = np.array([own, sizes], np.int64).T
  parts, wholes = without_each(totals, columns).T
  nothing = np.full(len(parts), np.nan)
  values = np.divide(parts, wholes, out=nothing, where=wholes > 0)
  return jackknife(values, n)


def summed(
  columns: Num[np.ndarray, "N K"], clusters: Clusters
) -> Num[np.ndarray, "G K"]:
  """Returns the sums of each cluster's lines."""
  if clusters is None:
    return columns
  _, of = np.unique(np.asarray(clusters, np.int64), return_inverse=True)
  count = int(of.max(initial=-1)) + 1
  sums = np.zeros((count, columns.shape[1]), columns.dtype)
  np.add.at(sums, of, columns)
  return sums


def grouped(values: Sequence[Any], clusters: Clusters) -> list[list[Any]]:
  """Returns the values of each cluster."""
  found: dict[int, list[Any]] = {}
  own = range(len(values)) if clusters is None else clusters
  for value, cluster in zip(values, own, strict=True):
    found.setdefault(int(cluster), []).append(value)
  return list(found.values())
