"""Metric writers: what a resume drops, and what happens on a full disk."""

import json
import math
import os

import pytest
from etils import epath

from mdm_jax.training import writers as writers_lib
from mdm_jax.training.writers import JsonlWriter, TensorBoardWriter, Writers


def _steps(path):
  return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def _write(path, lines):
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))


LINES = [
  {"step": 0, "config": "x"},
  {"step": 1, "train/loss": 1.0},
  {"step": 2, "train/loss": 2.0},
  {"step": 2, "validation/nelbo": 3.0},
  {"step": 2, "samples/0": "text"},
  {"step": 3, "train/loss": 4.0},
]


@pytest.mark.parametrize(
  ("after", "redo", "kept"),
  [
    (-1, (), []),
    (0, (), LINES[:1]),
    (2, (), LINES[:5]),
    (2, ("validation/", "samples/"), LINES[:3]),
    (3, ("validation/", "samples/"), LINES),  # update 2 was measured long ago
  ],
)
def test_what_will_be_written_again_is_dropped(after, redo, kept, tmp_path):
  path = tmp_path / "metrics.jsonl"
  _write(path, LINES)
  with path.open("a") as file:
    file.write('{"step": 3, "train/lo')
  writer = JsonlWriter(epath.Path(path), after, redo)
  writer.write_scalars(4, {"train/loss": 5.0})
  writer.close()
  found = [json.loads(line) for line in path.read_text().splitlines()]
  assert found == [*kept, {"step": 4, "train/loss": 5.0}]


def _events(folder):
  accumulators = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator"
  )
  return accumulators.EventAccumulator(str(folder)).Reload()


def test_tensorboard_shows_what_was_made_again_once(tmp_path, monkeypatch):
  folder = epath.Path(tmp_path)
  for attempt, (first, last) in enumerate([(1, 7), (4, 9)]):
    # Two attempts of a second would share a file's name.
    monkeypatch.setattr(writers_lib.os, "getpid", lambda n=attempt: n)
    writer = TensorBoardWriter(folder, after=first - 1)
    for step in range(first, last + 1):
      writer.write_scalars(step, {"x": float(attempt * 100 + step)})
    writer.close()
  shown = [(e.step, e.value) for e in _events(tmp_path).Scalars("x")]
  assert shown == [(1, 1), (2, 2), (3, 3)] + [
    (step, 100 + step) for step in range(4, 10)
  ]


def test_an_unknown_number_is_no_point_in_tensorboard(tmp_path, caplog):
  writer = TensorBoardWriter(epath.Path(tmp_path), after=0)
  writer.write_scalars(1, {"nelbo_stderr": math.nan, "nelbo": 2.5})
  writer.close()
  assert _events(tmp_path).Tags()["scalars"] == ["nelbo"]
  assert not caplog.records  # "NaN or Inf found in input tensor."


def test_what_is_flushed_survives_a_kill(tmp_path):
  """The file is read while the writer, as after a kill, never closes it."""
  writer = TensorBoardWriter(epath.Path(tmp_path), after=-1)
  for step in range(5):
    writer.write_scalars(step, {"x": float(step)})
  writer.flush()
  assert [e.step for e in _events(tmp_path).Scalars("x")] == list(range(5))


def test_fault_14_a_writer_that_fails_is_left_out(tmp_path, monkeypatch):
  told = []
  monkeypatch.setattr(
    writers_lib.logging, "warning", lambda *args: told.append(args)
  )
  with Writers(epath.Path(tmp_path), after=-1) as writers:
    writers.write_scalars(1, {"x": 1.0})
    broken = writers._writers[0][1]
    broken._file = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")
    for step in (2, 3):
      writers.write_scalars(step, {"x": 1.0})
  assert len(told) == 1 and "metrics.jsonl" in str(told[0][1])
  assert _steps(tmp_path / "metrics.jsonl") == [1]
  assert [e.step for e in _events(tmp_path / "tensorboard").Scalars("x")] == [
    *(1, 2, 3)
  ]


def test_a_folder_that_can_not_be_made_is_reported(tmp_path, monkeypatch):
  told = []
  monkeypatch.setattr(
    writers_lib.logging, "warning", lambda *args: told.append(args)
  )
  (tmp_path / "tensorboard").write_text("a file")
  with Writers(epath.Path(tmp_path), after=-1) as writers:
    writers.write_scalars(1, {"x": 1.0})
  assert len(told) == 1 and "tensorboard" in str(told[0][1])
  assert _steps(tmp_path / "metrics.jsonl") == [1]


def _refuse(name):
  raise AssertionError(f"a bare {name}")


def test_what_is_no_number_is_null_and_read_back(tmp_path):
  path = tmp_path / "metrics.jsonl"
  _write(path, [{"step": 0, "loss": math.nan}])  # of an older version
  with Writers(epath.Path(tmp_path), after=1) as writers:
    writers.write_scalars(1, {"loss": math.inf, "rate": 0.5})
  read = lambda line: json.loads(line, parse_constant=_refuse)
  assert list(map(read, path.read_text().splitlines())) == [
    {"step": 0, "loss": None},
    {"step": 1, "loss": None, "rate": 0.5},
  ]
