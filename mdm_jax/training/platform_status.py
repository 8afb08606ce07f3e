"""Tells an experiment platform how a run is doing, through `clu.platform`.

On a machine without such a platform clu logs the messages at level INFO, which
is hidden unless `--verbosity=0` is given.
"""

from typing import Any

from clu import platform
from etils import epath

from mdm_jax.training.curriculum import StagePlan
from mdm_jax.training.hooks import Hook
from mdm_jax.training.state import TrainState


class PlatformStatus(Hook):
  """Sets the work unit's notes and the task's status; links the workdir."""

  def __init__(self, name: str, updates: int, workdir: epath.Path):
    self._name, self._updates, self._workdir = name, updates, workdir

  def on_start(self, state: TrainState) -> None:
    unit = platform.work_unit()
    unit.set_notes(f"{self._name}, from update {int(state.step)}")
    kind = platform.ArtifactType.DIRECTORY
    unit.create_artifact(kind, str(self._workdir), "workdir")

  def on_stage(self, stage: StagePlan, update: int) -> None:
    self._set(f"stage {stage.config.name}, from update {update}")

  def on_save(self, done: int, state: TrainState, kept: dict[str, Any]) -> None:
    self._set(f"update {done} of {self._updates}")

  def on_end(self, state: TrainState) -> None:
    self._set(f"all {self._updates} updates done")

  def _set(self, status: str) -> None:
    platform.work_unit().set_task_status(status)
