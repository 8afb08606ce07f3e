"""Metric writers: metrics.jsonl and TensorBoard, with the same names.

Methods are named as in clu's metric writers, so those can be used instead.
"""

import math
import os
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from absl import logging
from etils import epath
from tensorboardX import record_writer, summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

from mdm_jax.core import buckets, distributed, files, strict_json

_FLUSH_SECONDS = 10.0
_WHOLE_SECONDS = 30.0  # in a bucket, where a flush uploads the whole file

# The loss and the likelihood. TensorBoard sorts its groups by name, so these
# are also written as a group that comes before goodput, memory and the like.
_CURVES = re.compile(r"train/loss|validation/\w+_per_token")

Scalars = Mapping[str, float]


class _Buckets:
  """Makes tensorboardX write to buckets through `core/buckets.py`."""

  def open(self, path: str) -> buckets.Appender:
    return buckets.Appender(path)

  def directory_check(self, path: str) -> None:
    """Does nothing: a bucket has no folders to create."""


# tensorboardX looks up the writer of a path by its scheme.
for _scheme in buckets.SCHEMES:
  record_writer.register_writer_factory(_scheme, _Buckets())


class _Due:
  """Decides when a growing file is flushed, so that readers see it grow."""

  def __init__(self, path: epath.Path, seconds: float):
    self._seconds = seconds if files.is_local(path) else _WHOLE_SECONDS
    self._last = -math.inf

  def now(self) -> bool:
    """Returns whether a flush is due; True starts the next interval."""
    due = time.monotonic() - self._last >= self._seconds
    self._last = time.monotonic() if due else self._last
    return due


class JsonlWriter:
  """Writes one JSON object per line: the step and its scalars or texts."""

  def __init__(self, path: epath.Path, after: int, redo: tuple[str, ...] = ()):
    """Opens `path` to append, without lines that will be written again.

    Args:
      path: the file.
      after: the step of the checkpoint; lines of later steps are dropped.
      redo: name prefixes; lines of step `after` with such a name are dropped.
    """
    kept = [
      line
      for line in files.read_lines(path)
      if line["step"] < after
      or (line["step"] == after and not any(n.startswith(redo) for n in line))
    ]
    lines = "".join(f"{strict_json.dumps(line)}\n" for line in kept)
    self._file = files.open_to_append(path, lines.encode())
    self._due = _Due(path, seconds=0.0)

  def write_scalars(self, step: int, values: Mapping[str, Any]) -> None:
    self._file.write(strict_json.dumps({"step": step, **values}) + "\n")
    if self._due.now():
      self._file.flush()

  write_texts = write_scalars

  def flush(self) -> None:
    self._file.flush()

  def close(self) -> None:
    self._file.close()


class TensorBoardWriter:
  """Writes a TensorBoard event file.

  It writes in the calling thread. tensorboardX's own writer has a background
  thread: a full disk kills it silently, and closing then waits for it forever.
  """

  def __init__(self, folder: epath.Path, after: int):
    files.make_folder(folder)
    # The pid, since attempts started in the same second would share a name.
    self._events = EventsWriter(str(folder / "events"), f".{os.getpid()}")
    # TensorBoard hides what earlier event files have from this step on.
    started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._due = _Due(folder, _FLUSH_SECONDS)
    self._write(after + 1, session_log=started)

  def write_scalars(self, step: int, scalars: Scalars) -> None:
    for name, value in scalars.items():
      if math.isnan(value):
        continue  # unknown, as the standard error over a single document
      self._write(step, summary=summary.scalar(name, value))
      if _CURVES.fullmatch(name):
        self._write(step, summary=summary.scalar(f"curves/{name}", value))
    if self._due.now():
      self.flush()

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
      # TensorBoard reads Markdown; an indented block keeps text as it is.
      indented = "\n".join("    " + line for line in text.splitlines())
      self._write(step, summary=summary.text(name, indented))

  def flush(self) -> None:
    self._events.flush()

  def close(self) -> None:
    self._events.close()

  def _write(self, step: int, **content: Any) -> None:
    now = time.time()
    self._events.write_event(
      event_pb2.Event(wall_time=now, step=step, **content)
    )


class Writers:
  """Writes everything to a workdir's metrics.jsonl and TensorBoard files.

  Only process 0 writes. A writer that fails, for example on a full disk, is
  reported once and then dropped: losing curves must not end a run.
  """

  def __init__(
    self, workdir: epath.Path, after: int, redo: tuple[str, ...] = ()
  ):
    self._writers = []
    if not distributed.is_first():
      return
    jsonl = workdir / "metrics.jsonl"
    self._open(jsonl, lambda: JsonlWriter(jsonl, after, redo))
    folder = workdir / "tensorboard"
    self._open(folder, lambda: TensorBoardWriter(folder, after))

  def __enter__(self) -> "Writers":
    return self

  def __exit__(self, *_: Any) -> None:
    self._each("close")

  def write_scalars(self, step: int, scalars: Scalars) -> None:
    """Writes the scalars of one step."""
    self._each("write_scalars", step, scalars)

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    """Writes the texts of one step."""
    self._each("write_texts", step, texts)

  def flush(self) -> None:
    """Flushes all files to the operating system, so that a kill loses none."""
    self._each("flush")

  def _open(self, path: epath.Path, make: Callable[[], Any]) -> None:
    try:
      self._writers.append((path, make()))
    except OSError as error:
      _give_up(path, error)

  def _each(self, method: str, *args: Any) -> None:
    working = []
    for path, writer in self._writers:
      try:
        getattr(writer, method)(*args)
        working.append((path, writer))
      except OSError as error:
        _give_up(path, error)
    self._writers = working


def _give_up(path: epath.Path, error: OSError) -> None:
  logging.warning(
    "%s can't be written (%s): the run continues without it",
    path,
    error.strerror,
  )
