"""Training metrics: averaged, logged, and shown on the progress line.

One log entry ("point") averages `train.log_every` updates. The metrics of the
updates since the last point are saved with every checkpoint, so after a resume
the next point averages the same updates as in an uninterrupted run.
"""

import contextlib
import math
import resource
import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

from mdm_jax.core.progress import ProgressLine
from mdm_jax.model import flops
from mdm_jax.objectives.base import Objective, Ratio
from mdm_jax.runtime import goodput
from mdm_jax.runtime.attempt import Attempt
from mdm_jax.runtime.goodput import Cause
from mdm_jax.training.curriculum import StagePlan
from mdm_jax.training.hooks import Hook
from mdm_jax.training.state import TrainState
from mdm_jax.training.trainer import Trainer
from mdm_jax.training.writers import Writers

_COUNTED = "nonfinite", "skipped"
_GIB = 2**30


class RunLog(Hook):
  """Collects the metrics of updates and writes their means.

  It reads the metrics of an update only when the next one has been dispatched,
  so that the device never waits for the log.

  Attributes:
    writers: where points are written.
    line: the progress line.
    failed: the most recent consecutive updates that were not applied, oldest
      first; counted from 1.
  """

  def __init__(
    self,
    trainer: Trainer,
    writers: Writers,
    line: ProgressLine,
    attempt: Attempt,
    progress: Mapping[str, Any] | None = None,
    every: int = 1,
  ):
    """Initializes the log, from a checkpoint's progress if there is one.

    Args:
      trainer: the run's trainer.
      writers: where to write points.
      line: the progress line.
      attempt: the running attempt, for goodput and health metrics.
      progress: what `progress` returned when the checkpoint was saved.
      every: updates between two points.
    """
    progress, self._every = progress or {}, every
    self._trainer, self._attempt = trainer, attempt
    self.writers, self.line = writers, line
    self.failed: list[int] = []
    self._tokens = progress.get("tokens_seen", 0.0)
    self._seconds_before = progress.get("wall_seconds", 0.0)
    self._totals = {name: progress.get(f"{name}_total", 0) for name in _COUNTED}
    self._window = [_from_plain(v) for v in progress.get("window", [])]
    self._pending: tuple[int, dict[str, jax.Array]] | None = None
    self._stage: StagePlan | None = None
    self._objective: Objective | None = None
    self._started = self._since = self._last = time.monotonic()
    self._durations: list[float] = []
    self._data_before = self._data_seconds()

  @property
  def seconds(self) -> float:
    """Seconds of the run, over all attempts."""
    return self._seconds_before + time.monotonic() - self._started

  def on_stage(self, stage: StagePlan, update: int) -> None:
    """Starts a stage; no point averages updates of two stages."""
    self.flush()
    # After a resume within the stage, keep the window from the checkpoint.
    if update == stage.start:
      self._window = []
    self._stage = stage
    self._objective = self._trainer.objective(stage)
    self._restart()

  def on_metrics(self, done: int, metrics: dict[str, jax.Array]) -> None:
    """Stores the metrics of the update just dispatched; reads the last ones."""
    self.flush()
    self._pending = done, metrics

  def on_save(self, done: int, state: TrainState, kept: dict[str, Any]) -> None:
    """Flushes the log, and saves what the next point needs."""
    self.flush()
    self.writers.flush()
    kept |= self.progress()

  def on_end(self, state: TrainState) -> None:
    self.flush()

  @contextlib.contextmanager
  def during(self, cause: Cause, update: int) -> Iterator[None]:
    """Excludes the time of evaluations from throughput."""
    began = time.monotonic()
    yield
    if cause == Cause.EVAL:
      self._since += time.monotonic() - began
      self._last = time.monotonic()

  def flush(self) -> None:
    """Reads the metrics still on the device; writes a point if one is due."""
    if self._pending is None:
      return
    update, metrics = self._pending
    self._pending = None
    values = {k: _fetched(v) for k, v in jax.device_get(metrics).items()}
    now = time.monotonic()
    self._durations.append(now - self._last)
    self._last = now
    self._tokens += values["tokens"]
    self._count(update, values)
    self._window.append(values)
    if update % self._every == 0:
      self._write_point(update)

  def progress(self) -> dict[str, Any]:
    """Returns the log's state, to save with a checkpoint."""
    return {
      "tokens_seen": self._tokens,
      "wall_seconds": self.seconds,
      **{f"{name}_total": self._totals[name] for name in _COUNTED},
      "window": [_to_plain(values) for values in self._window],
    }

  def _count(self, update: int, values: dict[str, Any]) -> None:
    for name in _COUNTED:
      self._totals[name] += int(values.get(name, 0))
    if not values["skipped"]:
      self.failed = []
      return
    self.failed.append(update)
    # Rows and masks are a function of the update's index, which is enough to
    # repeat it. Minus 1: `update` counts from 1 here.
    rows = ", ".join(map(str, self._trainer.row_numbers(update - 1)))
    if values.get("nonfinite", 1):
      why = f"not finite ({self._named_bad(values)})"
    else:
      why = f"a spike (gradient norm {values['grad_norm']:.3g})"
    logging.warning(
      "update %d: %s, not applied; rows %s of stage %s",
      *(update, why, rows, self._stage.config.name if self._stage else "?"),
    )

  def _named_bad(self, values: dict[str, Any]) -> str:
    """Returns the names of the objective's summaries that are not finite."""
    tags = self._objective.tags if self._objective else {}
    bad = []
    for name, value in values.items():
      if isinstance(value, Ratio):
        (where,) = np.nonzero(~np.isfinite(np.atleast_1d(value.total)))
        bad += [tags[name][i] if name in tags else name for i in where]
    return ", ".join(bad) or "only the gradient"

  def _write_point(self, update: int) -> None:
    """Writes the means since the last point, and updates the progress line."""
    seconds = max(time.monotonic() - self._since, 1e-9)
    # Speed is that of this process's updates only; after a resume the window
    # also has metrics of updates before it.
    made = max(len(self._durations), 1)
    means = _means(self._window)
    tokens = means.pop("tokens") * made
    scalars = {
      **{f"train/{name}": value for name, value in means.items()},
      **_ratios(self._window, self._objective.tags),
      "train/tokens_per_second": tokens / seconds,
      "train/tokens_seen": self._tokens,
      "train/stage": self._stage.index + 1,
      "train/update_seconds": seconds / made,
      **self._speed(seconds, made),
      **_memory(),
      **self._health(),
    }
    self.writers.write_scalars(update, scalars)
    left = _seconds_left(self._trainer, self._stage, update, seconds / made)
    loss = means.get("loss", math.nan)
    self.line.update(
      self._stage.config.name, update, loss, tokens / seconds, *left
    )
    self._window = []
    self._restart()

  def _restart(self) -> None:
    self._since = self._last = time.monotonic()
    self._durations, self._data_before = [], self._data_seconds()

  def _data_seconds(self) -> float:
    return self._attempt.ledger.seconds()[Cause.DATA]

  def _speed(self, seconds: float, made: int) -> dict[str, float]:
    speed = self._trainer.update_flops(self._stage) * made / seconds
    peak = flops.peak_flops(jax.devices()[0].device_kind)
    mfu = {"perf/mfu": speed / (peak * jax.device_count())} if peak else {}
    waited = self._data_seconds() - self._data_before
    return {
      "perf/flops_per_second": speed,
      "perf/update_seconds_p50": statistics.median(self._durations or [0.0]),
      "perf/update_seconds_max": max(self._durations or [0.0]),
      "perf/data_wait": waited / seconds,
    } | mfu

  def _health(self) -> dict[str, float]:
    seconds = self._attempt.seconds()
    return {
      **{f"goodput/{k}_seconds": v for k, v in seconds.items()},
      "goodput/fraction": goodput.goodput(seconds),
      **{f"health/{k}_total": v for k, v in self._totals.items()},
      "health/attempts": self._attempt.number,
      "health/committed": self._attempt.committed,
    }


def _fetched(value: Any) -> float | Ratio:
  """Returns a fetched metric as a float; a ratio stays in float32.

  Sums of ratios must be the same to the bit whether or not a resume lies
  between the updates, and a checkpoint restores them in float32.
  """
  return Ratio(*value) if isinstance(value, Ratio) else float(value)


def _means(window: list[dict[str, Any]]) -> dict[str, float]:
  """Returns the means of the scalar metrics, over their finite values."""
  # A bad update is counted by `nonfinite`; it must not spoil the others' means.
  means = {}
  for name, value in window[0].items():
    if not isinstance(value, Ratio):
      found = [values[name] for values in window]
      found = [value for value in found if math.isfinite(value)]
      if found:
        means[name] = sum(found) / len(found)
  return means


def _ratios(
  window: list[dict[str, Any]], tags: Mapping[str, tuple[str, ...]]
) -> dict[str, float]:
  """Returns total / count of the ratios, without those whose count is 0."""
  scalars = {}
  for name, value in window[0].items():
    if isinstance(value, Ratio):
      total, count = map(np.atleast_1d, _summed([v[name] for v in window]))
      names = tags.get(name, (f"train/{name}",))
      for i in np.flatnonzero(count):
        scalars[names[i]] = float(total[i] / count[i])
  return scalars


def _summed(ratios: list[Ratio]) -> Ratio:
  """Returns the sum of some ratios, each entry over its finite values."""
  finite = [np.isfinite(r.total) & np.isfinite(r.count) for r in ratios]
  add = lambda parts: np.sum(
    [np.where(f, x, np.float32(0)) for f, x in zip(finite, parts, strict=True)],
    axis=0,
  )
  return Ratio(add([r.total for r in ratios]), add([r.count for r in ratios]))


def _memory() -> dict[str, float]:
  """Returns GiB in use on the fullest device, and this process's peak."""
  found = [device.memory_stats() or {} for device in jax.local_devices()]
  names = {
    "memory/in_use_gib": "bytes_in_use",
    "memory/peak_gib": "peak_bytes_in_use",
    "memory/limit_gib": "bytes_limit",
  }
  # Not every backend reports memory.
  known = {
    tag: max(stats[name] for stats in found) / _GIB
    for tag, name in names.items()
    if all(name in stats for stats in found)
  }
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
  return known | {"memory/host_peak_gib": peak * 1024 / _GIB}


def _seconds_left(
  trainer: Trainer, now: StagePlan, update: int, seconds: float
) -> tuple[float, float]:
  """Estimates the seconds left for the stage and for the run.

  An update of a later stage is assumed to take time proportional to the length
  of its rows.
  """
  stage = (now.end - update) * seconds
  later = sum(
    s.updates * seconds * s.config.length / now.config.length
    for s in trainer.curriculum.stages[now.index + 1 :]
  )
  return stage, stage + later


def _to_plain(values: dict[str, Any]) -> dict[str, Any]:
  """Returns metrics as JSON values; nan and inf become strings."""
  spell = lambda x: x if math.isfinite(x) else repr(x)
  lists = {
    name: [np.asarray(part).tolist() for part in value]
    for name, value in values.items()
    if isinstance(value, Ratio)
  }
  return jax.tree.map(spell, values | lists)


def _from_plain(values: dict[str, Any]) -> dict[str, Any]:
  return {
    name: Ratio(*(np.array(part, np.float32) for part in value))
    if isinstance(value, list)
    else float(value)
    for name, value in values.items()
  }
