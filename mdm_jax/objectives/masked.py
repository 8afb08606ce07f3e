"""The masked diffusion objective: predict the masked tokens of a text.

Every row of an update draws a mask rate, that share of its tokens is masked,
and the model predicts them from the others. Rates are stratified over all rows
of the update (`corruption.stratified_uniforms`). `corruption.py` draws the
masks and bounds their number; `noise.py` has the distributions of rates.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data.batches import Batch
from mdm_jax.model.context import FULL, OPENING, Opening, row_context
from mdm_jax.objectives import corruption
from mdm_jax.objectives.base import Cost, Decoding, Examples, Ratio
from mdm_jax.objectives.bound import MaskedBound
from mdm_jax.objectives.config import MaskedConfig, MaskedStage, NoiseConfig
from mdm_jax.objectives.draws import Draws, Plan
from mdm_jax.objectives.noise import stage_rates

# The log averages cross-entropy over rows in this many equal bins of mask rate.
RATE_BINS = 10
_BIN_NAMES = tuple(
  f"mask_bins/ce_{i / RATE_BINS:.1f}-{(i + 1) / RATE_BINS:.1f}"
  for i in range(RATE_BINS)
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedExamples(Examples):
  """Examples whose asked positions are masked in the input.

  Attributes:
    answers: number of tokens per row that may be masked.
  """

  answers: Float[Array, "*A B"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Masked(MaskedBound):
  """Cross-entropy of masked tokens given the others; made by `build`.

  Attributes:
    weighting: `masked_ce` or `nelbo`, see `row_weights`.
    label_smoothing: see `cross_entropy.cross_entropy`; training only.
    length: tokens per row.
    capacity: maximum number of masked tokens per data shard and microbatch.
    most_segments: largest number of texts in a row; None if unknown.
    opening: share of the stage's updates during which attention opens.
  """

  weighting: str
  label_smoothing: float
  length: int
  capacity: int
  most_segments: int | None = None
  opening: float = 0.0

  tags: ClassVar[dict[str, tuple[str, ...]]] = {"mask_bins": _BIN_NAMES}

  def examples(self, batch: Batch, draws: Draws) -> MaskedExamples:
    """Masks each row at its own rate; see `Objective.examples`.

    Only tokens of the row's answer are masked, by default all that are real.
    """
    answer = batch.answer
    of_rates, keys = mask_keys(draws)
    u = corruption.stratified_uniforms(of_rates, draws.rows)
    # Padding rows have no answer: no rate masks any of their tokens.
    u = draws.spread(u, padding=1.0)
    rate = self.rates.rate(u)
    x0 = batch.tokens
    drawn = corruption.corrupt(keys, x0, answer, rate, self.mask)
    weight = row_weights(
      self.weighting, drawn.masked, answer, self.rates.inverse_density(u)
    )
    return MaskedExamples(
      tokens=drawn.xt,
      context=row_context(
        batch.segments,
        condition=rate,
        keys=draws.dropout(),
        most_segments=self.most_segments,
        **self._attention(draws),
      ),
      targets=x0,
      asked=drawn.masked,
      weights=jnp.broadcast_to(weight[..., None], x0.shape),
      capacity=self.capacity,
      answers=_count(answer),
    )

  def _attention(self, draws: Draws) -> dict[str, Any]:
    """Returns the fields of the context that say who attends to whom."""
    if not self.opening:
      return {}
    # As in Gong et al. 2024, arXiv 2410.17891: pairs are drawn anew in every
    # update. The first update is causal.
    share = jnp.minimum(draws.progress / self.opening, 1.0)
    return {
      "visibility": OPENING,
      "opening": Opening(
        draws.spread(jnp.broadcast_to(share, draws.rows)),
        draws.keys("opening"),
      ),
    }

  def summaries(
    self, examples: MaskedExamples, aux: Float[Array, "A B"]
  ) -> dict[str, Ratio]:
    """Returns the mask rate, and the mean CE of each bin of mask rates.

    While attention opens, also the share of later positions that are visible.
    """
    masked = _count(examples.asked)
    share = Ratio(masked.sum(), jnp.maximum(examples.answers.sum(), 1))
    bins = _by_rate(examples.context.condition, aux, masked)
    found = {"mask_rate": share, "mask_bins": bins}
    if (opening := examples.context.opening) is not None:
      found["attention_opened"] = Ratio(opening.share.max(), jnp.ones(()))
    return found

  def by_row(
    self, examples: MaskedExamples, aux: Float[Array, "A B"]
  ) -> dict[str, Array]:
    """Returns each row's mask rate, masked tokens and summed cross-entropy.

    The cross-entropy includes label smoothing, as the training loss does.
    """
    return {
      "mask_rate": examples.context.condition,
      "masked": examples.asked.sum(axis=-1),
      "cross_entropy": aux,
    }

  def cost(self) -> Cost:
    """Returns one call per row of full length, and the gather's capacity."""
    return Cost(
      reads=((self.length, self.length),),
      asked=self.capacity,
      visibility=OPENING if self.opening else FULL,
    )

  def decoding(self) -> Decoding:
    """Returns the order "any_order": any masked token can be drawn next."""
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
    config: weighting and label smoothing.
    stage: the range of mask rates, and the rehearsal share.
    noise: the noise schedule, used if the stage has no range of mask rates.
    vocabulary: gives the mask id.
    plan: sizes of the stage.

  Raises:
    UserError: the vocabulary has no mask token.
  """
  rates = stage_rates(stage, noise)
  return Masked(
    rates=rates,
    weighting=config.weighting,
    label_smoothing=config.label_smoothing,
    mask=vocabulary.need("mask"),
    length=plan.length,
    most_segments=plan.most_segments,
    opening=stage.opening,
    # Computed here and not in `examples`: a buffer's size must be a Python int,
    # and under `jit` there are only tracers.
    capacity=corruption.max_masked(
      *(rates, plan.rows, plan.most_asked, plan.shards, plan.accumulation)
    ),
  )


def mask_keys(draws: Draws) -> tuple[Key[Array, ""], Key[Array, "A B"]]:
  """Returns the key of an update's mask rates, and each row's key of its masks.

  Also those of block diffusion, which with one block per row is the same.
  """
  return draws.key("rate"), draws.keys("mask")


def row_weights(
  weighting: str,
  masked: Bool[Array, "*B L"],
  answer: Bool[Array, "*B L"],
  inverse_density: Float[Array, "*B"],
) -> Float[Array, "*B"]:
  """Returns the loss weight of each masked token, by row; see `rate_weights`.

  Args:
    weighting: "masked_ce" or "nelbo".
    masked: True at masked tokens.
    answer: True at tokens that may be masked.
    inverse_density: 1 / p(r) of each row's rate.
  """
  count, length = _count(masked), _count(answer)
  return rate_weights(weighting, count, length, inverse_density)


def rate_weights(
  weighting: str,
  count: Float[Array, "*N"],
  length: Float[Array, "*N"],
  inverse_density: Float[Array, "*N"],
) -> Float[Array, "*N"]:
  """Returns the loss weight of each token that is masked at a rate, by rate.

  `masked_ce`: the mean over all masked tokens of the update; weights sum to 1.
  `nelbo`: an unbiased estimate of the NELBO per token. A row, or a block, with
  n maskable tokens, k of them masked at a rate r drawn from the density p,
  contributes n / p(r) times the mean cross-entropy of the k, over the update's
  total n.

  Args:
    weighting: "masked_ce" or "nelbo".
    count: masked tokens k of each rate.
    length: tokens n that may be masked.
    inverse_density: 1 / p(r).
  """
  # Divisors of at least 1: padding rows have neither masked tokens nor any that
  # may be, and a whole update may have none.
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
  """Returns cross-entropy and masked tokens, summed per bin of mask rate."""
  number = jnp.ceil(rate * RATE_BINS).astype(jnp.int32) - 1
  number = jnp.clip(number, 0, RATE_BINS - 1)
  inside = number[None] == jnp.arange(RATE_BINS)[:, None, None]
  # `where`, not a product with the bins: 0 * NaN would spread a NaN row to all.
  total = lambda x: jnp.where(inside, x[None], 0.0).sum(axis=(1, 2))
  return Ratio(total(cross_entropy), total(masked))
