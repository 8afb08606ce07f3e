"""The denoiser: a pre-norm transformer that is told what sees what.

RMSNorm, rotary positions, SwiGLU; biases only where queries, keys and values
are to have some. Blocks are stacked along a leading layer axis and run by one
scan, so compile time does not grow with depth. NNX modules only hold the
parameters: outside `model/` they are a plain nested dict, and `Denoiser` merges
them back (`bind`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from mdm_jax.core.sharding import RULES, vocab_ids
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.model import cache as caching
from mdm_jax.model import embedding, kernel_choice, layers
from mdm_jax.model.block import Block, Shared
from mdm_jax.model.config import ModelConfig
from mdm_jax.model.context import (
  FULL,
  Context,
  KVCache,
  Side,
  Visibility,
  starts,
)
from mdm_jax.model.kernels import KERNELS, Case, Kernel

Params = dict[str, Any]

# By what is kept for the backward pass; all else is computed again.
_KEPT = {
  # Products and attention have names, nothing else has.
  "dots": jax.checkpoint_policies.save_any_names_but_these(),
  "full": jax.checkpoint_policies.nothing_saveable,
}


def compute_dtype(config: ModelConfig) -> jnp.dtype:
  """Returns the activations' dtype; `auto` depends on the backend."""
  if config.dtype == "auto":
    on_cpu = jax.default_backend() == "cpu"
    return jnp.dtype(jnp.float32 if on_cpu else jnp.bfloat16)
  return jnp.dtype(config.dtype)


class Network(nnx.Module):
  """All parameters of the denoiser, and its forward pass."""

  def __init__(self, config: ModelConfig, vocab_size: int, rngs: nnx.Rngs):
    self.config = config
    width = config.embed_dim
    table = (vocab_size, width)
    self.embedding = layers.normal(
      rngs(), table, "vocab", "embed", fan_in=width
    )
    keys = jax.random.split(rngs(), config.num_layers)
    self.blocks = jax.vmap(lambda key: Block(config, nnx.Rngs(key)))(keys)
    self.final_norm = layers.RMSNorm(width, config.norm_eps)
    if not config.tie_embeddings:
      self.head = layers.normal(rngs(), table, "vocab", "embed", fan_in=width)
    if config.time_conditioning:
      self.time_in = layers.normal(
        rngs(), (width, width), None, "embed", fan_in=width
      )

  def hidden(self, tokens: Int[Array, "B L"], context: Context):
    """Runs the blocks; see `Denoiser.hidden`."""
    dtype = compute_dtype(self.config)
    x = embedding.look_up(dtype, self.embedding[...], tokens)
    shared, side = self._shared(context)
    run = self._stacked if shared.at is None else self._in_place
    x, kept = run(x, shared, context)
    if context.shift:
      x = _shifted(x, context.segments)
    return (x, KVCache(*kept, side, shared.at)) if context.keep else x

  def _stacked(self, x, shared: Shared, context: Context):
    """One scan over the layers, which may be differentiated."""

    def body(x, layer):
      block, index, cached = layer
      x, kept = block(x, index, shared, cached)
      return x, kept if context.keep else None

    if self.config.remat != "none":
      policy = _KEPT[self.config.remat]
      body = jax.checkpoint(body, prevent_cse=False, policy=policy)
    index = jnp.arange(self.config.num_layers)
    cached = context.cache and (context.cache.keys, context.cache.values)
    return jax.lax.scan(body, x, (self.blocks, index, cached))

  def _in_place(self, x, shared: Shared, context: Context):
    """A scan that carries the buffers: as its input and output they are copied.

    Measured on a CPU, 6 layers, 8 rows, a buffer of 1024: 28 ms a call for one
    token against 78.
    """

    def body(carry, layer):
      x, buffers = carry
      block, index = layer
      return block(x, index, shared, buffers), None

    index = jnp.arange(self.config.num_layers)
    buffers = context.cache.keys, context.cache.values
    return jax.lax.scan(body, (x, buffers), (self.blocks, index))[0]

  def _shared(self, context: Context) -> tuple[Shared, Side]:
    """Returns what all blocks need, and the side of the keys they see."""
    c, cache = self.config, context.cache
    cos, sin = layers.rotary(context.positions, c.head_size, c.rope_theta)
    condition = None
    if c.time_conditioning:
      if context.condition is None:
        raise ValueError("a denoiser with time conditioning needs a condition")
      condition = self._condition(context.condition)
    q = context.side
    k = q if cache is None else caching.joined(cache, q)
    kernel = self._kernel(context, k.segments.shape[1])
    prepared = kernel.prepare(context.visibility, q, k)
    at = None if cache is None else cache.at
    return Shared(kernel, prepared, at, cos, sin, condition, context.keys), k

  def _kernel(self, context: Context, keys: int) -> Kernel:
    case = Case(
      dtype=compute_dtype(self.config).name,
      head=self.config.head_size,
      queries=context.segments.shape[1],
      keys=keys,
      visibility=context.visibility,
      packed=context.packed,
      cache=context.cache is not None,
    )
    return KERNELS[kernel_choice.chosen(self.config.attention, case).name]()

  def _condition(self, rate: Float[Array, "B"]) -> Float[Array, "B D"]:
    half = self.config.embed_dim // 2
    frequency = 1000.0 ** jnp.linspace(0.0, 1.0, half)
    angles = rate[:, None] * frequency[None]
    features = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    return jax.nn.silu(
      layers.project("time", "bd,df->bf", features, self.time_in, "batch", None)
    )


def _shifted(x: Float[Array, "B L D"], segments) -> Float[Array, "B L D"]:
  """Moves every output one to the right, within its segment."""
  before = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
  return jnp.where(starts(segments)[:, :, None], x, before)


@dataclasses.dataclass(frozen=True)
class Denoiser:
  """The denoiser as pure functions of a parameter dict.

  Attributes:
    config: the architecture.
    vocab: the ids; those that can't be predicted get a logit of -inf.
  """

  config: ModelConfig
  vocab: Vocabulary

  def attention(
    self, length: int, visibility: Visibility = FULL, packed: bool = True
  ) -> kernel_choice.Choice:
    """Returns what computes attention here, in rows of `length` tokens."""
    dtype, size = compute_dtype(self.config).name, self.config.head_size
    case = Case(dtype, size, length, length, visibility, packed)
    return kernel_choice.chosen(self.config.attention, case)

  def init(self, key: Key[Array, ""]) -> Params:
    """Returns fresh parameters, sharded over the current mesh."""
    return nnx.to_pure_dict(nnx.state(self._build(key), nnx.Param))

  def hidden(
    self,
    params: Params,
    tokens: Int[Array, "B L"],
    context: Context,
  ) -> Float[Array, "B L D"] | tuple[Float[Array, "B L D"], KVCache]:
    """Returns the last block's output, before the final norm and the head.

    With `context.keep` also a cache of what was attended to, for later calls.

    Args:
      params: from `init`.
      tokens: what is read, corrupted or not.
      context: where the tokens are and what they see.
    """
    return self._bind(params).hidden(tokens, context)

  def init_cache(self, rows: int, length: int) -> KVCache:
    """Returns an empty cache for so many tokens of each row, to be written to.

    Sharded over the current mesh as keys are; `at` is 0.
    """
    return caching.init(self.config, compute_dtype(self.config), rows, length)

  def head(self, params: Params) -> Params:
    """Returns the parameters that `logits` reads."""
    table = "embedding" if self.config.tie_embeddings else "head"
    return {name: params[name] for name in ("final_norm", table)}

  def logits(
    self, params: Params, hidden: Float[Array, "N D"]
  ) -> Float[Array, "N V"]:
    """Returns float32 logits of any hidden states; -inf at forbidden ids.

    Inside a `shard_map`, of the ids that this shard has of the vocabulary.

    Args:
      params: from `init`, or what `head` returns of them.
      hidden: the last block's output, normed here.
    """
    table = params["embedding" if self.config.tie_embeddings else "head"]
    h = layers.rms_norm(
      hidden, params["final_norm"]["scale"], self.config.norm_eps
    )
    logits = jnp.einsum(
      "nd,vd->nv",
      h,
      table.astype(h.dtype),
      preferred_element_type=jnp.float32,
      out_sharding=RULES.spec("batch", "vocab"),
    )
    possible = self.vocab.is_predictable(vocab_ids(logits.shape[-1]))
    return jnp.where(possible[None], logits, -jnp.inf)

  def _build(self, key: Key[Array, ""]) -> Network:
    rngs = nnx.Rngs(key)
    return Network(self.config, self.vocab.size, rngs)

  def _bind(self, params: Params) -> Network:
    abstract = nnx.eval_shape(lambda: self._build(jax.random.key(0)))
    return nnx.merge(nnx.graphdef(abstract), params)
