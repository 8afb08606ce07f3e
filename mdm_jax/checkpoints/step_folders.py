"""The folders of checkpoints: which exist, are whole, are best, are deleted.

checkpoints/350/state            the arrays, written by Orbax
checkpoints/350/manifest.json    hashes of its files, and the run's progress
checkpoints/350/evaluation.json  the step's evaluation, if there was one
checkpoints.jsonl                every step that was ever saved completely
set_aside/350                    a step that was damaged, or given up by the
                                 user (`train.restore_step`)

A step without a valid manifest is no checkpoint: it is neither restored, nor
counted when old ones are deleted.
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
  """The checkpoint folders of a workdir.

  Attributes:
    workdir: the run's folder.
  """

  def __init__(self, workdir: epath.Path, retention: Retention):
    self.workdir = workdir
    self._retention = retention
    self._folder = workdir / "checkpoints"
    self._log = workdir / "checkpoints.jsonl"
    # By step: what is wrong with it, None if it is whole. Steps that this
    # process has neither read nor written are missing.
    self._problems: dict[int, str | None] = {}

  def path(self, step: int) -> epath.Path:
    """Returns the folder of a step, which need not exist."""
    return self._folder / str(step)

  def steps(self) -> list[int]:
    """Returns the steps with a folder, whole or not, in increasing order."""
    names = files.names(self._folder)
    return sorted(int(name) for name in names if name.isdecimal())

  # MARK: reading

  def newest(self) -> int | None:
    """Returns the newest whole step, or None if nothing was ever saved.

    Raises:
      StorageError: steps were saved, but none of them is whole.
      UserError: a step was written by another version of this library.
    """
    # A training run may replace steps while they are checked here, so look
    # again until the list stays the same.
    steps: list[int] = []
    while steps != (steps := self.steps()):
      for step in reversed(steps):
        if self.is_whole(step):
          return step
    logged = self._logged()
    if logged:
      raise StorageError(
        f"workdir {self.workdir} had checkpoints (the last of"
        f" update {max(logged)}), but none of them is intact; restore one from"
        " a backup, or use another --workdir to start again"
      )
    return None

  def best(self) -> int | None:
    """Returns the best whole step, or None if none was evaluated."""
    ranked = self._ranked(self.steps())
    return next((step for step in ranked if self.is_whole(step)), None)

  def is_whole(self, step: int) -> bool:
    """Returns whether a step's files match its manifest.

    Reads all files the first time. Prints a message if the step is not whole.
    """
    if step not in self._problems:
      try:
        problem = manifest.problem(self.path(step))
      except FileNotFoundError as error:
        problem = f"{epath.Path(error.filename).name} is missing"
      self._problems[step] = problem
      if problem and not self.is_gone(step):
        damaged = step in self._logged()
        what = f"is damaged ({problem})" if damaged else "is incomplete"
        self._report_skipped(step, what)
    return self._problems[step] is None

  def is_gone(self, step: int) -> bool:
    """Returns whether another process has deleted a step.

    A deletion starts with the manifest. So a step with a manifest isn't being
    deleted.
    """
    if files.exists(self.path(step) / manifest.NAME):
      return False
    # A folder without a manifest is being deleted only if it had one before;
    # else it may be damaged, or a save that was never finished.
    if files.exists(self.path(step)) and not self.known_whole(step):
      return False
    self._problems[step] = "deleted"
    self._report_skipped(step, "was deleted by another process")
    return True

  def _report_skipped(self, step: int, why: str) -> None:
    console.print(f"checkpoint {step} {why}: skipping it", soft_wrap=True)

  def known_whole(self, step: int) -> bool:
    """Returns whether this process has found a step whole, or saved it."""
    return self._problems.get(step, "unknown") is None

  def last_known(self) -> int | None:
    """Returns the newest step known to be whole, for a message."""
    return max(filter(self.known_whole, self._problems), default=None)

  def progress(self, step: int) -> dict[str, Any]:
    """Returns the progress that a step was saved with.

    Raises:
      StorageError: the step has been deleted.
    """
    content = manifest.read(self.path(step))
    if content is None:
      raise StorageError(
        f"checkpoint {step} was deleted by another process: run the same"
        " command again to use the next one"
      )
    return content["progress"]

  def evaluation(self, step: int) -> dict[str, Any] | None:
    """Returns a step's evaluation, or None."""
    return files.read_json(self.path(step) / _EVALUATION)

  def _ranked(self, steps: list[int]) -> list[int]:
    """Returns the evaluated ones among some steps, the best first.

    Raises:
      UserError: an evaluation by an older version doesn't name its headline.
    """
    measured = {step: self.evaluation(step) for step in steps}
    ranks = {step: self._rank(step, m) for step, m in measured.items() if m}
    # NaN compares as neither better nor worse, so sorted() could put it first,
    # and the true best step would be deleted.
    found = [step for step, rank in ranks.items() if math.isfinite(rank)]
    return sorted(found, key=ranks.get)

  def _rank(self, step: int, measured: dict[str, Any]) -> float:
    headline = measured.get("headline")
    if headline is None:
      raise UserError(
        f"{self.path(step) / _EVALUATION} was written by an older"
        " version, which did not store the metric that selects the best"
        " checkpoint: finish the run with that version, or use another"
        " --workdir"
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
    """Writes the manifest of a completely written step: it is a checkpoint now.

    Args:
      step: the step.
      progress: JSON values to keep in the manifest.
      seconds: duration of the save so far, for checkpoints.jsonl.
      written: where the files were written, if they were copied from there.
    """
    extra = {"step": step, "finite": True, "progress": progress}
    content = manifest.write(self.path(step), extra, written)
    size = sum(file["bytes"] for file in content["files"].values())
    line = {"step": step, "bytes": size, "seconds": seconds}
    files.append_line(self._log, line | {"time": time.time()})
    self.trust(step)

  def trust(self, step: int) -> None:
    """Marks a step as whole without reading it, after its save."""
    self._problems[step] = None

  def record(self, step: int, measured: dict[str, Any]) -> None:
    """Saves a step's evaluation.

    Args:
      step: the evaluated step.
      measured: metrics by name, and under "headline" the `name` and `value` of
        the one that selects the best step, and whether `lower_is_better`.
    """
    files.write_json(self.path(step) / _EVALUATION, measured)

  def prune(self) -> None:
    """Deletes the whole steps that `Retention` doesn't keep."""
    # By sizes only: hashing would read every kept step after each save.
    whole = [s for s in self.steps() if manifest.has_its_files(self.path(s))]
    kept = self._retention.kept(whole, self._ranked(whole))
    for step in set(whole) - kept:
      # The manifest goes first: a process that is reading the step then finds
      # it deleted (`is_gone`), not damaged.
      files.delete(self.path(step) / manifest.NAME)
      files.delete_folder(self.path(step))
      self._problems.pop(step, None)

  def set_aside_after(self, step: int | None) -> None:
    """Moves all steps after `step` to set_aside/; all steps if None.

    Steps whose save never finished are deleted instead.
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
      console.print(f"checkpoint {found} was moved to {target}", soft_wrap=True)
