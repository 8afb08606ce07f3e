"""The last block's MLP, at some positions only.

Everything behind the last attention treats each position by itself. Where only
some positions are predicted, nobody reads the others there.
"""

import dataclasses

import jax
from jaxtyping import Array, Bool, Float

from mdm_jax.model.block import Block


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unfinished:
  """Hidden states to which the last block's MLP is still to be added.

  Attributes:
    block: the last block.
    states: its input to the MLP.
    dropped: which entries of the MLP's output are dropped; None without
      dropout.
  """

  block: Block
  states: Float[Array, "B L D"]
  dropped: Bool[Array, "B L D"] | None

  @property
  def shape(self) -> tuple[int, ...]:
    """Sizes [B, L, D] of the hidden states."""
    return self.states.shape

  @property
  def by_position(self) -> tuple[Array, Array | None]:
    """What `finished` needs of each position, [B, L, ...]."""
    return self.states, self.dropped

  def finished(
    self, states: Float[Array, "N D"], dropped: Bool[Array, "N D"] | None
  ) -> Float[Array, "N D"]:
    """Returns the hidden states at any N positions.

    Args:
      states: `states` at these positions.
      dropped: `dropped`, likewise.
    """
    return self.block.add_mlp(states, dropped)
