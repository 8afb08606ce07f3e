"""The autoregressive objective: predict each token from those before it.

The input is each text shifted right by one behind the begin id, so rows keep
their length, the output at a position predicts the token at that position, and
the first token is paid for too. The likelihood is exact, in one call per row.

In training, a share of the input tokens may be masked (`input_mask_rate`): this
explains much of what masked diffusion gains over plain autoregression on little
data (arXiv 2510.04071). The targets stay the same, and so does the evaluation.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from mdm_jax.core import rng
from mdm_jax.core.standard_errors import ratio
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data.batches import Batch
from mdm_jax.data.held_out import DOCUMENT, ROW, SEGMENT, HeldOut
from mdm_jax.model.context import CAUSAL, row_context, starts
from mdm_jax.objectives import corruption
from mdm_jax.objectives.base import Cost, Decoding, Examples, Objective, Ratio
from mdm_jax.objectives.bound import row_lengths, text_lengths
from mdm_jax.objectives.config import (
  AutoregressiveConfig,
  AutoregressiveStage,
  NoiseConfig,
)
from mdm_jax.objectives.draws import Draws, Plan
from mdm_jax.objectives.measured import (
  SEED,
  Jobs,
  Measured,
  Nats,
  Part,
  likelihood,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Autoregressive(Objective):
  """Cross-entropy of each token given those before it; made by `build`.

  Attributes:
    begin: id that stands before the first token of every text.
    length: tokens per row.
    capacity: maximum number of predicted tokens per data shard and microbatch.
    label_smoothing: see `cross_entropy.cross_entropy`; training only.
    most_segments: largest number of texts in a row; None if unknown.
    input_rates: range of a row's share of masked input tokens, in training.
    mask: id of the mask token; None if no input is masked.
  """

  begin: int
  length: int
  capacity: int
  label_smoothing: float = 0.0
  most_segments: int | None = None
  input_rates: tuple[float, float] = (0.0, 0.0)
  mask: int | None = None

  headline: ClassVar[str] = "nll_per_token"

  def examples(self, batch: Batch, draws: Draws) -> Examples:
    """Asks for every token of the rows' answers, all with equal weights.

    By default the answer is the whole text; see `Objective.examples`.
    """
    asked = batch.answer
    # At least 1: a whole update may have nothing to predict.
    weight = 1 / jnp.maximum(asked.sum(), 1).astype(jnp.float32)
    # Masked before the shift, so that the begin id never is.
    tokens = self._masked(batch, draws)
    return Examples(
      tokens=shifted(tokens, batch.segments, self.begin),
      context=row_context(
        batch.segments,
        visibility=CAUSAL,
        keys=draws.dropout(),
        most_segments=self.most_segments,
      ),
      targets=batch.tokens,
      asked=asked,
      weights=jnp.ones_like(batch.tokens, jnp.float32) * weight,
      capacity=self.capacity,
    )

  def _masked(self, batch: Batch, draws: Draws) -> Int[Array, "A B L"]:
    """Returns the tokens, with each row's share of its answer masked."""
    if self.mask is None:
      return batch.tokens
    low, high = self.input_rates
    key = draws.key("input_mask_rate")
    u = corruption.stratified_uniforms(key, draws.rows)
    rate = draws.spread(low + (high - low) * u)
    keys = draws.keys("input_mask")
    return corruption.corrupt(
      *(keys, batch.tokens, batch.answer, rate, self.mask)
    ).xt

  def summaries(
    self, examples: Examples, aux: Float[Array, "A B"]
  ) -> dict[str, Ratio]:
    """Returns the share of masked inputs, if any are."""
    if self.mask is None:
      return {}
    segments = examples.context.segments
    # Of a text's inputs, the begin id is no token of it.
    inputs = (segments > 0) & ~starts(segments)
    count = lambda x: x.sum().astype(jnp.float32)
    masked = count(inputs & (examples.tokens == self.mask))
    return {"input_mask_rate": Ratio(masked, jnp.maximum(count(inputs), 1))}

  def by_row(
    self, examples: Examples, aux: Float[Array, "A B"]
  ) -> dict[str, Array]:
    """Returns each row's predicted tokens and summed cross-entropy."""
    return {"predicted": examples.asked.sum(axis=-1), "cross_entropy": aux}

  def cost(self) -> Cost:
    """Returns one call per row, and the gather's capacity."""
    return Cost(reads=((self.length, self.length),), asked=self.capacity)

  def decoding(self) -> Decoding:
    """Returns the order "left_to_right", with this objective's begin id."""
    return Decoding("left_to_right", CAUSAL, begin=self.begin)

  # MARK: evaluation

  def jobs(self, held: HeldOut, part: Part, draws: int) -> Jobs | None:
    """Returns one job per row: nothing is random, so `draws` is not read."""
    if part != "likelihood":
      return None
    rows = np.arange(len(held))
    return Jobs(rng.stream(SEED, "nll"), rows, 0 * rows, row_lengths(held))

  def pose(
    self,
    batch: Batch,
    keys: Key[Array, "B"],
    given: Mapping[str, Array],
    capacity: int,
  ) -> Examples:
    """Asks for every token of the rows' answers; each has weight 1."""
    del keys, given
    return Examples(
      tokens=shifted(batch.tokens, batch.segments, self.begin),
      context=row_context(batch.segments, visibility=CAUSAL),
      targets=batch.tokens,
      asked=batch.answer,
      weights=jnp.ones_like(batch.tokens, jnp.float32),
      capacity=capacity,
    )

  def values(
    self, part: Part, jobs: Jobs, nats: Nats, held: HeldOut
  ) -> Measured:
    """Returns the exact likelihood, with a standard error over documents."""
    row, segment = held.texts[:, ROW], held.texts[:, SEGMENT]
    # Segments count from 1; 0 is padding.
    by_text = nats.by_text[row, segment - 1]
    all_asked = "answer" not in held.rows.fields
    found = likelihood(
      "nll",
      "NLL",
      total_nats=float(nats.by_row.sum(dtype=np.float64)),
      tokens=int(jobs.asked.sum()),
      # `num_bytes` counts whole texts, so it is unknown for a subset of tokens.
      num_bytes=held.num_bytes if all_asked else None,
      stderr=ratio(by_text, text_lengths(held), held.texts[:, DOCUMENT]).stderr,
      exact=True,
    )
    return Measured(found, headline=self.headline)


def build(
  config: AutoregressiveConfig,
  stage: AutoregressiveStage,
  noise: NoiseConfig,
  vocabulary: Vocabulary,
  plan: Plan,
) -> Autoregressive:
  """Returns the autoregressive objective of a stage.

  Args:
    config: label smoothing, and the share of masked inputs.
    stage: not read.
    noise: not read; the config's check lets only its defaults through.
    vocabulary: gives the begin id, or else the end-of-text id in its place.
    plan: sizes of the stage.

  Raises:
    UserError: the vocabulary has neither, or inputs are to be masked and it has
      no mask token.
  """
  del stage, noise
  rates = config.input_mask_rate
  begin = vocabulary.begin
  return Autoregressive(
    begin=vocabulary.need("end") if begin is None else begin,
    length=plan.length,
    capacity=-(-plan.batch // plan.shards) * plan.most_asked,
    label_smoothing=config.label_smoothing,
    most_segments=plan.most_segments,
    input_rates=rates,
    # None also keeps the program that of a plain model, to the bit.
    mask=vocabulary.need("mask") if rates[1] else None,
  )


def shifted(
  tokens: Int[Array, "*A S"], segments: Int[Array, "*A S"], begin: int
) -> Int[Array, "*A S"]:
  """Returns each text shifted right by one, behind the begin id.

  The last token of a text is not among them: nothing comes after it.
  """
  first: Bool[Array, "*A S"] = starts(segments)
  sides = [(0, 0)] * (tokens.ndim - 1) + [(1, 0)]
  return jnp.where(first, begin, jnp.pad(tokens, sides)[..., :-1])
