"""The denoiser: a pre-norm transformer p(x0 | xt) over a token context.

It uses rotary positions, RMSNorm and SwiGLU, with optional biases on queries,
keys and values; or else LayerNorm and GELU (`model.block`). Which positions
attend to which is an input (`Context`), not a property of the model.

Blocks are stacked along a leading layer axis and run by one `lax.scan`, so
compile time does not grow with depth. NNX modules only hold the parameters:
outside `model/` parameters are a plain nested dict, which `Denoiser.bind`
merges back into a module.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key, Shaped

from mdm_jax.core import hardware
from mdm_jax.core.sharding import vocab_ids
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.model import cache as caching
from mdm_jax.model import embedding, kernel_choice, layer_loop, layers
from mdm_jax.model.block import NORMS, Block, Shared
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
from mdm_jax.model.last_mlp import Unfinished

Params = dict[str, Any]

_named = jax.checkpoint_policies.save_any_names_but_these()


def _products_and_attention(primitive: Any, *args: Any, **params: Any) -> bool:
  """Stores values with a checkpoint_name, and what cuDNN's attention gives.

  Only matmuls and attention have a name (`layers.project`, `kernels._plain`,
  `cpu_gradients.attend`). cuDNN's gradient also needs the log-sums of its
  forward kernel, which has no name: only JAX's primitive gives it away.
  """
  if primitive.name.startswith("dot_product_attention_fwd"):
    return True
  return _named(primitive, *args, **params)


# Rematerialisation policies by `model.remat`: which values the forward pass
# stores. The backward pass recomputes all others.
_KEPT = {
  "dots": _products_and_attention,
  "full": jax.checkpoint_policies.nothing_saveable,
}


def compute_dtype(config: ModelConfig) -> jnp.dtype:
  """Returns the dtype of activations; `auto` depends on the JAX backend."""
  if config.dtype == "auto":
    # Matmuls on a CPU are no faster in bfloat16 (docs/performance.md).
    on_cpu = jax.default_backend() == "cpu"
    return jnp.dtype(jnp.float32 if on_cpu else jnp.bfloat16)
  return jnp.dtype(config.dtype)


class Network(nnx.Module):
  """Parameters and forward pass of the denoiser, as an NNX module."""

  def __init__(self, config: ModelConfig, vocab_size: int, rngs: nnx.Rngs):
    self.config = config
    width = config.embed_dim
    table = (vocab_size, width)
    self.embedding = layers.normal(
      rngs(), table, "vocab", "embed", fan_in=width
    )
    keys = jax.random.split(rngs(), config.num_layers)
    # Every parameter of a block gets a leading axis of size num_layers.
    self.blocks = jax.vmap(lambda key: Block(config, nnx.Rngs(key)))(keys)
    self.final_norm = NORMS[config.block](width, config.norm_eps)
    if not config.tie_embeddings:
      self.head = layers.normal(rngs(), table, "vocab", "embed", fan_in=width)
    if config.block == "gelu":
      self.head_bias = layers.zeros((vocab_size,), "vocab")
    if config.time_conditioning:
      self.time_in = layers.normal(
        rngs(), (width, width), None, "embed", fan_in=width
      )

  def hidden(self, tokens: Int[Array, "B L"], context: Context):
    """Runs the blocks; see `Denoiser.hidden`."""
    x, shared, side = self.begin(tokens, context)
    # `at` is set only for a decoding cache, which is updated in place.
    run = self._stacked if shared.at is None else self._in_place
    x, kept = run(x, shared, context, self.blocks)
    if context.shift or self.config.shift_outputs:
      x = _shifted(x, context.segments)
    return (x, KVCache(*kept, side, shared.at)) if context.keep else x

  def unfinished(self, tokens, context: Context) -> Unfinished:
    """Runs all but the last block's MLP; see `Denoiser.unfinished`."""
    x, shared, _ = self.begin(tokens, context)
    last = self.config.num_layers - 1
    first = jax.tree.map(lambda p: p[:last], self.blocks)
    x, _ = self._stacked(x, shared, context, first)
    block = jax.tree.map(lambda p: p[last], self.blocks)
    found = block.attend(x, jnp.int32(last), shared)
    if context.shift or self.config.shift_outputs:
      found = jax.tree.map(lambda a: _shifted(a, context.segments), found)
    return Unfinished(block, *found)

  def begin(
    self, tokens: Int[Array, "B L"], context: Context
  ) -> tuple[Float[Array, "B L D"], Shared, Side]:
    """Returns the first block's input, what all share, and the keys' `Side`."""
    dtype = compute_dtype(self.config)
    x = embedding.look_up(dtype, self.embedding[...], tokens)
    return x, *self._shared(context)

  def _stacked(self, x, shared: Shared, context: Context, blocks: Block):
    """Scans over the layers; supports gradients and rematerialisation.

    `blocks` are all of them, or the first ones.
    """

    def body(x, layer):
      block, index, cached = layer
      x, kept = block(x, index, shared, cached)
      return x, kept if context.keep else None

    loop = layer_loop.choose(self.config, hardware.target())
    # "none" is not wrapped at all: jax.checkpoint rounds every stored array
    # once more (reduce_precision). Inside a loop prevent_cse is unnecessary,
    # and costs optimisations (see jax.checkpoint's docs); unrolled, XLA would
    # merge the recomputation with the forward pass, and store everything.
    if loop.remat != "none":
      body = jax.checkpoint(
        body, prevent_cse=loop.unrolled, policy=_KEPT[loop.remat]
      )
    index = jnp.arange(len(jax.tree.leaves(blocks)[0]))
    cached = context.cache and (context.cache.keys, context.cache.values)
    stack = blocks, index, cached
    return jax.lax.scan(body, x, stack, unroll=loop.unrolled)

  def _in_place(self, x, shared: Shared, context: Context, blocks: Block):
    """Scans over the layers with the key/value buffers in the carry.

    A carry is updated in place; as scanned inputs and outputs the buffers would
    be copied. Measured on a CPU with 6 layers, 8 rows and buffers of 1,024
    tokens: 28 ms instead of 78 ms per call for one token.
    """

    def body(carry, layer):
      x, buffers = carry
      block, index = layer
      return block(x, index, shared, buffers), None

    index = jnp.arange(self.config.num_layers)
    buffers = context.cache.keys, context.cache.values
    return jax.lax.scan(body, (x, buffers), (blocks, index))[0]

  def _shared(self, context: Context) -> tuple[Shared, Side]:
    """Returns the inputs that all blocks share, and the keys' `Side`."""
    c, cache = self.config, context.cache
    cos, sin = layers.rotary(
      context.positions, c.head_size, c.rope_theta, c.rope_scaling
    )
    condition = None
    if c.time_conditioning:
      if context.condition is None:
        raise ValueError("a denoiser with time conditioning needs a condition")
      condition = self._condition(context.condition)
    q = context.side
    k = q if cache is None else caching.joined(cache, q)
    kernel = self._kernel(context, k.segments.shape[1])
    # Here and not in the blocks: a mask is built once, not once per layer.
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
      most_segments=context.most_segments,
      cache=context.cache is not None,
    )
    return KERNELS[kernel_choice.chosen(self.config.attention, case).name]()

  def _condition(self, rate: Float[Array, "B"]) -> Float[Array, "B D"]:
    # Sinusoids of the mask rate at log-spaced frequencies from 1 to 1,000.
    half = self.config.embed_dim // 2
    frequency = 1000.0 ** jnp.linspace(0.0, 1.0, half)
    angles = rate[:, None] * frequency[None]
    features = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    return jax.nn.silu(
      layers.project("time", "bd,df->bf", features, self.time_in, "batch", None)
    )


def _shifted(x: Shaped[Array, "B L D"], segments) -> Shaped[Array, "B L D"]:
  """Moves outputs one position right; the first of a segment stays."""
  before = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
  return jnp.where(starts(segments)[:, :, None], x, before)


@functools.cache
def _structure(config: ModelConfig, vocab_size: int) -> nnx.GraphDef:
  """Returns the network without its parameters; nothing is initialised."""
  # Kept: tracing the initialisation takes half as long as that of a call.
  build = lambda: Network(config, vocab_size, nnx.Rngs(jax.random.key(0)))
  return nnx.graphdef(nnx.eval_shape(build))


@dataclasses.dataclass(frozen=True)
class Denoiser:
  """The denoiser as pure functions of a nested dict of parameters.

  Example:
    denoiser = Denoiser(config, vocab)
    params = denoiser.init(jax.random.key(0))
    hidden = denoiser.hidden(params, tokens, row_context(segments))
    logits = denoiser.logits(params, hidden[0])  # [L, V], of the first row

  Attributes:
    config: the architecture.
    vocab: vocabulary; ids that must not be predicted get a logit of -inf.
  """

  config: ModelConfig
  vocab: Vocabulary

  def attention(
    self,
    length: int,
    visibility: Visibility = FULL,
    most_segments: int | None = None,
  ) -> kernel_choice.Choice:
    """Returns which attention kernel rows of `length` tokens use here."""
    dtype, size = compute_dtype(self.config).name, self.config.head_size
    case = Case(dtype, size, length, length, visibility, most_segments)
    return kernel_choice.chosen(self.config.attention, case)

  def init(self, key: Key[Array, ""]) -> Params:
    """Returns initial float32 parameters, sharded over the current mesh."""
    return nnx.to_pure_dict(nnx.state(self._build(key), nnx.Param))

  def hidden(
    self,
    params: Params,
    tokens: Int[Array, "B L"],
    context: Context,
  ) -> Float[Array, "B L D"] | tuple[Float[Array, "B L D"], KVCache]:
    """Returns the last block's output, before the final norm and the head.

    Args:
      params: nested dict of parameters, as from `init`.
      tokens: input ids, usually the corrupted xt.
      context: positions, segments and visibility of the tokens.

    Returns:
      Hidden states; with `context.keep` also the keys and values that this call
      attended to, as a cache for later calls.

    Raises:
      ValueError: time conditioning is on and `context.condition` is None.
    """
    return self.bind(params).hidden(tokens, context)

  def unfinished(
    self,
    params: Params,
    tokens: Int[Array, "B L"],
    context: Context,
  ) -> Float[Array, "B L D"] | Unfinished:
    """Returns `hidden`, or where layers are unrolled all but its last MLP.

    That saves work if only some positions are then finished, which the gather
    of the predicted positions does (`masked_positions.pack`).

    Args:
      params: as in `hidden`, and the others, too.
    """
    loop = layer_loop.choose(self.config, hardware.target())
    plain = not self.config.time_conditioning and not self.config.lora.rank
    alone = context.cache is None and not context.keep
    if loop.unrolled and loop.remat == "none" and plain and alone:
      return self.bind(params).unfinished(tokens, context)
    return self.hidden(params, tokens, context)

  def init_cache(self, rows: int, length: int) -> KVCache:
    """Returns an empty decoding cache of `length` tokens per row, with `at` 0.

    It is sharded over the current mesh as keys are.
    """
    return caching.init(self.config, compute_dtype(self.config), rows, length)

  def head(self, params: Params) -> Params:
    """Returns the subset of the parameters that `logits` reads."""
    table = "embedding" if self.config.tie_embeddings else "head"
    names = "final_norm", table, "head_bias"
    return {name: params[name] for name in names if name in params}

  def logits(
    self, params: Params, hidden: Float[Array, "N D"]
  ) -> Float[Array, "N V"]:
    """Returns float32 logits; -inf at ids that must not be predicted.

    Inside a `shard_map` over the tensor axis, V is this shard's part of the
    vocabulary.

    Args:
      params: all parameters, or the subset from `head`.
      hidden: outputs of the last block at any N positions; the final norm is
        applied here.
    """
    table = params["embedding" if self.config.tie_embeddings else "head"]
    norm, eps = params["final_norm"], self.config.norm_eps
    if self.config.block == "gelu":
      h = layers.layer_norm(hidden, norm["scale"], norm["bias"], eps)
    else:
      h = layers.rms_norm(hidden, norm["scale"], eps)
    # The loss and the sampler need float32 logits (see `tokens.draw`).
    logits = layers.head_product(h, table)
    if self.config.block == "gelu":
      logits += params["head_bias"][None].astype(jnp.float32)
    possible = self.vocab.is_predictable(vocab_ids(logits.shape[-1]))
    return jnp.where(possible[None], logits, -jnp.inf)

  def _build(self, key: Key[Array, ""]) -> Network:
    rngs = nnx.Rngs(key)
    return Network(self.config, self.vocab.size, rngs)

  def bind(self, params: Params) -> Network:
    """Returns the network with these parameters, as an NNX module."""
    return nnx.merge(_structure(self.config, self.vocab.size), params)
