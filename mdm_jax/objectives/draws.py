"""The sizes of a stage, and the random keys of its updates."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from mdm_jax.core import rng
from mdm_jax.core.sharding import RULES


@dataclasses.dataclass(frozen=True)
class Plan:
  """The sizes of a stage, known before it starts.

  Attributes:
    accumulation: microbatches per update.
    batch: rows per microbatch.
    length: tokens per row.
    shards: data shards per microbatch.
    most_asked: maximum number of tokens per row that may be predicted.
    most_segments: maximum number of texts packed into a row.
    start: the stage's first update.
    updates: number of its updates.
  """

  accumulation: int
  batch: int
  length: int
  shards: int
  most_asked: int
  most_segments: int
  start: int = 0
  updates: int = 1

  @property
  def rows(self) -> int:
    """Rows per update."""
    return self.accumulation * self.batch


class Draws:
  """Random keys of one update, by name.

  A key depends only on the run's seed, the update and the name; a row's key
  also on the row's index in the update. The number of devices and the split
  into microbatches change nothing.
  """

  def __init__(
    self,
    seed: int,
    step: Int[Array, ""] | int,
    plan: Plan,
    padded: int,
    scope: str = "",
  ):
    """Initializes the streams of one update.

    Args:
      seed: the run's seed.
      step: index of the update.
      plan: sizes of the stage.
      padded: rows per microbatch, including padding that makes the shards
        equally large.
      scope: prefix of every name.
    """
    self._seed, self._step, self._scope = seed, step, scope
    self._plan, self._padded = plan, padded

  @property
  def rows(self) -> int:
    """Rows of the update, without padding."""
    return self._plan.rows

  @property
  def progress(self) -> Float[Array, ""]:
    """Share of the stage's updates that came before this one."""
    done = jnp.asarray(self._step - self._plan.start, jnp.float32)
    return done / self._plan.updates

  def key(self, name: str) -> Key[Array, ""]:
    """Returns the update's key for this name."""
    return rng.stream(self._seed, self._scope + name, self._step)

  def keys(self, name: str) -> Key[Array, "A B"]:
    """Returns one key per row."""
    # Padding rows share the index after the last row, never a real row's key.
    rows = self._grid(jnp.arange(self.rows), self.rows)
    return _over_shards(rng.per_row(self.key(name), rows))

  def dropout(self) -> Key[Array, "A B"]:
    """Returns one key per row for `Context.keys`: the model's dropout."""
    return self.keys("dropout")

  def spread(
    self, values: Float[Array, "N"], padding: float = 0.0
  ) -> Float[Array, "A B"]:
    """Arranges per-row values as [microbatch, row], sharded like the batch.

    Args:
      values: one per row of the update.
      padding: the value of padding rows.
    """
    return _over_shards(self._grid(values, padding))

  def scope(self, prefix: str) -> "Draws":
    """Returns draws for an objective nested inside this one.

    Two nested objectives without scopes would share keys, and so mask the same
    tokens and drop the same units.
    """
    inner = f"{self._scope}{prefix}/"
    return Draws(self._seed, self._step, self._plan, self._padded, inner)

  def _grid(self, values: Array, padding: int | float) -> Array:
    grid = self._plan.accumulation, self._plan.batch
    missing = (0, 0), (0, self._padded - self._plan.batch)
    return jnp.pad(values.reshape(grid), missing, constant_values=padding)


def _over_shards(rows: Array) -> Array:
  # With Explicit axes, what meets the batch must be sharded like it.
  return jax.reshard(rows, RULES.spec(None, "batch"))
