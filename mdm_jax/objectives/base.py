"""What an objective is: the questions of an update, and their score.

An objective first poses the questions of a whole update, which no parameter
enters: what the model reads, what each position may see, what is asked where,
and what every answer weighs. Then it scores one microbatch at a time with the
model in hand. The weights are made first, so that they can belong to the whole
update: two microbatches of 8 rows give the update of one of 16.

`training/step.py` never looks inside the questions; logs, reports and plans
read the names and the costs that an objective gives.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from mdm_jax.core import rng
from mdm_jax.core.sharding import RULES
from mdm_jax.data.batches import Batch
from mdm_jax.data.held_out import HeldOut
from mdm_jax.model.context import FULL, Context, Visibility
from mdm_jax.model.denoiser import Denoiser, Params
from mdm_jax.objectives import cross_entropy
from mdm_jax.objectives.measured import (
  Jobs,
  Measured,
  Nats,
  Part,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Examples:
  """The usual questions: what is read, and which tokens are asked where.

  Rows may be longer or more than the batch's. A leading axis is there for all
  microbatches, and gone for the one that is scored.

  Attributes:
    tokens: what the model reads.
    context: what it is told beside them.
    targets: the token that position i is asked for.
    asked: where something is asked. A weight may be 0 there.
    weights: of each answer; what is asked in the whole update sums to 1. Read
      at no other position.
    capacity: positions that one data shard is asked for in one microbatch, at
      most. More of them make the loss NaN.
  """

  tokens: Int[Array, "*A B S"]
  context: Context
  targets: Int[Array, "*A B S"]
  asked: Bool[Array, "*A B S"]
  weights: Float[Array, "*A B S"]
  capacity: int = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is known of a stage before it begins.

  Attributes:
    accumulation: microbatches an update.
    batch: rows a microbatch.
    length: tokens a row.
    shards: data shards that a microbatch is split into.
    most_asked: tokens of a row that may be asked for, at most.
    most_segments: texts in a row, at most.
  """

  accumulation: int
  batch: int
  length: int
  shards: int
  most_asked: int
  most_segments: int

  @property
  def rows(self) -> int:
    """Rows of an update."""
    return self.accumulation * self.batch


class Ratio(NamedTuple):
  """A total and what it is divided by, summed over the updates of a point.

  Both are numbers, or both vectors, of which each entry is logged under a name
  of its own (`Objective.tags`); where the count is 0 nothing is.
  """

  total: Float[Array, "*N"]
  count: Float[Array, "*N"]


@dataclasses.dataclass(frozen=True)
class Cost:
  """What a stage's rows cost.

  Attributes:
    reads: for every call of the model, how many positions of a row it computes
      and how many these attend to.
    asked: positions that go through the vocabulary in one data shard and one
      microbatch.
  """

  reads: tuple[tuple[int, int], ...]
  asked: int


@dataclasses.dataclass(frozen=True)
class Decoding:
  """How a model that was trained so can be sampled from.

  Attributes:
    order: in which tokens can be drawn.
    visibility: what a position may see.
    shift: whether position i is answered by the output before it.
    block: tokens of a block, where they are drawn block by block.
    begin: id in front of the first token, if the model needs one.
  """

  order: Literal["any_order", "left_to_right", "blocks"]
  visibility: Visibility = FULL
  shift: bool = False
  block: int | None = None
  begin: int | None = None


class Draws:
  """The randomness of one update, by name.

  What is drawn depends on the run, the update and the name alone, and for a
  single row on the row's number in the update: not on devices, nor on how many
  microbatches the rows are split into.
  """

  def __init__(
    self,
    seed: int,
    step: Int[Array, ""] | int,
    plan: Plan,
    padded: int,
    scope: str = "",
  ):
    """Names the update.

    Args:
      seed: of the run.
      step: the update's number.
      plan: of the stage.
      padded: rows of a microbatch with those that only fill up the shards.
      scope: comes before every name.
    """
    self._seed, self._step, self._scope = seed, step, scope
    self._plan, self._padded = plan, padded

  @property
  def rows(self) -> int:
    """Rows of the update."""
    return self._plan.rows

  def key(self, name: str) -> Key[Array, ""]:
    """Returns the update's key of this name."""
    return rng.stream(self._seed, self._scope + name, self._step)

  def keys(self, name: str) -> Key[Array, "A B"]:
    """Returns a key for every row."""
    # Padding is numbered behind all rows, so that it takes no other's key.
    rows = self._grid(jnp.arange(self.rows), self.rows)
    return _over_shards(rng.per_row(self.key(name), rows))

  def spread(
    self, values: Float[Array, "N"], padding: float = 0.0
  ) -> Float[Array, "A B"]:
    """Gives every row its value, in the order of the rows' numbers.

    Args:
      values: one for each row of the update.
      padding: for rows that only fill up the shards.
    """
    return _over_shards(self._grid(values, padding))

  def scope(self, prefix: str) -> "Draws":
    """Returns the draws for an objective within this one.

    Without a scope two of them would drop out the same units, and mask the
    same tokens.
    """
    inner = f"{self._scope}{prefix}/"
    return Draws(self._seed, self._step, self._plan, self._padded, inner)

  def _grid(self, values: Array, padding: int | float) -> Array:
    grid = self._plan.accumulation, self._plan.batch
    missing = (0, 0), (0, self._padded - self._plan.batch)
    return jnp.pad(values.reshape(grid), missing, constant_values=padding)


def _over_shards(rows: Array) -> Array:
  return jax.reshard(rows, RULES.spec(None, "batch"))


class Objective(abc.ABC):
  """What a model is trained on: one instance a stage, built outside `jit`.

  Attributes:
    headline: name of the held-out number that the best checkpoint has least of.
    tags: by the name of a summary that is a vector, what its entries are logged
      as. A summary that is a number is logged as train/NAME.
    label_smoothing: see `cross_entropy.cross_entropy`; read by `loss`.
  """

  headline: ClassVar[str]
  tags: ClassVar[Mapping[str, tuple[str, ...]]] = {}
  label_smoothing: float = 0.0

  @abc.abstractmethod
  def examples(self, batch: Batch, draws: Draws) -> Any:
    """Poses the questions of an update, without looking at any parameter.

    Args:
      batch: rows [A, B, L].
      draws: all randomness that the questions need.

    Returns:
      A pytree, usually `Examples`. Its leaves are [A, ...], one entry for every
      microbatch.
    """

  def loss(
    self, model: Denoiser, params: Params, part: Any
  ) -> tuple[Float[Array, ""], Any]:
    """Scores one microbatch.

    Args:
      model: the denoiser.
      params: its parameters.
      part: `examples` of the microbatch.

    Returns:
      The microbatch's share of the update's loss, and what `summaries` and
      `by_row` need of it, which should be small: sums by row.
    """
    hidden = model.hidden(params, part.tokens, part.context)
    return score(model, params, part, hidden, self.label_smoothing)

  def summaries(self, examples: Any, aux: Any) -> dict[str, Ratio]:
    """Returns what to log of an update.

    Args:
      examples: of the whole update.
      aux: what `loss` returned beside the loss; its leaves are [A, ...].
    """
    del examples, aux
    return {}

  def by_row(self, examples: Any, aux: Any) -> dict[str, Array]:
    """Returns columns [A, B] for the report of an update that failed.

    Args:
      examples: of the whole update.
      aux: as in `summaries`.
    """
    del examples, aux
    return {}

  @abc.abstractmethod
  def cost(self) -> Cost:
    """Returns what the rows of this stage cost."""

  @abc.abstractmethod
  def jobs(self, held: HeldOut, part: Part, draws: int) -> Jobs | None:
    """Returns what to ask of held-out rows; None if nothing is of this part.

    Args:
      held: the rows.
      part: what it is for.
      draws: times that each row is asked, for what is drawn at random.
    """

  @abc.abstractmethod
  def pose(
    self,
    batch: Batch,
    keys: Key[Array, "B"],
    given: Mapping[str, Array],
    capacity: int,
  ) -> Any:
    """Poses the questions of some jobs, inside `jit`.

    Args:
      batch: their rows [B, L].
      keys: of each job.
      given: as in the jobs.
      capacity: positions that one data shard is asked for, at most.

    Returns:
      What `nats` takes, usually `Examples` without a leading axis.
    """

  def nats(
    self, model: Denoiser, params: Params, part: Any
  ) -> Float[Array, "B L"]:
    """Returns what the answers cost at every position of the batch's rows.

    By position, so that texts of a row can be told apart. Here: weight times
    cross-entropy, unsmoothed.

    Args:
      model: the denoiser.
      params: its parameters.
      part: what `pose` returned.
    """
    hidden = model.hidden(params, part.tokens, part.context)
    losses = cross_entropy.masked_cross_entropy(
      model.logits,
      model.head(params),
      hidden,
      part.targets,
      part.asked,
      part.capacity,
      model.vocab,
    )
    return jnp.where(part.asked, part.weights * losses, 0)

  @abc.abstractmethod
  def values(
    self, part: Part, jobs: Jobs, nats: Nats, held: HeldOut
  ) -> Measured:
    """Returns what the answers come to; on the host.

    Args:
      part: what was asked for.
      jobs: what was asked.
      nats: what the answers cost.
      held: the rows.
    """

  @abc.abstractmethod
  def decoding(self) -> Decoding:
    """Returns how a model that was trained so can be sampled from."""


def score(
  model: Denoiser,
  params: Params,
  part: Examples,
  hidden: Float[Array, "B S D"],
  label_smoothing: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, "B"]]:
  """Returns the weighted cross-entropy of what is asked, and its sum by row.

  Only asked positions go through the vocabulary. The sums by row are not
  weighted, and no gradient comes back by way of them.

  Args:
    model: the denoiser.
    params: its parameters.
    part: the questions of one microbatch.
    hidden: what the model made of them.
    label_smoothing: see `cross_entropy.cross_entropy`.
  """
  loss, by_position = cross_entropy.masked_loss(
    model.logits,
    model.head(params),
    hidden,
    part.targets,
    part.asked,
    part.weights,
    part.capacity,
    model.vocab,
    label_smoothing,
  )
  return loss, by_position.sum(axis=1)
