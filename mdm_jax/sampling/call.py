"""One denoiser call of the sampler, with logits for chosen positions only.

Logits are computed in chunks of positions, as many as are needed: a step that
reveals six tokens projects six positions, and no array has shape [B, L, V].

Nothing else in the sampler knows how hidden states are computed: with a cache
of finished blocks, `denoiser` is the reader of `blocks.py`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from mdm_jax.core import hardware
from mdm_jax.core.sharding import RULES
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.model.context import Context, row_context
from mdm_jax.model.inference import Hidden, Ready, pick
from mdm_jax.sampling.config import SampleConfig

# Entries of a chunk of float32 logits: 128 MiB; on a GPU 512 MiB, as a chunk is
# a row of small kernels there.
_MOST_LOGITS = {"gpu": 2**27}
_MOST_LOGITS_ELSEWHERE = 2**25
_CHUNKS = 4  # fewest chunks for all positions of a row

Carry = TypeVar("Carry")


@runtime_checkable
class Predictor(Protocol):
  """What the sampler needs of a denoiser; see `model.denoiser.Denoiser`."""

  def hidden(
    self, params: Any, tokens: Int[Array, "B L"], context: Context
  ) -> Float[Array, "B L D"]: ...

  def logits(
    self, params: Any, hidden: Float[Array, "N D"]
  ) -> Float[Array, "N V"]: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Canvas:
  """Given tokens and free positions; leaves are arrays or abstract shapes.

  Attributes:
    tokens: ids [B, L]; ignored at free positions.
    free: positions to draw [B, L]; all others are never changed.
    lengths: length of each row [B]; positions from there on are padding.
  """

  tokens: Any
  free: Any
  lengths: Any


def padded(canvas: Canvas, pad: int) -> Canvas:
  """Returns the canvas with PAD, and nothing free, behind each row's length."""
  inside = jnp.arange(canvas.tokens.shape[1])[None] < canvas.lengths[:, None]
  tokens = jnp.where(inside, canvas.tokens, pad)
  return Canvas(tokens, canvas.free & inside, canvas.lengths)


class Call:
  """Hidden states of the current xt, and logits on demand.

  With guidance it holds a second set of hidden states, without the prompt.
  """

  def __init__(
    self,
    config: SampleConfig,
    denoiser: Predictor,
    vocab: Vocabulary,
    params: Any,
    canvas: Canvas,
    x: Int[Array, "B L"],
    masked: Bool[Array, "B L"],
    end: Int[Array, "B"],
    everywhere: bool = True,
  ):
    """Runs the denoiser.

    Args:
      config: static settings of the loop.
      denoiser: computes hidden states and logits.
      vocab: the special ids.
      params: parameters of the denoiser, or ready ones.
      canvas: the given tokens.
      x: current ids xt.
      masked: positions still to be drawn.
      end: length of each row.
      everywhere: whether most positions will be asked for their logits. Only
        ready parameters save anything if not.
    """
    self._denoiser, self._params, self._vocab = denoiser, params, vocab
    self._everywhere = everywhere
    self._guidance = config.guidance
    inside = jnp.arange(x.shape[1])[None] < end[:, None]
    given = ~canvas.free & inside
    # Positions with no given token from there on. In front of one, a drawn end
    # would cut it off.
    self._may_end = jnp.cumsum(given[:, ::-1], axis=1)[:, ::-1] == 0
    self._hidden = self._run(x, masked, inside)
    if self._guidance:
      x = jnp.where(given, vocab.mask, x)
      self._unprompted = self._run(x, masked | given, inside)

  def _run(self, x, masked, inside) -> Hidden:
    # The row's actual mask rate, whatever its schedule.
    rate = masked.sum(axis=1) / jnp.maximum(inside.sum(axis=1), 1)
    context = row_context(
      inside.astype(jnp.int32),
      condition=rate.astype(jnp.float32),
      most_segments=1,
    )
    if isinstance(self._params, Ready):
      hidden = self._params.run(x, context)
      if not self._everywhere:
        return hidden
      states = hidden(None)
    else:
      states = self._denoiser.hidden(self._params, x, context)
    return functools.partial(pick, states)

  def logits(self, where: Int[Array, "B N"]) -> Float[Array, "B N V"]:
    """Returns logits at some positions; -inf for impossible tokens.

    With guidance w they are u + (1 + w) (c - u), where u are logits with all
    given tokens masked, and c those with the prompt (unsupervised classifier-
    free guidance, Nie et al. 2024, arXiv 2410.18514).
    """
    logits = self._project(self._hidden, where)
    if self._guidance:
      without = self._project(self._unprompted, where)
      guided = without + (1 + self._guidance) * (logits - without)
      # -inf - -inf is NaN, so forbidden ids keep their -inf.
      logits = jnp.where(jnp.isfinite(logits), guided, logits)
    may_end = pick(self._may_end, where)
    is_end = self._vocab.is_end(jnp.arange(logits.shape[-1])[None, None])
    return jnp.where(is_end & ~may_end[..., None], -jnp.inf, logits)

  def _project(self, hidden: Hidden, where) -> Float[Array, "B N V"]:
    picked = hidden(where)
    # Stated explicitly: the sharding of a reshaped one-row batch is ambiguous.
    split = RULES.spec("batch", None)
    flat = (where.size, picked.shape[-1])
    flat = jnp.reshape(picked, flat, out_sharding=split)
    params = self._params
    params = params.params if isinstance(params, Ready) else params
    flat = jax.reshard(self._denoiser.logits(params, flat), split)
    shape = (*where.shape, flat.shape[-1])
    return jnp.reshape(flat, shape, out_sharding=P(*split, None))

  def in_chunks(
    self,
    where: Int[Array, "B L"],
    count: Int[Array, "B"],
    most: int,
    body: Callable[[Int[Array, "B N"], Bool[Array, "B N"], Carry], Carry],
    carry: Carry,
  ) -> Carry:
    """Loops over the first `count` positions of each row, in chunks.

    Args:
      where: positions by rank.
      count: number of positions wanted of each row.
      most: most columns per chunk; fewer if their logits would be too large.
      body: (slots, kept, carry) -> carry, where slots are some columns of
        `where` and kept says which of them are wanted.
      carry: initial value of the loop's state.

    Returns:
      The carry after the last chunk.
    """
    rows, length = where.shape
    place = hardware.target()
    entries = _MOST_LOGITS.get(place and place.backend, _MOST_LOGITS_ELSEWHERE)
    room = entries // (rows * self._vocab.size)
    size = max(min(most, room, -(-length // _CHUNKS)), 1)
    where = jnp.pad(where, ((0, 0), (0, -length % size)))

    def chunk(n, carry):
      slots = jax.lax.dynamic_slice_in_dim(where, n * size, size, axis=1)
      # Newer JAX versions lose the sharding of a one-row batch in this slice.
      slots = jax.reshard(slots, jax.typeof(where).sharding)
      kept = n * size + jnp.arange(size)[None] < count[:, None]
      return body(slots, kept, carry)

    # A dynamic bound: the number of chunks follows the row that needs most.
    return jax.lax.fori_loop(0, -(-count.max() // size), chunk, carry)
