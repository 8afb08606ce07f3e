"""The masked objective: given a text with holes, what stood in them?

Every row of an update draws a mask rate, loses that share of its tokens and is
asked for them. Rates are systematic samples over all rows of the update
(`corruption.stratified_uniforms`); what is lost and how many at most is in
`corruption.py`, which rates a stage draws in `noise.py`.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data.batches import Batch
from mdm_jax.model.context import row_context
from mdm_jax.objectives import corruption
from mdm_jax.objectives.base import (
  Cost,
  Decoding,
  Draws,
  Examples,
  Plan,
  Ratio,
)
from mdm_jax.objectives.bound import MaskedBound
from mdm_jax.objectives.config import MaskedConfig, MaskedStage, NoiseConfig
from mdm_jax.objectives.noise import stage_rates

# Equal bins of a row's mask rate, in (0, 1].
RATE_BINS = 10
_BIN_NAMES = tuple(
  f"mask_bins/ce_{i / RATE_BINS:.1f}-{(i + 1) / RATE_BINS:.1f}"
  for i in range(RATE_BINS)
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedExamples(Examples):
  """What is read with holes, and asked where they are.

  Attributes:
    answers: tokens of each row that may be asked for.
  """

  answers: Float[Array, "*A B"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Masked(MaskedBound):
  """Cross-entropy of masked tokens given the others; see `build`.

  Attributes:
    weighting: `masked_ce` or `nelbo`, see `row_weights`.
    label_smoothing: of the targets.
    length: tokens a row.
    capacity: masked tokens of one data shard in one microbatch, at most.
  """

  weighting: str
  label_smoothing: float
  length: int
  capacity: int

  tags: ClassVar[dict[str, tuple[str, ...]]] = {"mask_bins": _BIN_NAMES}

  def examples(self, batch: Batch, draws: Draws) -> MaskedExamples:
    """Masks each row's answer at a rate of its own, and asks for the masked."""
    answer = batch.answer
    u = corruption.stratified_uniforms(draws.key("rate"), draws.rows)
    u = draws.spread(u, padding=1.0)
    rate = self.rates.rate(u)
    x0 = batch.tokens
    drawn = corruption.corrupt(draws.keys("mask"), x0, answer, rate, self.mask)
    weight = row_weights(
      self.weighting, drawn.masked, answer, self.rates.inverse_density(u)
    )
    return MaskedExamples(
      tokens=drawn.xt,
      context=row_context(
        batch.segments, condition=rate, keys=draws.keys("dropout")
      ),
      targets=x0,
      asked=drawn.masked,
      weights=jnp.broadcast_to(weight[..., None], x0.shape),
      capacity=self.capacity,
      answers=_count(answer),
    )

  def summaries(
    self, examples: MaskedExamples, aux: Float[Array, "A B"]
  ) -> dict[str, Ratio]:
    """Returns the share masked, and cross-entropy per masked token by rate."""
    masked = _count(examples.asked)
    share = Ratio(masked.sum(), jnp.maximum(examples.answers.sum(), 1))
    bins = _by_rate(examples.context.condition, aux, masked)
    return {"mask_rate": share, "mask_bins": bins}

  def by_row(
    self, examples: MaskedExamples, aux: Float[Array, "A B"]
  ) -> dict[str, Array]:
    """Returns each row's mask rate, masked tokens and sum of cross-entropy.

    The cross-entropy is the one that is trained: smoothed, if targets are.
    """
    return {
      "mask_rate": examples.context.condition,
      "masked": examples.asked.sum(axis=-1),
      "cross_entropy": aux,
    }

  def cost(self) -> Cost:
    """Returns one call over the whole row, and the buffer of masked tokens."""
    return Cost(reads=((self.length, self.length),), asked=self.capacity)

  def decoding(self) -> Decoding:
    """Returns that any token can be drawn next."""
    return Decoding("any_order")


def build(
  config: MaskedConfig,
  stage: MaskedStage,
  noise: NoiseConfig,
  vocabulary: Vocabulary,
  plan: Plan,
) -> Masked:
  """Returns the masked objective of a stage.

  Args:
    config: weighting and smoothing.
    stage: range of mask rates and rehearsal.
    noise: the schedule that rates come from where the stage has no range.
    vocabulary: what the ids are.
    plan: how many rows of what length an update has.

  Raises:
    UserError: the vocabulary has no mask.
  """
  rates = stage_rates(stage, noise)
  return Masked(
    rates=rates,
    weighting=config.weighting,
    label_smoothing=config.label_smoothing,
    mask=vocabulary.need("mask"),
    length=plan.length,
    # Here, because it needs values: inside a trace there are none.
    capacity=corruption.max_masked(
      *(rates, plan.rows, plan.most_asked, plan.shards, plan.accumulation)
    ),
  )


def row_weights(
  weighting: str,
  masked: Bool[Array, "*B L"],
  answer: Bool[Array, "*B L"],
  inverse_density: Float[Array, "*B"],
) -> Float[Array, "*B"]:
  """Returns what each masked token of a row weighs; all rows together sum to 1.

  `masked_ce`: the mean over masked tokens, every one weighing the same.
  `nelbo`: the bound per token. For a row of n tokens that may be asked, k of
  them masked, with a rate drawn from the density p, the estimate of its bound
  is n / p(r) times the mean cross-entropy of the k.
  """
  count, length = _count(masked), _count(answer)
  match weighting:
    case "masked_ce":
      return jnp.ones_like(count) / jnp.maximum(count.sum(), 1)
    case "nelbo":
      share = length / jnp.maximum(length.sum(), 1)
      return share * inverse_density / jnp.maximum(count, 1)


def _count(where: Bool[Array, "*B L"]) -> Float[Array, "*B"]:
  return where.sum(axis=-1).astype(jnp.float32)


def _by_rate(
  rate: Float[Array, "A B"],
  cross_entropy: Float[Array, "A B"],
  masked: Float[Array, "A B"],
) -> Ratio:
  """Sums cross-entropy and masked tokens over rows of about one mask rate."""
  number = jnp.ceil(rate * RATE_BINS).astype(jnp.int32) - 1
  number = jnp.clip(number, 0, RATE_BINS - 1)
  inside = number[None] == jnp.arange(RATE_BINS)[:, None, None]
  # Chosen, not multiplied: a row that is NaN is so in its own bin only.
  total = lambda x: jnp.where(inside, x[None], 0.0).sum(axis=(1, 2))
  return Ratio(total(cross_entropy), total(masked))
