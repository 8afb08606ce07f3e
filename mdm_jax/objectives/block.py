"""Block diffusion: predict the masked tokens of a block after clean blocks.

A text is cut into blocks of S tokens from its start. Blocks follow each other
as in autoregression; within a block, tokens are masked and predicted as in
masked diffusion (Arriola et al. 2025, arXiv 2503.09573):

  NELBO = sum over blocks b of E_r[ n_b mean CE of b's masked tokens ],

where r ~ U(0, 1) is drawn for each block, n_b is the number of its tokens, and
its masked tokens are predicted from its other tokens and the clean blocks
before it. With S = 1 this is the exact likelihood of an autoregressive model;
with a single block it is the bound of masked diffusion. With shifted outputs
and S = 1 it is next-token prediction: a causal model as it is. So blocks grow
from such a model, stage by stage.

Keys and values of clean blocks depend on clean blocks only. So clean text is
read once, and the masked blocks attend to its keys and values.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data.batches import Batch
from mdm_jax.data.held_out import HeldOut
from mdm_jax.model.context import Context, Visibility, row_context, starts
from mdm_jax.model.denoiser import Denoiser, Params
from mdm_jax.objectives import block_masks, corruption
from mdm_jax.objectives.base import Cost, Decoding, Examples, Ratio
from mdm_jax.objectives.bound import MaskedBound, row_lengths
from mdm_jax.objectives.config import BlockConfig, BlockStage, NoiseConfig
from mdm_jax.objectives.draws import Draws, Plan
from mdm_jax.objectives.masked import mask_keys, rate_weights
from mdm_jax.objectives.measured import Jobs, Part
from mdm_jax.objectives.noise import stage_rates


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockExamples(Examples):
  """Examples whose asked positions are masked in the input.

  The clean text is `targets`.

  Attributes:
    answers: number of tokens per row that may be masked.
    clean_keys: dropout keys of the clean pass; None disables dropout.
  """

  answers: Float[Array, "*A B"]
  clean_keys: Key[Array, "*A B"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block(MaskedBound):
  """Cross-entropy of a block's masked tokens; made by `build`.

  Attributes:
    block: tokens per block.
    passes: "two" or "one", see `BlockConfig`.
    weighting: `masked_ce` or `nelbo`, see `masked.rate_weights`.
    label_smoothing: see `cross_entropy.cross_entropy`; training only.
    length: tokens per row.
    capacity: maximum number of masked tokens per data shard and microbatch.
    most_segments: largest number of texts in a row.
  """

  block: int
  passes: str
  weighting: str
  label_smoothing: float
  length: int
  capacity: int
  most_segments: int

  # MARK: training

  def examples(self, batch: Batch, draws: Draws) -> BlockExamples:
    """Masks each block at its own rate; see `Objective.examples`."""
    rows, blocks = draws.rows, self._most_blocks
    of_rates, keys = mask_keys(draws)
    u = block_masks.row_uniforms(of_rates, rows, blocks)
    # Padding rows have no answer: no rate masks any of their tokens.
    u = draws.spread(u, padding=1.0)
    u = block_masks.by_block(u, block_masks.lattice(rows, blocks))
    drawn = block_masks.corrupt(
      keys, batch, self.rates.rate(u), self.block, self.mask
    )
    weights = rate_weights(
      *(self.weighting, drawn.counts, drawn.lengths),
      self.rates.inverse_density(u),
    )
    return BlockExamples(
      tokens=drawn.xt,
      context=row_context(
        batch.segments,
        visibility=self._visibility("noisy"),
        keys=draws.dropout(),
        most_segments=self.most_segments,
      ),
      targets=batch.tokens,
      asked=drawn.masked,
      weights=drawn.at_tokens(weights),
      capacity=self.capacity,
      answers=drawn.lengths.sum(axis=-1),
      # Others than those of the masked blocks, which are other inputs.
      clean_keys=draws.keys("clean_dropout"),
    )

  def hidden(
    self, model: Denoiser, params: Params, part: BlockExamples
  ) -> Float[Array, "B L D"]:
    """Returns the output at the masked blocks, which attend to clean ones."""
    noisy, x0 = part.context, part.targets
    if self.block >= self.length:  # no text has a block before another
      return model.hidden(params, part.tokens, noisy)
    clean = dataclasses.replace(
      noisy, visibility=self._visibility("blocks"), keys=part.clean_keys
    )
    if self.passes == "two":
      clean = dataclasses.replace(clean, keep=True)
      of_clean, cache = model.hidden(params, x0, clean)
      noisy = dataclasses.replace(noisy, cache=cache)
      of_noisy = model.hidden(params, part.tokens, noisy)
    else:
      both = jnp.concatenate([part.tokens, x0], axis=1)
      both = model.hidden(params, both, self._side_by_side(noisy))
      of_noisy, of_clean = jnp.split(both, 2, axis=1)
    if not model.config.shift_outputs:
      return of_noisy
    return self._first_from_clean(noisy.segments, of_noisy, of_clean)

  def _first_from_clean(
    self,
    segments: Int[Array, "B L"],
    of_noisy: Float[Array, "B L D"],
    of_clean: Float[Array, "B L D"],
  ) -> Float[Array, "B L D"]:
    """Returns shifted outputs: a block's first token from the clean one before.

    The masked block before it is not what a sampler has there. So blocks of one
    token are next-token prediction. A text's first token has none before it.
    """
    first = block_masks.block_starts(segments, self.block) & ~starts(segments)
    return jnp.where(first[..., None], of_clean, of_noisy)

  def _side_by_side(self, noisy: Context) -> Context:
    """Returns the context of masked blocks followed by the clean text."""
    twice = lambda x: jnp.concatenate([x, x], axis=1)
    here = noisy.segments >= 0  # everywhere, sharded as the rows are
    return Context(
      twice(noisy.segments),
      twice(noisy.positions),
      self._visibility("dual"),
      noisy=jnp.concatenate([here, ~here], axis=1),
      keys=noisy.keys,
    )

  @property
  def _most_blocks(self) -> int:
    sizes = self.length, self.block, self.most_segments
    return block_masks.most_blocks(*sizes)

  def _visibility(self, kind: str) -> Visibility:
    return Visibility(kind, self.block)

  def summaries(
    self, examples: BlockExamples, aux: Float[Array, "A B"]
  ) -> dict[str, Ratio]:
    """Returns the share of masked tokens."""
    masked = examples.asked.sum().astype(jnp.float32)
    return {"mask_rate": Ratio(masked, jnp.maximum(examples.answers.sum(), 1))}

  def by_row(
    self, examples: BlockExamples, aux: Float[Array, "A B"]
  ) -> dict[str, Array]:
    """Returns each row's masked tokens and summed cross-entropy."""
    return {"masked": examples.asked.sum(axis=-1), "cross_entropy": aux}

  def cost(self) -> Cost:
    """Returns the clean and the masked call, and the gather's capacity."""
    n = self.length
    if self.block >= n:
      reads = ((n, n),)
    elif self.passes == "two":
      reads = ((n, n), (n, 2 * n))
    else:
      reads = ((2 * n, 2 * n),)
    return Cost(reads, asked=self.capacity)

  def decoding(self) -> Decoding:
    """Returns the order "blocks": left to right, in any order within one."""
    return Decoding("blocks", self._visibility("blocks"), block=self.block)

  # MARK: evaluation

  def jobs(self, held: HeldOut, part: Part, draws: int) -> Jobs:
    """Returns one job per row and draw, with a mask rate for each block.

    The rates of a block are stratified over its draws. With one block per row,
    they are those of the masked objective.
    """
    rows = len(held)
    lengths = block_masks.lengths(held, self.block)  # [rows, blocks]
    u, key = self._uniforms(part, rows, draws)
    count = u.shape[1]  # draws of a row
    # A shift keeps a block's draws stratified; each block has another one.
    number = np.arange(lengths.shape[1])
    shifts = (number + block_masks.van_der_corput(len(number))) / count % 1
    shifts = np.float32(0 * shifts if part == "curves" else shifts)
    u = block_masks.by_block(jnp.asarray(u), shifts)
    rates = self._rates(part, np.asarray(u))
    which = np.repeat(np.arange(rows), count)
    rates = rates.reshape(len(which), -1)
    # Compiled as the masked objective's, whose rounding is the same then.
    asked = np.asarray(jax.jit(corruption.num_masked)(rates, lengths[which]))
    numbers = np.arange(len(which))
    return Jobs(key, which, numbers, asked.sum(axis=1), {"rate": rates})

  def pose(
    self,
    batch: Batch,
    keys: Key[Array, "B"],
    given: Mapping[str, Array],
    capacity: int,
  ) -> BlockExamples:
    """Masks the blocks; a block's weights sum to its number of tokens."""
    drawn = block_masks.corrupt(
      keys, batch, given["rate"], self.block, self.mask
    )
    weights = drawn.lengths / jnp.maximum(drawn.counts, 1)
    return BlockExamples(
      tokens=drawn.xt,
      context=row_context(batch.segments, visibility=self._visibility("noisy")),
      targets=batch.tokens,
      asked=drawn.masked,
      weights=drawn.at_tokens(weights),
      capacity=capacity,
      answers=drawn.lengths.sum(axis=-1),
    )

  def _counts(self, jobs: Jobs, held: HeldOut) -> Int[np.ndarray, "N"]:
    # `pose` weighs each block, so that a row's costs are its bound.
    return row_lengths(held)[jobs.rows]


def build(
  config: BlockConfig,
  stage: BlockStage,
  noise: NoiseConfig,
  vocabulary: Vocabulary,
  plan: Plan,
) -> Block:
  """Returns the block objective of a stage.

  Args:
    config: block length, passes, weighting and label smoothing.
    stage: the range of mask rates, the share of blocks that rehearse all, and
      perhaps a block length of its own.
    noise: the noise schedule, used if the stage has no range of mask rates.
    vocabulary: gives the mask id.
    plan: sizes of the stage.

  Raises:
    UserError: the vocabulary has no mask token.
  """
  rates = stage_rates(stage, noise)
  block = stage.block_length or config.block_length
  return Block(
    rates=rates,
    block=block,
    passes=config.passes,
    weighting=config.weighting,
    label_smoothing=config.label_smoothing,
    mask=vocabulary.need("mask"),
    length=plan.length,
    most_segments=plan.most_segments,
    capacity=block_masks.max_masked(rates, plan, block),
  )
