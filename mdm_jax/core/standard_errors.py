"""Means and ratios over texts, with standard errors clustered by document.

Samples of a model are independent. Pieces of running text are not: pieces of
one document resemble each other, so a standard error over pieces comes out
several times too small. If documents are given, errors are over documents.
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
  """A number measured on some texts.

  Attributes:
    value: the number; nan if undefined.
    stderr: its standard error over texts or documents; nan if undefined, as for
      a single text.
    n: number of texts.
    reason: why the value is undefined for these texts, if it is.
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
  """Estimates sum(parts) / sum(sizes), such as nats per token.

  With the sums P and S of each of G clusters and the ratio R, the squared
  standard error is G / (G - 1) * sum((P - R S)^2) / sum(S)^2, to first order:
  that of a ratio estimate under cluster sampling (Cochran 1977, Sampling
  Techniques, 11.2).

  Args:
    parts: numerator of each text.
    sizes: denominator of each text.
    clusters: the document of each text (None: texts are independent).
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
  """Estimates the mean over texts; `ratio` with all sizes 1."""
  return ratio(values, [1] * len(values), clusters)


def jackknife(values: Float64[np.ndarray, "M"], n: int) -> Estimate:
  """Returns a jackknife estimate (Efron and Stein 1981).

  Args:
    values: the value on all texts, then with each cluster left out. If one of
      the latter is nan, so is the standard error.
    n: number of texts.
  """
  # The variance is (n - 1) / n times the sum of squared deviations.
  count = len(values) - 1
  stderr = np.sqrt((count - 1) * np.var(values[1:])) if count > 1 else math.nan
  return Estimate(float(values[0]), float(stderr), n)


def without_each(
  totals: Int64[np.ndarray, "K"], own: Int64[np.ndarray, "G K"]
) -> Int64[np.ndarray, "M K"]:
  """Returns the totals, then the totals with each cluster left out.

  Args:
    totals: sums over all clusters.
    own: each cluster's summands.
  """
  return totals - np.vstack([np.zeros_like(totals), own])


def pooled_ratio(
  part: int, own: Sequence[int], sizes: Sequence[int], n: int
) -> Estimate:
  """Estimates part / sum(sizes) by a jackknife over clusters.

  Args:
    part: the numerator over all clusters.
    own: what part loses if a cluster is left out.
    sizes: the denominator of each cluster.
    n: number of texts.
  """
  totals = np.array([part, sum(sizes)], np.int64)
  columns = np.array([own, sizes], np.int64).T
  parts, wholes = without_each(totals, columns).T
  nothing = np.full(len(parts), np.nan)
  values = np.divide(parts, wholes, out=nothing, where=wholes > 0)
  return jackknife(values, n)


def summed(
  columns: Num[np.ndarray, "N K"], clusters: Clusters
) -> Num[np.ndarray, "G K"]:
  """Returns the sum of each cluster's rows."""
  if clusters is None:
    return columns
  _, of = np.unique(np.asarray(clusters, np.int64), return_inverse=True)
  count = int(of.max(initial=-1)) + 1
  sums = np.zeros((count, columns.shape[1]), columns.dtype)
  # `sums[of] += columns` would add only one row of each cluster.
  np.add.at(sums, of, columns)
  return sums


def grouped(values: Sequence[Any], clusters: Clusters) -> list[list[Any]]:
  """Returns the values of each cluster."""
  found: dict[int, list[Any]] = {}
  own = range(len(values)) if clusters is None else clusters
  for value, cluster in zip(values, own, strict=True):
    found.setdefault(int(cluster), []).append(value)
  return list(found.values())
