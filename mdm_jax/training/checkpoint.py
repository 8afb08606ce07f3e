"""Checkpoints of the train state: the only module that knows Orbax."""

import math
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from mdm_jax.core.errors import UserError
from mdm_jax.model.denoiser import Denoiser, Params
from mdm_jax.training.state import TrainState

_FOLDER = "checkpoints"
_METRIC = "nelbo_per_token"


class Checkpoints:
  """Saved steps of a workdir: the newest few and the best by held-out bound.

  Saving is asynchronous; leaving the `with` block waits for it.
  """

  def __init__(self, workdir: epath.PathLike, keep_latest: int = 2):
    keep = [
      policies.LatestN(keep_latest),
      policies.BestN(get_metric_fn=_bound, reverse=True, n=1),
    ]
    self._manager = ocp.CheckpointManager(
      epath.Path(workdir).resolve() / _FOLDER,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(keep),
        best_fn=_bound,
        best_mode="min",
        create=True,
        enable_async_checkpointing=True,
      ),
      item_handlers=ocp.PyTreeCheckpointHandler(),
    )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()

  def close(self) -> None:
    """Waits for pending saves; a failed one is raised here."""
    self._manager.wait_until_finished()
    self._manager.close()

  def latest(self) -> int | None:
    """Returns the newest saved update, or None."""
    return self._manager.latest_step()

  def best(self) -> int | None:
    """Returns the saved update with the lowest held-out bound, or None."""
    self._manager.wait_until_finished()
    step = self._manager.best_step()
    if step is None or not math.isfinite(_bound(self.metrics(step))):
      return self.latest()
    return step

  def metrics(self, step: int) -> dict[str, float]:
    """Returns what was saved beside a step."""
    self._manager.wait_until_finished()
    return self._manager.metrics(step)

  def save(self, state: TrainState, metrics: dict[str, float]) -> None:
    """Saves the state under its update; a step that is there is left alone.

    Args:
      state: what to save.
      metrics: numbers to keep beside it; `nelbo_per_token` decides which step
        is the best, and one without it never is.
    """
    step = int(state.step)
    if step == self.latest():
      return
    self._manager.save(
      step,
      args=ocp.args.PyTreeSave(state),
      metrics={_METRIC: math.inf, **metrics},
    )

  def restore(self, step: int, like: TrainState) -> TrainState:
    """Restores a step onto the shardings of `like` (an abstract state).

    Raises:
      UserError: the checkpoint is of another architecture or optimizer.
    """
    return self._restore(step, like)

  def restore_best_params(self, denoiser: Denoiser) -> tuple[int, Params]:
    """Returns the best step and its averaged parameters, on the current mesh.

    Raises:
      UserError: nothing was saved yet, or it is of another architecture.
    """
    step = self.best()
    if step is None:
      folder = epath.Path(self._manager.directory).parent
      raise UserError(f"workdir {folder} has no checkpoint yet")
    like = jax.eval_shape(denoiser.init, jax.random.key(0))
    return step, self.restore_ema_params(step, like)

  def restore_ema_params(self, step: int, like: Params) -> Params:
    """Restores only the averaged parameters of a step."""
    return self._restore(step, {"ema_params": like}, partial=True)["ema_params"]

  def _restore(self, step: int, like: Any, partial: bool = False) -> Any:
    self.check(step, like)
    like = jax.tree.map(_placed, like)
    return self._manager.restore(
      step,
      args=ocp.args.PyTreeRestore(
        like,
        restore_args=ocp.checkpoint_utils.construct_restore_args(like),
        partial_restore=partial,
      ),
    )

  def check(self, step: int, like: Any) -> None:
    """Says in one line what Orbax says in many, or casts in silence.

    Raises:
      UserError: the step is of another architecture or optimizer than `like`.
    """
    saved = _by_path(self._manager.item_metadata(step))
    for path, leaf in _by_path(like).items():
      found = saved.get(path)
      if found is None:
        raise UserError(f"checkpoint {step} has no {path}; use another workdir")
      if tuple(found.shape) != leaf.shape or found.dtype != leaf.dtype:
        raise UserError(
          f"checkpoint {step}: {path} is {found.dtype}{list(found.shape)}, the"
          f" config asks for {leaf.dtype}{list(leaf.shape)}; use another"
          " workdir"
        )


def _placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  """Puts an abstract leaf on the current mesh's devices, at its own spec."""
  # Constants of an abstract state, such as counters, have no sharding.
  spec = leaf.sharding.spec if leaf.sharding else jax.sharding.PartitionSpec()
  sharding = jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec)
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _bound(metrics: dict[str, float]) -> float:
  return metrics[_METRIC]


def _by_path(tree: Any) -> dict[str, Any]:
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
  return {name(path): leaf for path, leaf in flat}
