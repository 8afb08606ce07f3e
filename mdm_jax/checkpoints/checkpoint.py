"""Saving and restoring checkpoints of a pytree of arrays, with Orbax.

No other module uses Orbax, and this one only to write and read arrays.
`step_folders.py` decides which steps exist, are whole, or are best.
"""

import concurrent.futures
import contextlib
import shutil
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from mdm_jax.checkpoints.retention import Retention
from mdm_jax.checkpoints.staging import Staging
from mdm_jax.checkpoints.step_folders import StepFolders
from mdm_jax.core import distributed, files, trees
from mdm_jax.core.errors import (
  Failure,
  NumericsError,
  Stopped,
  StorageError,
  UserError,
)

_STATE = "state"
_ROOM = 1.05  # upper bound of bytes on disk / bytes of state


class Checkpoints:
  """The checkpoints of a workdir.

  Saving is asynchronous, one step at a time. The error of a failed save is
  raised by the next call that waits for it. Leaving the `with` block waits for
  the pending save. In a multi-process run all processes save together; process
  0 writes the manifest and deletes old steps.

  Example:

    with Checkpoints(workdir) as checkpoints:
      checkpoints.save(step, state, progress={})
    ...
    with Checkpoints(workdir) as checkpoints:
      state = checkpoints.restore(checkpoints.latest(), abstract_state)
  """

  def __init__(
    self,
    workdir: epath.PathLike,
    keep_latest: int = 2,
    keep_every: int | None = None,
    on_sealed: Callable[[int], None] = lambda step: None,
  ):
    """Opens a workdir's checkpoints.

    Args:
      workdir: the run's folder.
      keep_latest: number of newest steps to keep.
      keep_every: also keep steps divisible by this (None: none).
      on_sealed: called with each step that has been saved completely, in
        another thread.
    """
    # Our own bookkeeping, not Orbax's CheckpointManager, which remembers steps
    # whose save failed and ranks NaN as the best.
    path = epath.Path(workdir)
    # Orbax needs an absolute path.
    path = path.resolve() if files.is_local(path) else path
    self._folders = StepFolders(path, Retention(keep_latest, keep_every))
    self._staging = Staging(path)
    self._on_sealed = on_sealed
    self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
    self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
    self._sealing: concurrent.futures.Future | None = None

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind: type | None, *_: Any) -> None:
    # `Stopped` promises that everything is saved, so a failed save must raise.
    if kind in (None, Stopped):
      self.close()
      return
    # Any other error is already on its way and must not be replaced.
    with contextlib.suppress(Exception):
      self.close()

  def close(self) -> None:
    """Waits for the pending save and stops all threads.

    Raises:
      StorageError: the save failed.
    """
    try:
      self.wait()
    finally:
      self._thread.shutdown()
      self._orbax.close()
      self._staging.close()

  # MARK: reading

  def latest(self) -> int | None:
    """Returns the newest whole step, or None if nothing was ever saved.

    Raises:
      StorageError: steps were saved, but none of them is whole.
      UserError: a step was written by another version of this library.
    """
    self.wait()
    return self._folders.newest()

  def best(self) -> int | None:
    """Returns the best evaluated step, or the newest if none was evaluated."""
    self.wait()
    best = distributed.first_alone(self._folders.best)
    return self.latest() if best is None else best

  def check_has(self, step: int) -> None:
    """Raises UserError, listing the whole steps, if a step isn't one."""
    exists = step in self._folders.steps()
    if not (exists and self._folders.is_whole(step)):
      raise UserError(
        f"workdir {self._folders.workdir} has no checkpoint {step}; it has:"
        f" {self.listed()}"
      )

  def listed(self) -> str:
    """Returns the whole steps as text, for a message."""
    whole = filter(self._folders.is_whole, self._folders.steps())
    return ", ".join(map(str, whole)) or "none"

  def progress(self, step: int) -> dict[str, Any]:
    """Returns the `progress` that a step was saved with."""
    return self._folders.progress(step)

  def evaluation(self, step: int) -> dict[str, Any] | None:
    """Returns a step's evaluation, or None if it wasn't evaluated."""
    return self._folders.evaluation(step)

  # MARK: saving

  def save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
    """Starts saving a state, unless the step is saved already.

    Args:
      step: number of updates before the state.
      state: a pytree of arrays. They may be donated once this returns.
      progress: JSON values to save with it.

    Raises:
      NumericsError: the state is not finite; nothing is saved.
      StorageError: the disk is too full, or this or the last save failed.
    """
    self.wait()
    if self._folders.known_whole(step):
      return
    if not bool(_all_finite(state)):
      raise NumericsError(
        f"the state after update {step} is not finite and was not saved;"
        f" the last good checkpoint is {self._folders.last_known()}"
      )
    self._check_room(step, state)
    began = time.monotonic()
    try:
      self._orbax.save(
        self._staging.begin(self._folders.path(step)) / _STATE,
        args=ocp.args.PyTreeSave(state),
        force=True,  # replaces what a killed save left in the folder
      )
    except Exception as error:
      raise self._failed(step, error) from error
    self._sealing = self._thread.submit(self._seal, step, progress, began)

  def record(self, step: int, measured: dict[str, Any]) -> None:
    """Saves a step's evaluation, see `StepFolders.record`."""
    self.wait()
    try:
      if distributed.is_first():
        self._folders.record(step, measured)
    except OSError as error:
      raise self._failed(step, error) from error

  def check_save(self) -> None:
    """Raises StorageError if the pending save has failed by now."""
    if self._sealing is not None and self._sealing.done():
      self.wait()

  def wait(self) -> None:
    """Waits for the pending save; raises StorageError if it failed."""
    # Forget the save first, so that its error is raised only once.
    if self._sealing is not None:
      pending, self._sealing = self._sealing, None
      pending.result()

  def set_aside_after(self, step: int | None) -> None:
    """Moves all steps after `step` out of the way; all steps if None."""
    distributed.first_alone(lambda: self._folders.set_aside_after(step))

  def _seal(self, step: int, progress: dict[str, Any], began: float) -> None:
    """Finishes a save: waits, writes the manifest, deletes old steps.

    Runs in a thread, so that training continues meanwhile. The manifest is
    written last, so a killed save never looks like a whole checkpoint, and old
    steps are deleted only after that.
    """
    try:
      self._orbax.wait_until_finished()
      if distributed.is_first():
        written = self._staging.send(self._folders.path(step))
        seconds = time.monotonic() - began
        self._folders.seal(step, progress, seconds, written)
        self._staging.clear()
        self._on_sealed(step)
        self._folders.prune()
      else:
        self._folders.trust(step)
        self._on_sealed(step)
    except Exception as error:
      raise self._failed(step, error) from error

  def _check_room(self, step: int, state: Any) -> None:
    folder = self._staging.room or self._folders.workdir
    if not files.is_local(folder):
      return
    needed = _ROOM * sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    free = shutil.disk_usage(folder).free
    if free < needed:
      raise StorageError(
        f"no space for checkpoint {step}: it needs"
        f" {needed / 2**20:,.1f} MiB, but {folder} has {free / 2**20:,.1f} MiB"
        f" free; the last good one is {self._folders.last_known()}"
      )

  def _failed(self, step: int, error: Exception) -> Failure:
    if isinstance(error, Failure):
      return error
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return StorageError(
      f"checkpoint {step} could not be saved ({lines[0]}); the last good one is"
      f" {self._folders.last_known()}"
    )

  # MARK: restoring

  def restore(self, step: int, like: Any, partial: bool = False) -> Any:
    """Restores a step.

    Args:
      step: a whole step.
      like: a pytree of `jax.ShapeDtypeStruct` with the shardings of the result.
      partial: whether `like` has only some of the saved arrays, e.g.
        `ema_params`; the others are not read.

    Raises:
      UserError: the saved arrays differ from `like`.
    """
    self.check(step, like)
    like = jax.tree.map(_placed, like)
    return self._orbax.restore(
      self._staging.fetch(self._folders.path(step)) / _STATE,
      args=ocp.args.PyTreeRestore(
        like,
        restore_args=ocp.checkpoint_utils.construct_restore_args(like),
        partial_restore=partial,
      ),
    )

  def restore_best_part(self, like: Any) -> tuple[int, Any]:
    """Returns the best step, and its arrays in `like`, as `restore` does.

    If a training run deletes the step while it is read, the next best is tried.

    Raises:
      UserError: nothing was saved, or the saved arrays differ from `like`.
      StorageError: all steps are damaged.
    """
    while (step := self.best()) is not None:
      try:
        return step, self.restore(step, like, partial=True)
      except Exception:
        if not self._folders.is_gone(step):
          raise
    raise UserError(f"workdir {self._folders.workdir} has no checkpoint yet")

  def check(self, step: int, like: Any) -> None:
    """Checks a step's arrays before they are restored.

    Orbax itself raises a long error for other shapes, and silently casts other
    dtypes.

    Raises:
      UserError: the saved arrays differ from `like`.
    """
    folder = self._staging.fetch(self._folders.path(step))
    tree = self._orbax.metadata(folder / _STATE)
    saved = trees.by_path(tree.item_metadata.tree)
    for path, leaf in trees.by_path(like).items():
      found = saved.get(path)
      if found is None:
        raise UserError(
          f"checkpoint {step} has no {path}; use another workdir, or start"
          " from its parameters with --config.init_from"
        )
      if tuple(found.shape) != leaf.shape or found.dtype != leaf.dtype:
        raise UserError(
          f"checkpoint {step}: {path} is {found.dtype}{list(found.shape)}, the"
          f" config asks for {leaf.dtype}{list(leaf.shape)}; use another"
          " workdir"
        )


@jax.jit
def _all_finite(state: Any) -> jax.Array:
  floats = (
    leaf
    for leaf in jax.tree.leaves(state)
    if jnp.issubdtype(leaf.dtype, jnp.floating)
  )
  return jnp.stack([jnp.isfinite(leaf).all() for leaf in floats]).all()


def _placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  """Returns an abstract leaf with its spec bound to the current mesh's devices.

  `eval_shape` gives shardings over an abstract mesh, which has no devices.
  """
  # Constants in an abstract state, such as counters, have no sharding.
  spec = leaf.sharding.spec if leaf.sharding else jax.sharding.PartitionSpec()
  sharding = jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec)
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
