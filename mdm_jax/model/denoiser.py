"""The denoiser: a pre-norm transformer that is told what sees what.

RMSNorm, rotary positions, SwiGLU; biases only where queries, keys and values
are to have some. Blocks are stacked along a leading
layer axis and run by one scan, so compile time does not grow with depth. NNX
modules only hold the parameters: outside this file they are a plain nested
dict, and `Denoiser` merges them back (`bind`).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from mdm_jax.core.sharding import RULES, vocab_ids
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.model import embedding, kernel_choice, layers
from mdm_jax.model.config import ModelConfig
from mdm_jax.model.context import FULL, Context, Visibility, starts
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Shared:
  """What every block needs beside the residual stream."""

  kernel: Kernel = dataclasses.field(metadata={"static": True})
  prepared: Any  # by the kernel
  cos: Float[Array, "B L K"]
  sin: Float[Array, "B L K"]
  condition: Float[Array, "B D"] | None
  keys: Key[Array, "B"] | None


def _branch_scale(config: ModelConfig) -> float:
  """Keeps the residual stream's size the same at any depth."""
  return (2 * config.num_layers) ** -0.5


class Attention(nnx.Module):
  """Grouped-query self-attention over everything visible."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    self.config = config
    width, groups = config.embed_dim, config.num_kv_heads or config.num_heads
    repeats = config.num_heads // groups
    size = config.head_size
    inward = functools.partial(layers.normal, fan_in=width)
    heads = ("embed", "heads", None)
    self.query = inward(rngs(), (width, groups, repeats, size), *heads, None)
    self.key = inward(rngs(), (width, groups, size), *heads)
    self.value = inward(rngs(), (width, groups, size), *heads)
    self.out = layers.normal(
      rngs(),
      (groups, repeats, size, width),
      *("heads", None, None, "embed"),
      fan_in=config.num_heads * size,
      scale=_branch_scale(config),
    )
    if config.qkv_bias:
      split = "heads", None, None
      self.query_bias = layers.zeros((groups, repeats, size), *split)
      self.key_bias = layers.zeros((groups, size), *split[:2])
      self.value_bias = layers.zeros((groups, size), *split[:2])
    if config.qk_norm:
      self.query_norm = layers.RMSNorm(size, config.norm_eps)
      self.key_norm = layers.RMSNorm(size, config.norm_eps)

  def __call__(
    self, x: Float[Array, "B L D"], shared: _Shared
  ) -> Float[Array, "B L D"]:
    # Heads come before the length: matmuls over [L, K] then need no copies.
    heads, tokens = ("batch", "heads"), ("length", None)
    query = layers.project(
      "query", "bld,dgrk->bgrlk", x, self.query, *heads, None, *tokens
    )
    key, value = (
      layers.project(name, "bld,dgk->bglk", x, w, *heads, *tokens)
      for name, w in (("key", self.key), ("value", self.value))
    )
    if self.config.qkv_bias:
      query = query + _over_tokens(self.query_bias, query.dtype)
      key = key + _over_tokens(self.key_bias, key.dtype)
      value = value + _over_tokens(self.value_bias, value.dtype)
    if self.config.qk_norm:
      query, key = self.query_norm(query), self.key_norm(key)
    query = layers.rotate(query, shared.cos, shared.sin)
    key = layers.rotate(key, shared.cos, shared.sin)
    mixed = shared.kernel.attend(query, key, value, shared.prepared)
    return layers.project(
      "out", "bgrlk,grkd->bld", mixed, self.out, "batch", "length", None
    )


def _over_tokens(bias: nnx.Param, dtype: jnp.dtype) -> Float[Array, "1 *H 1 K"]:
  """Returns a bias of heads as it is added to [B, heads, L, K]."""
  return jnp.expand_dims(bias[...].astype(dtype), (0, -2))


class SwiGLU(nnx.Module):
  """silu(x gate) * (x up), projected down (arXiv 2002.05202)."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    width, hidden = config.embed_dim, config.mlp_size
    # Not as one: on the way back, joining the two costs more than it saves.
    inward = functools.partial(layers.normal, fan_in=width)
    self.gate = inward(rngs(), (width, hidden), "embed", "mlp")
    self.up = inward(rngs(), (width, hidden), "embed", "mlp")
    self.down = layers.normal(
      rngs(),
      (hidden, width),
      *("mlp", "embed"),
      fan_in=hidden,
      scale=_branch_scale(config),
    )

  def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    gate, up = (
      layers.project(name, "bld,df->blf", x, w, "batch", "length", "mlp")
      for name, w in (("gate", self.gate), ("up", self.up))
    )
    hidden = layers.swiglu(gate, up)
    return layers.project(
      "down", "blf,fd->bld", hidden, self.down, "batch", "length", None
    )


class Block(nnx.Module):
  """Attention and SwiGLU, each on a normed branch of the residual stream."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    self.config = config
    self.attention_norm = layers.RMSNorm(config.embed_dim, config.norm_eps)
    self.attention = Attention(config, rngs)
    self.mlp_norm = layers.RMSNorm(config.embed_dim, config.norm_eps)
    self.mlp = SwiGLU(config, rngs)
    if config.time_conditioning:
      shape = (config.embed_dim, 6, config.embed_dim)
      self.modulation = layers.zeros(shape, "embed", None, None)

  def __call__(
    self, x: Float[Array, "B L D"], layer: Int[Array, ""], shared: _Shared
  ) -> Float[Array, "B L D"]:
    shift, scale, gate = self._modulation(x, shared)
    keys = self._dropout_keys(layer, shared)
    h = self.attention_norm(x) * (1 + scale[0]) + shift[0]
    h = layers.dropout(self.attention(h, shared), self.config.dropout, keys[0])
    x = x + gate[0] * h
    h = self.mlp_norm(x) * (1 + scale[1]) + shift[1]
    h = layers.dropout(self.mlp(h), self.config.dropout, keys[1])
    return x + gate[1] * h

  def _modulation(self, x: Float[Array, "B L D"], shared: _Shared):
    """adaLN-zero (arXiv 2212.09748): shift, scale and gate of two branches."""
    if shared.condition is None:
      return (0, 0), (0, 0), (1, 1)
    parts = layers.project(
      "modulation",
      "bd,dcf->bcf",
      shared.condition.astype(x.dtype),
      self.modulation,
      "batch",
      None,
      None,
    )
    a, b, c, d, e, f = (parts[:, i, None] for i in range(6))
    return (a, b), (c, d), (e, f)

  def _dropout_keys(self, layer: Int[Array, ""], shared: _Shared):
    if shared.keys is None or self.config.dropout == 0:
      return None, None
    fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
    return fold(shared.keys, 2 * layer), fold(shared.keys, 2 * layer + 1)


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

  def hidden(
    self,
    tokens: Int[Array, "B L"],
    context: Context,
  ) -> Float[Array, "B L D"]:
    """Runs the blocks; see `Denoiser.hidden`."""
    dtype = compute_dtype(self.config)
    x = embedding.look_up(dtype, self.embedding[...], tokens)
    shared = self._shared(context)

    def body(x, layer):
      block, index = layer
      return block(x, index, shared), None

    if self.config.remat != "none":
      kept = _KEPT[self.config.remat]
      body = jax.checkpoint(body, prevent_cse=False, policy=kept)
    index = jnp.arange(self.config.num_layers)
    x, _ = jax.lax.scan(body, x, (self.blocks, index))
    return _shifted(x, context.segments) if context.shift else x

  def _shared(self, context: Context) -> _Shared:
    c = self.config
    size = c.head_size
    cos, sin = layers.rotary(context.positions, size, c.rope_theta)
    condition = None
    if c.time_conditioning:
      if context.condition is None:
        raise ValueError("a denoiser with time conditioning needs a condition")
      condition = self._condition(context.condition)
    kernel = self._kernel(context)
    side = context.side
    prepared = kernel.prepare(context.visibility, side, side)
    return _Shared(kernel, prepared, cos, sin, condition, context.keys)

  def _kernel(self, context: Context) -> Kernel:
    length = context.segments.shape[1]
    case = _case(self.config, length, context.visibility, context.packed)
    return KERNELS[kernel_choice.chosen(self.config.attention, case).name]()

  def _condition(self, rate: Float[Array, "B"]) -> Float[Array, "B D"]:
    half = self.config.embed_dim // 2
    frequency = 1000.0 ** jnp.linspace(0.0, 1.0, half)
    angles = rate[:, None] * frequency[None]
    features = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    return jax.nn.silu(
      layers.project("time", "bd,df->bf", features, self.time_in, "batch", None)
    )


def _case(
  config: ModelConfig, length: int, visibility: Visibility, packed: bool
) -> Case:
  dtype, size = compute_dtype(config).name, config.head_size
  return Case(dtype, size, length, length, visibility, packed)


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
    case = _case(self.config, length, visibility, packed)
    return kernel_choice.chosen(self.config.attention, case)

  def init(self, key: Key[Array, ""]) -> Params:
    """Returns fresh parameters, sharded over the current mesh."""
    return nnx.to_pure_dict(nnx.state(self._build(key), nnx.Param))

  def hidden(
    self,
    params: Params,
    tokens: Int[Array, "B L"],
    context: Context,
  ) -> Float[Array, "B L D"]:
    """Returns the last block's output, before the final norm and the head.

    Args:
      params: from `init`.
      tokens: what is read, corrupted or not.
      context: where the tokens are and what they see.
    """
    return self._bind(params).hidden(tokens, context)

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
