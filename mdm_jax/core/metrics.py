"""Where numbers go: metrics.jsonl and TensorBoard, under the same names.

Method names are those of clu's metric writers, so one of them drops in.
"""

import json
from collections.abc import Mapping
from typing import Any

import tensorboardX
from etils import epath

Scalars = Mapping[str, float]


class JsonlWriter:
  """One JSON object a line: the step and its scalars."""

  def __init__(self, path: epath.Path, after: int):
    """Appends to `path`, first dropping lines of steps beyond `after`."""
    kept = []
    if path.exists():
      lines = path.read_text().splitlines()
      kept = [line for line in lines if _step(line) <= after]
    path.write_text("".join(f"{line}\n" for line in kept))
    self._file = path.open("a")

  def write_scalars(self, step: int, scalars: Scalars) -> None:
    self._file.write(json.dumps({"step": step, **scalars}) + "\n")
    self._file.flush()

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    self._file.write(json.dumps({"step": step, **texts}) + "\n")
    self._file.flush()

  def close(self) -> None:
    self._file.close()


class TensorBoardWriter:
  """An event file; what an earlier run wrote beyond `after` is hidden."""

  def __init__(self, folder: epath.Path, after: int):
    self._writer = tensorboardX.SummaryWriter(str(folder), purge_step=after + 1)

  def write_scalars(self, step: int, scalars: Scalars) -> None:
    for name, value in scalars.items():
      self._writer.add_scalar(name, value, step)

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
      # TensorBoard reads Markdown; an indented block keeps text as it is.
      indented = "\n".join("    " + line for line in text.splitlines())
      self._writer.add_text(name, indented, step)

  def close(self) -> None:
    self._writer.close()


class Writers:
  """Writes everything to a workdir's metrics.jsonl and TensorBoard files."""

  def __init__(self, workdir: epath.Path, after: int):
    self._writers = (
      JsonlWriter(workdir / "metrics.jsonl", after),
      TensorBoardWriter(workdir / "tensorboard", after),
    )

  def __enter__(self) -> "Writers":
    return self

  def __exit__(self, *_: Any) -> None:
    for writer in self._writers:
      writer.close()

  def write_scalars(self, step: int, scalars: Scalars) -> None:
    """Writes numbers of one step."""
    for writer in self._writers:
      writer.write_scalars(step, scalars)

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    """Writes texts of one step."""
    for writer in self._writers:
      writer.write_texts(step, texts)


def _step(line: str) -> float:
  """The step of a line; one cut short by a crash is dropped."""
  try:
    return json.loads(line)["step"]
  except (ValueError, KeyError):
    return float("inf")
