"""The denoiser for many calls without gradients, as a sampler makes them.

Where layers are unrolled, the parameters are made ready once for all calls,
cast and split into layers; by itself every call would read the float32
parameters of all layers again. And the last block computes keys and values
everywhere, but all else only at the positions whose output is asked for: nobody
reads the others.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mdm_jax.core import hardware
from mdm_jax.model import layer_loop
from mdm_jax.model.block import Shared
from mdm_jax.model.context import Context, Side
from mdm_jax.model.denoiser import Denoiser, Network, Params, compute_dtype
from mdm_jax.model.kernels import KERNELS

# Positions of each row [B, N], or None for all of them -> their hidden states.
Hidden = Callable[[Int[Array, "B N"] | None], Float[Array, "B N D"]]

# Kernels that compute plain attention, in whose place the last block may use
# another one. A kernel of your own may compute something else.
_PLAIN = "auto", "reference", "xla", "cudnn", "cudnn_packed"
# The last block's positions are filled up to a multiple of this: few kernels
# take any number of them.
_MULTIPLE = 8


@dataclasses.dataclass(frozen=True)
class Ready:
  """Parameters that are ready for many calls of the denoiser.

  Attributes:
    denoiser: the denoiser.
    params: all parameters but those of the blocks, in the activations' dtype.
    blocks: the parameters of each block, likewise.
  """

  denoiser: Denoiser
  params: Params
  blocks: tuple[Params, ...]

  def run(self, tokens: Int[Array, "B L"], context: Context) -> Hidden:
    """Calls the denoiser; see `Denoiser.hidden`.

    Args:
      tokens: input ids.
      context: without a cache, `keep` and `shift`.

    Returns:
      A function from positions to their hidden states.
    """
    assert context.cache is None and not context.keep and not context.shift
    x, shared, side = self._with(self.blocks[0]).begin(tokens, context)
    *first, last = (self._with(block).blocks for block in self.blocks)
    for i, block in enumerate(first):
      x, _ = block(x, jnp.int32(i), shared, None)
    shared = dataclasses.replace(shared, seen=last.keys_and_values(x, shared))

    def finish(x: Float[Array, "B N D"], shared: Shared):
      return last(x, jnp.int32(len(first)), shared, None)[0]

    def hidden(where: Int[Array, "B N"] | None) -> Float[Array, "B N D"]:
      if where is None:
        return finish(x, shared)
      count = where.shape[1]
      where = jnp.pad(where, ((0, 0), (0, -count % _MULTIPLE)))
      here = _shared_at(where, shared, side, context)
      return finish(pick(x, where), here)[:, :count]

    return hidden

  def _with(self, block: Params) -> Network:
    """Returns the network with the parameters of one block."""
    mlp = dict(block["mlp"])
    if "gate_up" in mlp:
      # Two slices of one array, which XLA for GPUs takes whole (`swiglu`).
      both = mlp.pop("gate_up")
      mlp |= {"gate": both[:, 0], "up": both[:, 1]}
    return self.denoiser.bind(self.params | {"blocks": block | {"mlp": mlp}})


def ready(denoiser: Denoiser, params: Params) -> Ready | None:
  """Makes parameters ready for many calls.

  Returns:
    The parameters; None where the layers run as one loop, or attention is a
    kernel of your own: then call `Denoiser.hidden`.
  """
  config = denoiser.config
  loop = layer_loop.choose(config, hardware.target())
  if not loop.unrolled or config.attention not in _PLAIN:
    return None
  dtype = compute_dtype(config)

  def cast(path, p: Array) -> Array:
    # Norms compute with their scales and biases in float32, the head with its.
    kept = path[-1].key in ("scale", "bias", "head_bias")
    return p if kept else p.astype(dtype)

  cast_params = jax.tree_util.tree_map_with_path(cast, params)
  stacks = dict(cast_params.pop("blocks"))
  mlp = stacks["mlp"] = dict(stacks["mlp"])
  if "gate" in mlp:
    mlp["gate_up"] = jnp.stack([mlp.pop("gate"), mlp.pop("up")], axis=2)
  blocks = tuple(
    jax.tree.map(lambda p: p[i], stacks)  # noqa: B023
    for i in range(config.num_layers)
  )
  return Ready(denoiser, cast_params, blocks)


def pick(values: Array, where: Int[Array, "B N"]) -> Array:
  """Returns each row's values at its positions."""
  return jax.vmap(lambda row, at: row[at])(values, where)


def _shared_at(
  where: Int[Array, "B N"], shared: Shared, side: Side, context: Context
) -> Shared:
  """Returns the inputs of a block for queries at some positions."""
  # cuDNN's kernel is for as many queries as keys, which these are far from.
  kernel = KERNELS["xla" if hardware.on_gpu() else "reference"]()
  q = jax.tree.map(lambda values: pick(values, where), side)
  return dataclasses.replace(
    shared,
    kernel=kernel,
    prepared=kernel.prepare(context.visibility, q, side),
    cos=pick(shared.cos, where),
    sin=pick(shared.sin, where),
  )
