"""The folders of saved steps: which there are, which are whole, which go.

checkpoints/350/state            what Orbax wrote
checkpoints/350/manifest.json    the hashes of its files, and the run's progress
checkpoints/350/evaluation.json  what was measured of it, if it was
checkpoints.jsonl                every step that ever had a manifest
set_aside/350                    a step that was damaged, or not wanted

A step without a verified manifest is no checkpoint: it is neither restored nor
counted when older ones are deleted.
"""

import math
import time
from typing import Any

from etils import epath

from mdm_jax.checkpoints import manifest
from mdm_jax.checkpoints.retention import Retention
from mdm_jax.core import files, strict_json
from mdm_jax.core.errors import StorageError, UserError
from mdm_jax.core.progress import console

_EVALUATION = "evaluation.json"


class StepFolders:
  """The checkpoints of a workdir, as far as they are files.

  Attributes:
    workdir: the run's folder.
  """

  def __init__(self, workdir: epath.Path, retention: Retention):
    self.workdir = workdir
    self._retention = retention
    self._folder = workdir / "checkpoints"
    self._log = workdir / "checkpoints.jsonl"
    self._problems: dict[int, str | None] = {}  # what is known of each

  def path(self, step: int) -> epath.Path:
    """Returns the folder of a step, whether it is there or not."""
    return self._folder / str(step)

  def steps(self) -> list[int]:
    """Returns every step that has a folder, rising; most of them are whole."""
    names = files.names(self._folder)
    return sorted(int(name) for name in names if name.isdecimal())

  # MARK: reading

  def newest(self) -> int | None:
    """Returns the newest step that is whole, None before there was any.

    Raises:
      StorageError: there were steps, and not one of them is whole.
      UserError: one is of a newer version of this library.
    """
    steps: list[int] = []
    while steps != (steps := self.steps()):  # another process may make new ones
      for step in reversed(steps):
        if self.is_whole(step):
          return step
    logged = self._logged()
    if logged:
      raise StorageError(
        f"workdir {self.workdir} had checkpoints (the last of update"
        f" {max(logged)}), and none of them is whole; bring one back, or give"
        " another --workdir to start anew"
      )
    return None

  def best(self) -> int | None:
    """Returns the best whole step by its headline, if one was measured."""
    ranked = self._ranked(self.steps())
    return next((step for step in ranked if self.is_whole(step)), None)

  def is_whole(self, step: int) -> bool:
    """Whether a step's files fit its manifest; reads all of them, once."""
    if step not in self._problems:
      try:
        problem = manifest.problem(self.path(step))
      except FileNotFoundError as error:
        problem = f"{epath.Path(error.filename).name} is missing"
      self._problems[step] = problem
      if problem and not self.is_gone(step):
        damaged = step in self._logged()
        what = f"is damaged ({problem})" if damaged else "was never finished"
        self._pass_over(step, what)
    return self._problems[step] is None

  def is_gone(self, step: int) -> bool:
    """Whether another process has deleted a step that was there."""
    if files.exists(self.path(step) / manifest.NAME):
      return False
    if files.exists(self.path(step)) and not self.known_whole(step):
      return False  # half of it may have been lost at any time
    self._problems[step] = "deleted"
    self._pass_over(step, "was deleted meanwhile")
    return True

  def _pass_over(self, step: int, what: str) -> None:
    console.print(f"checkpoint {step} {what}: passing over it", soft_wrap=True)

  def known_whole(self, step: int) -> bool:
    """Whether a step was read or written by this process, and is whole."""
    return self._problems.get(step, "unknown") is None

  def last_known(self) -> int | None:
    """Returns the newest of those steps, for a message."""
    return max(filter(self.known_whole, self._problems), default=None)

  def progress(self, step: int) -> dict[str, Any]:
    """Returns what was saved beside a step.

    Raises:
      StorageError: it is no more.
    """
    content = manifest.read(self.path(step))
    if content is None:
      raise StorageError(
        f"checkpoint {step} was deleted meanwhile: the same command takes the"
        " next one"
      )
    return content["progress"]

  def evaluation(self, step: int) -> dict[str, Any] | None:
    """Returns what was measured of a step, or None."""
    return files.read_json(self.path(step) / _EVALUATION)

  def _ranked(self, steps: list[int]) -> list[int]:
    """Returns the measured ones of some steps, the best first.

    Each is ranked by what its own evaluation names as the headline.

    Raises:
      UserError: an older version measured one, and named none.
    """
    measured = {step: self.evaluation(step) for step in steps}
    ranks = {step: self._rank(step, m) for step, m in measured.items() if m}
    found = [step for step, rank in ranks.items() if math.isfinite(rank)]
    return sorted(found, key=ranks.get)

  def _rank(self, step: int, measured: dict[str, Any]) -> float:
    headline = measured.get("headline")
    if headline is None:
      raise UserError(
        f"{self.path(step) / _EVALUATION} is of an older version, which did not"
        " say which number tells the best checkpoint: finish the run with that"
        " version, or give another --workdir"
      )
    value = strict_json.number(headline["value"])
    return value if headline["lower_is_better"] else -value

  def _logged(self) -> set[int]:
    return {line["step"] for line in files.read_lines(self._log)}

  # MARK: writing

  def seal(
    self,
    step: int,
    progress: dict[str, Any],
    seconds: float,
    written: epath.Path | None = None,
  ) -> None:
    """Makes a folder that is complete a checkpoint.

    Args:
      step: whose folder it is.
      progress: to keep beside it.
      seconds: the save took so far, for the log.
      written: where its files were written, if they were copied from there.
    """
    told = {"step": step, "finite": True, "progress": progress}
    content = manifest.write(self.path(step), told, written)
    size = sum(file["bytes"] for file in content["files"].values())
    line = {"step": step, "bytes": size, "seconds": seconds}
    files.append_line(self._log, line | {"time": time.time()})
    self.trust(step)

  def trust(self, step: int) -> None:
    """Takes a step for whole that this process saw being written."""
    self._problems[step] = None

  def record(self, step: int, measured: dict[str, Any]) -> None:
    """Keeps what was measured of a step, and which number is its headline.

    Args:
      step: what was measured.
      measured: numbers by name, and `headline`: the `name` and `value` of the
        one that tells the best step, and whether `lower_is_better`.
    """
    files.write_json(self.path(step) / _EVALUATION, measured)

  def prune(self) -> None:
    """Deletes the whole steps that are not to be kept."""
    whole = [s for s in self.steps() if manifest.has_its_files(self.path(s))]
    kept = self._retention.kept(whole, self._ranked(whole))
    for step in set(whole) - kept:
      # Without its manifest first: half a deletion must not look like damage.
      files.delete(self.path(step) / manifest.NAME)
      files.delete_folder(self.path(step))
      self._problems.pop(step, None)

  def set_aside_after(self, step: int | None) -> None:
    """Moves the steps after `step`, all if None, out of the way.

    What was never finished is deleted, as its update will be made again.
    """
    logged, aside = self._logged(), self.workdir / "set_aside"
    for found in self.steps():
      if step is not None and found <= step:
        continue
      self._problems.pop(found, None)
      if found not in logged:
        files.delete_folder(self.path(found))
        continue
      target = aside / str(found)
      files.make_folder(aside)
      if files.exists(target):
        files.delete_folder(target)
      files.move_folder(self.path(found), target)
      console.print(f"checkpoint {found} is kept in {target}", soft_wrap=True)
