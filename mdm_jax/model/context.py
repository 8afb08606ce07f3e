"""The denoiser's inputs besides tokens: positions, segments, visibility, cache.

Visibility, i.e. which positions attend to which, is described by two numbers
per position instead of an L x L mask: a label and a horizon. A query attends to
a key of its own segment if the key's label is at most the query's horizon, or
equals the query's label (`visible`):

  kind     label           horizon      attends to, within its segment
  full     0               0            everything
  causal   p               p            itself and everything before it
  blocks   p // S          p // S       its block and all blocks before it
  noisy    p // S + 2^24   p // S - 1   its noisy block, and earlier clean ones
  dual     like noisy where `Context.noisy` is set, else like blocks
  opening  p               p            like causal, and a random share of the
                                        later positions (`Context.opening`)

Here p is the position and S the block length. `noisy` and `dual` are for block
diffusion, where corrupted blocks attend to clean ones (Arriola et al. 2025,
arXiv 2503.09573). `opening` turns a causal model into a bidirectional one step
by step (Gong et al. 2024, arXiv 2410.17891).
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from mdm_jax.core import rng
from mdm_jax.core.errors import UserError

Kind = Literal["full", "causal", "blocks", "noisy", "dual", "opening"]

# Above any block index, so that noisy and clean blocks never share a label.
_NOISY = 2**24


@dataclasses.dataclass(frozen=True)
class Visibility:
  """Which positions of its segment a position attends to.

  Without arrays and hashable, so that it can be static in `jax.jit`.

  Attributes:
    kind: a row of the table in the module's docstring.
    block: block length S in tokens; only read by blocks, noisy and dual.
  """

  kind: Kind = "full"
  block: int = 1

  def __post_init__(self):
    if self.block < 1:
      raise UserError(f"a block of {self.block} tokens; nearest valid: 1")


def _static(default: Any) -> Any:
  return dataclasses.field(default=default, metadata={"static": True})


FULL = Visibility("full")
CAUSAL = Visibility("causal")
OPENING = Visibility("opening")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Opening:
  """Which later positions a position attends to, besides the earlier ones.

  Attributes:
    share: probability of each of them [B]: at 0 attention is causal, at 1
      bidirectional, both exactly.
    keys: one random key per row [B]. With the same keys, a larger share only
      adds pairs.
  """

  share: Any
  keys: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Side:
  """Segments, labels and horizons of the queries or the keys of attention.

  Leaves are arrays, or shapes during abstract evaluation.

  Attributes:
    segments: segment of each position [B, M]; 0 is padding, -1 an empty slot
      of a cache.
    label: by which queries find a position [B, M].
    horizon: highest label that a position attends to [B, M].
    most_segments: largest number of segments in a row; None if unknown.
    opening: see `Context`; only read of the queries.
  """

  segments: Any
  label: Any
  horizon: Any
  most_segments: int | None = _static(None)
  opening: Opening | None = None


def visible(q: Side, k: Side) -> Bool[Array, "B Q K"]:
  """Returns the dense mask of which keys each query attends to."""
  pairs = lambda of_q, of_k: (of_q[:, :, None], of_k[:, None, :])
  here, there = pairs(q.segments, k.segments)
  horizon, label = pairs(q.horizon, k.label)
  mine, _ = pairs(q.label, k.label)
  seen = (label <= horizon) | (label == mine)
  if q.opening is not None:
    seen |= _opened(q.opening, seen.shape[1:])
  return (here == there) & seen


def _opened(opening: Opening, shape: tuple[int, int]) -> Bool[Array, "B Q K"]:
  """Returns a random share of all pairs."""
  # 24 bits, exact in float32: no number rounds up to 1, so a share of 1 is all.
  u = (rng.words(opening.keys, shape) >> 8).astype(jnp.float32) * 2**-24
  return u < opening.share[:, None, None]


def make_side(
  visibility: Visibility,
  segments: Int[Array, "B M"],
  positions: Int[Array, "B M"],
  noisy: Bool[Array, "B M"] | None = None,
) -> Side:
  """Returns a `Side` with the labels and horizons of a visibility.

  Args:
    visibility: which positions attend to which.
    segments: segment of each position.
    positions: position of each token within its segment.
    noisy: which positions are corrupted; only read by `dual`.

  Raises:
    ValueError: `noisy` is None for `dual`.
  """
  label, horizon = _label_and_horizon(visibility, positions, noisy)
  return Side(segments, label, horizon)


def _label_and_horizon(visibility: Visibility, positions, noisy):
  if visibility.kind == "full":
    return jnp.zeros_like(positions), jnp.zeros_like(positions)
  if visibility.kind in ("causal", "opening"):
    return positions, positions
  block = positions // visibility.block
  if visibility.kind == "blocks":
    return block, block
  if visibility.kind == "noisy":
    return block + _NOISY, block - 1
  if noisy is None:
    raise ValueError("visibility dual without Context.noisy")
  label = jnp.where(noisy, block + _NOISY, block)
  return label, jnp.where(noisy, block - 1, block)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Keys and values of earlier calls; see `model/cache.py`.

  Attributes:
    keys: rotated keys of all layers [N, B, G, M, K].
    values: values of all layers [N, B, G, M, K].
    side: segments, labels and horizons of the cached positions.
    at: position in the buffers that the next call writes to, a scalar; or a
      pair of it and which rows [B] are written, the others being left as they
      are; None to concatenate instead.
  """

  keys: Any
  values: Any
  side: Side
  at: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
  """The denoiser's inputs besides the tokens; usually made by `row_context`.

  Leaves are arrays, or shapes during abstract evaluation. An additional leading
  axis holds the contexts of several calls.

  Attributes:
    segments: segment of each token [B, S], 0 for padding; tokens of different
      segments don't attend to each other.
    positions: position of each token [B, S], for RoPE and visibility.
    visibility: which positions of its segment a position attends to.
    noisy: which tokens are corrupted [B, S]; only read by `dual`.
    opening: which later positions are visible; only read by `opening`.
    condition: mask rate of each row [B]; only read with time conditioning.
    keys: dropout keys, one per row [B]; None disables dropout.
    cache: keys and values of earlier calls. Pass positions explicitly then:
      `row_context` starts at 0 in every call.
    keep: also return the keys and values that this call attended to.
    shift: use the output at i - 1 as the prediction for position i, as in
      models trained on next-token prediction. The first position of a segment
      or call keeps its own output, so with a cache start the call one token
      early.
    most_segments: largest number of segments in a row, if known. They follow
      each other from the row's start on, and positions count up by one within
      each; padding is at the row's end.
  """

  segments: Any
  positions: Any
  visibility: Visibility = _static(FULL)
  noisy: Any = None
  opening: Opening | None = None
  condition: Any = None
  keys: Any = None
  cache: KVCache | None = None
  keep: bool = _static(False)
  shift: bool = _static(False)
  most_segments: int | None = _static(None)

  @property
  def side(self) -> Side:
    """Segments, labels and horizons of these tokens, as queries or as keys."""
    side = make_side(self.visibility, self.segments, self.positions, self.noisy)
    opening = None
    if self.visibility == OPENING:
      opening = self.opening
      if opening is None:
        raise ValueError("visibility opening without Context.opening")
    return dataclasses.replace(
      side, most_segments=self.most_segments, opening=opening
    )


def row_context(segments: Int[Array, "*A B S"], **more: Any) -> Context:
  """Returns a context whose positions count from 0 within each segment.

  Example:
    segments = jnp.array([[1, 1, 1, 2, 2, 0]])  # two texts, and padding
    context = row_context(segments, visibility=CAUSAL)

  Args:
    segments: segment of each token, 0 for padding.
    **more: other fields of `Context`.
  """
  return Context(segments, segment_positions(segments), **more)


def segment_positions(segments: Int[Array, "*A S"]) -> Int[Array, "*A S"]:
  """Returns each token's position within its segment, from 0."""
  # The distance to the latest start of a segment.
  last = segments.ndim - 1
  index = jnp.arange(segments.shape[-1])
  index = jnp.expand_dims(index, tuple(range(last)))
  first = starts(segments)
  return index - jax.lax.cummax(jnp.where(first, index, 0), axis=last)


def starts(segments: Int[Array, "*A S"]) -> Bool[Array, "*A S"]:
  """Returns which tokens are the first of their segment (or padding)."""
  before = [(0, 0)] * (segments.ndim - 1) + [(1, 0)]
  changes = segments != jnp.pad(segments, before)[..., :-1]
  return changes.at[..., 0].set(True)
