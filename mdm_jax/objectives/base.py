"""The interface of a training objective: `Objective`, and its data types.

`Objective.examples` builds the inputs, targets and loss weights of a whole
update, without the parameters. `Objective.loss` then computes the loss of one
microbatch at a time. Weights are normalized over the update before it is split,
so two microbatches of 8 rows give the same update as one of 16.

`training/step.py` treats the examples as an opaque pytree; logs, reports and
plans read only the names and costs that the objective returns.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from mdm_jax.data.batches import Batch
from mdm_jax.data.held_out import HeldOut
from mdm_jax.model.context import FULL, Context, Visibility
from mdm_jax.model.denoiser import Denoiser, Params
from mdm_jax.model.last_mlp import Unfinished
from mdm_jax.objectives import cross_entropy
from mdm_jax.objectives.draws import Draws
from mdm_jax.objectives.measured import Jobs, Measured, Nats, Part


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Examples:
  """Model inputs, targets and loss weights: what `score` needs.

  There may be more rows than in the batch (B), and longer ones (S). The leading
  axis A runs over microbatches; `Objective.loss` gets one without it.

  Attributes:
    tokens: input ids.
    context: segments, positions, visibility and condition of the input.
    targets: the id to predict at each position.
    asked: True at positions with a prediction; their weight may still be 0.
    weights: loss weight of each prediction, normalized over the whole update.
      Not read where `asked` is False.
    capacity: maximum number of asked positions per data shard and microbatch;
      the size of the gather buffer. Exceeding it makes the loss NaN.
  """

  tokens: Int[Array, "*A B S"]
  context: Context
  targets: Int[Array, "*A B S"]
  asked: Bool[Array, "*A B S"]
  weights: Float[Array, "*A B S"]
  capacity: int = dataclasses.field(metadata={"static": True})


class Ratio(NamedTuple):
  """A mean to log, as a total and a count.

  The log sums both over the updates since its last entry, then divides. Both
  are scalars, or both vectors whose entries are named by `Objective.tags`. An
  entry whose count is 0 is left out.
  """

  total: Float[Array, "*N"]
  count: Float[Array, "*N"]


@dataclasses.dataclass(frozen=True)
class Cost:
  """The size of a stage's computation, for FLOP counts and memory estimates.

  Attributes:
    reads: (queries, keys) per row, for each call of the model.
    asked: positions projected to the vocabulary, per data shard and microbatch.
    visibility: which positions attend to which, where that needs another
      attention kernel than bidirectional rows.
  """

  reads: tuple[tuple[int, int], ...]
  asked: int
  visibility: Visibility = FULL


@dataclasses.dataclass(frozen=True)
class Decoding:
  """How to sample from a model trained with an objective.

  Attributes:
    order: the orders in which tokens can be drawn.
    visibility: which positions attend to which.
    shift: True if the output at position i - 1 predicts the token at i.
    block: tokens per block, for the order "blocks".
    begin: id placed before the first token, if the model needs one.
  """

  order: Literal["any_order", "left_to_right", "blocks"]
  visibility: Visibility = FULL
  shift: bool = False
  block: int | None = None
  begin: int | None = None


class Objective(abc.ABC):
  """A training objective; one instance per stage, built outside `jit`.

  Attributes:
    headline: name of the held-out metric that selects the best checkpoint.
    tags: for each vector-valued summary, the log names of its entries. A scalar
      summary is logged as train/NAME.
    label_smoothing: see `cross_entropy.cross_entropy`; read by `loss`.
  """

  headline: ClassVar[str]
  tags: ClassVar[Mapping[str, tuple[str, ...]]] = {}
  label_smoothing: float = 0.0

  @abc.abstractmethod
  def examples(self, batch: Batch, draws: Draws) -> Any:
    """Builds the inputs, targets and weights of an update.

    Args:
      batch: rows [A, B, L].
      draws: the only source of randomness.

    Returns:
      A pytree, usually `Examples`, whose leaves have a leading axis A.
    """

  def loss(
    self, model: Denoiser, params: Params, part: Any
  ) -> tuple[Float[Array, ""], Any]:
    """Computes the loss of one microbatch.

    Args:
      model: the denoiser.
      params: its parameters.
      part: one microbatch of the result of `examples`.

    Returns:
      The microbatch's share of the update's loss, and an auxiliary pytree for
      `summaries` and `by_row`. Keep that small, e.g. sums per row: it is kept
      for all microbatches.
    """
    hidden = self.hidden(model, params, part)
    return score(model, params, part, hidden, self.label_smoothing)

  def hidden(
    self, model: Denoiser, params: Params, part: Any
  ) -> Float[Array, "B S D"] | Unfinished:
    """Returns the model's output for `Examples`, before the head.

    `loss` and `nats` score it, by `score` and `masked_cross_entropy`, which
    take it `Unfinished`, too. The default is one call of the model.

    Args:
      model: the denoiser.
      params: its parameters.
      part: one microbatch, or the result of `pose`.
    """
    return model.unfinished(params, part.tokens, part.context)

  def summaries(self, examples: Any, aux: Any) -> dict[str, Ratio]:
    """Returns the metrics to log for an update, by name.

    Args:
      examples: the whole update's, as returned by `examples`.
      aux: the auxiliary results of `loss`, stacked to leaves [A, ...].
    """
    del examples, aux
    return {}

  def by_row(self, examples: Any, aux: Any) -> dict[str, Array]:
    """Returns arrays [A, B] for the report of a non-finite or spiking update.

    Args:
      examples: as in `summaries`.
      aux: as in `summaries`.
    """
    del examples, aux
    return {}

  @abc.abstractmethod
  def cost(self) -> Cost:
    """Returns the size of this stage's computation."""

  @abc.abstractmethod
  def jobs(self, held: HeldOut, part: Part, draws: int) -> Jobs | None:
    """Returns the evaluation jobs for held-out rows, or None if there are none.

    Args:
      held: the rows.
      part: which measurement the jobs are for.
      draws: random draws per row.
    """

  @abc.abstractmethod
  def pose(
    self,
    batch: Batch,
    keys: Key[Array, "B"],
    given: Mapping[str, Array],
    capacity: int,
  ) -> Any:
    """Builds the inputs and targets of some evaluation jobs, inside `jit`.

    Args:
      batch: the jobs' rows [B, L].
      keys: one per job.
      given: these jobs' entries of `Jobs.given`.
      capacity: maximum number of asked positions per data shard.

    Returns:
      The input of `nats`, usually `Examples` without the leading axis.
    """

  def nats(
    self, model: Denoiser, params: Params, part: Any
  ) -> Float[Array, "B L"]:
    """Returns the cost in nats at every position of the batch's rows.

    It is kept per position so that the texts packed into a row can be scored
    separately. The default is weight * cross-entropy, without label smoothing.

    Args:
      model: the denoiser.
      params: its parameters.
      part: the result of `pose`.
    """
    hidden = self.hidden(model, params, part)
    losses = cross_entropy.masked_cross_entropy(
      model.logits,
      model.head(params),
      hidden,
      part.targets,
      part.asked,
      part.capacity,
      model.vocab,
    )
    # `where`, because a weight may be NaN where nothing is asked.
    return jnp.where(part.asked, part.weights * losses, 0)

  @abc.abstractmethod
  def values(
    self, part: Part, jobs: Jobs, nats: Nats, held: HeldOut
  ) -> Measured:
    """Reduces the costs of all jobs to metrics, on the host.

    Args:
      part: which measurement it is.
      jobs: the jobs, as returned by `jobs`.
      nats: their costs.
      held: the rows.
    """

  def also_measured(self) -> Mapping[str, "Objective"]:
    """Returns other objectives to evaluate the same model with, by name.

    Their metrics stand beside this one's, as NAME/METRIC.
    """
    return {}

  @abc.abstractmethod
  def decoding(self) -> Decoding:
    """Returns how to sample from a model trained with this objective."""


def score(
  model: Denoiser,
  params: Params,
  part: Examples,
  hidden: Float[Array, "B S D"] | Unfinished,
  label_smoothing: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, "B"]]:
  """Returns the weighted cross-entropy, and the unweighted sum of each row.

  Only asked positions are projected to the vocabulary. No gradient flows
  through the sums per row.

  Args:
    model: the denoiser.
    params: its parameters.
    part: one microbatch, without the leading axis.
    hidden: the model's output for `part`, before the head.
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
