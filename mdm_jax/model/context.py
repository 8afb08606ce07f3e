"""What the denoiser is told about its tokens: where they are, what they see.

Which positions see which is a small description, never an array of all pairs.
It gives every position two numbers, a label and a horizon, and there is one
rule for all kinds (`visible`), which every attention kernel follows:

  kind     label           horizon    a position sees, of its own segment,
  full     0               0          everything
  causal   p               p          itself and what is before it
  blocks   p // S          p // S     its block and the blocks before it
  noisy    p // S + 2^24   p // S-1   its own noisy block, clean blocks before
  dual     noisy where `noisy` says so, else blocks

with p the position and S the block's length. `noisy` and `dual` are for block
diffusion (Arriola et al. 2025, arXiv 2503.09573), whose corrupted blocks see
clean ones.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from mdm_jax.core.errors import UserError

Kind = Literal["full", "causal", "blocks", "noisy", "dual"]

# More than any position: the label of a noisy block is no clean block's.
_NOISY = 2**24


@dataclasses.dataclass(frozen=True)
class Visibility:
  """What a position may see of its segment; hashable, without arrays.

  Attributes:
    kind: one of the table above.
    block: tokens of a block; only read by the three kinds that have blocks.
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Side:
  """The queries or the keys of attention, as far as visibility goes.

  Arrays, or shapes where nothing is computed.

  Attributes:
    segments: the packed text each position belongs to [B, M]; -1 is nobody's.
    label: what a position is found by [B, M].
    horizon: the highest label that a position sees [B, M].
    packed: a row may hold several texts.
  """

  segments: Any
  label: Any
  horizon: Any
  packed: bool = _static(True)


def visible(q: Side, k: Side) -> Bool[Array, "B Q K"]:
  """Returns which keys each query sees: the one rule, for all pairs."""
  pairs = lambda of_q, of_k: (of_q[:, :, None], of_k[:, None, :])
  here, there = pairs(q.segments, k.segments)
  horizon, label = pairs(q.horizon, k.label)
  mine, _ = pairs(q.label, k.label)
  return (here == there) & ((label <= horizon) | (label == mine))


def make_side(
  visibility: Visibility,
  segments: Int[Array, "B M"],
  positions: Int[Array, "B M"],
  noisy: Bool[Array, "B M"] | None = None,
) -> Side:
  """Returns labels and horizons by the table above.

  Args:
    visibility: of which kind.
    segments: the packed text each position belongs to.
    positions: within it.
    noisy: which positions are of the noisy half; only read by `dual`.

  Raises:
    ValueError: `dual` without `noisy`.
  """
  label, horizon = _label_and_horizon(visibility, positions, noisy)
  return Side(segments, label, horizon)


def _label_and_horizon(visibility: Visibility, positions, noisy):
  if visibility.kind == "full":
    return jnp.zeros_like(positions), jnp.zeros_like(positions)
  if visibility.kind == "causal":
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
    keys: of all layers, rotated [N, B, G, M, K].
    values: of all layers [N, B, G, M, K].
    side: what they are seen by; an empty slot has segment -1.
    at: where a call's own are written, a number; None puts them behind these.
  """

  keys: Any
  values: Any
  side: Side
  at: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
  """What the denoiser is told beside the tokens; see `row_context`.

  Arrays, or shapes where nothing is computed; with one more axis in front, a
  context for each of several calls.

  Attributes:
    segments: the packed text each token belongs to [B, S] (0: padding); tokens
      of different segments don't see each other.
    positions: for the rotary angles and for visibility [B, S].
    visibility: what a position sees of its segment.
    noisy: which tokens are of the noisy half [B, S]; only for `dual`.
    condition: each row's mask rate [B]; only read with time conditioning.
    keys: for dropout, one a row [B]; None switches it off.
    cache: keys and values of earlier calls. The positions then have to be
      given: those of `row_context` begin at 0 in every call.
    keep: also return the keys and values that this call attended to.
    shift: position i is answered by the output before it, and the first of a
      segment or of a call by its own: so are models that were trained to
      predict the next token. With a cache, give a call the token before those
      that are asked for.
    packed: a row may hold several texts; if not, it holds one from its start,
      and padding behind it.
  """

  segments: Any
  positions: Any
  visibility: Visibility = _static(FULL)
  noisy: Any = None
  condition: Any = None
  keys: Any = None
  cache: KVCache | None = None
  keep: bool = _static(False)
  shift: bool = _static(False)
  packed: bool = _static(True)

  @property
  def side(self) -> Side:
    """These tokens as queries, or as keys."""
    side = make_side(self.visibility, self.segments, self.positions, self.noisy)
    return dataclasses.replace(side, packed=self.packed)


def row_context(segments: Int[Array, "*A B S"], **more: Any) -> Context:
  """Returns a context whose positions count from 0 within each segment.

  Args:
    segments: of packed rows.
    **more: other fields of `Context`.
  """
  return Context(segments, segment_positions(segments), **more)


def segment_positions(segments: Int[Array, "*A S"]) -> Int[Array, "*A S"]:
  """Returns each token's position within its packed segment."""
  last = segments.ndim - 1
  index = jnp.arange(segments.shape[-1])
  index = jnp.expand_dims(index, tuple(range(last)))
  first = starts(segments)
  return index - jax.lax.cummax(jnp.where(first, index, 0), axis=last)


def starts(segments: Int[Array, "*A S"]) -> Bool[Array, "*A S"]:
  """Returns which tokens are the first of their segment."""
  before = [(0, 0)] * (segments.ndim - 1) + [(1, 0)]
  changes = segments != jnp.pad(segments, before)[..., :-1]
  return changes.at[..., 0].set(True)
