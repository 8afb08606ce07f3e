"""Where numbers go: metrics.jsonl and TensorBoard, under the same names.

Method names are those of clu's metric writers, so one of them drops in.
"""

import math
import os
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
_WHOLE_SECONDS = 30.0  # the same in a bucket, where a flush writes all of it

Scalars = Mapping[str, float]


class _Buckets:
  """Lets tensorboardX write to buckets as all else here does."""

  def open(self, path: str) -> buckets.Appender:
    return buckets.Appender(path)

  def directory_check(self, path: str) -> None:
    """A bucket has no folders."""


for _scheme in buckets.SCHEMES:
  record_writer.register_writer_factory(_scheme, _Buckets())


class _Due:
  """Tells when a file that grows is to be flushed, for whoever is watching."""

  def __init__(self, path: epath.Path, seconds: float):
    self._seconds = seconds if files.is_local(path) else _WHOLE_SECONDS
    self._last = -math.inf

  def now(self) -> bool:
    """Whether it is time, once a time."""
    due = time.monotonic() - self._last >= self._seconds
    self._last = time.monotonic() if due else self._last
    return due


class JsonlWriter:
  """One JSON object a line: the step and its scalars."""

  def __init__(self, path: epath.Path, after: int, redo: tuple[str, ...] = ()):
    """Appends to `path`, first dropping lines that will be written again.

    Args:
      path: of the file.
      after: lines of later steps are dropped.
      redo: and those of this step whose names begin with one of these.
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

  def write_scalars(self, step: int, scalars: Scalars) -> None:
    self._write({"step": step, **scalars})

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    self._write({"step": step, **texts})

  def flush(self) -> None:
    self._file.flush()

  def close(self) -> None:
    self._file.close()

  def _write(self, line: dict[str, Any]) -> None:
    self._file.write(strict_json.dumps(line) + "\n")
    if self._due.now():
      self._file.flush()


class TensorBoardWriter:
  """An event file; what an earlier run wrote beyond `after` is hidden.

  Written by this thread: tensorboardX's own writer has another one, which a
  full disk kills without a word, and then waits for it for ever.
  """

  def __init__(self, folder: epath.Path, after: int):
    files.make_folder(folder)
    self._events = EventsWriter(str(folder / "events"), f".{os.getpid()}")
    started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._due = _Due(folder, _FLUSH_SECONDS)
    self._write(after + 1, session_log=started)

  def write_scalars(self, step: int, scalars: Scalars) -> None:
    for name, value in scalars.items():
      self._write(step, summary=summary.scalar(name, value))
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
  reported once and then left out: training goes on without its curves.
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
    """Writes numbers of one step."""
    self._each("write_scalars", step, scalars)

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    """Writes texts of one step."""
    self._each("write_texts", step, texts)

  def flush(self) -> None:
    """Hands all that was written to the system: a kill then loses none."""
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
    "%s can't be written (%s): the run goes on without it", path, error.strerror
  )
