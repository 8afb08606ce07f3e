"""The transformer block: pre-norm attention and an MLP with residuals."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from mdm_jax.core import hardware
from mdm_jax.model import cache as caching
from mdm_jax.model import layers, lora
from mdm_jax.model.config import ModelConfig
from mdm_jax.model.kernels import Kernel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shared:
  """Inputs that are the same for all blocks.

  Attributes:
    kernel: computes attention.
    prepared: result of `kernel.prepare`.
    at: position in a decoding cache that is written to; see `cache.extend`.
    cos: rotary cosines, from `layers.rotary`.
    sin: signed rotary sines, likewise.
    condition: embedded mask rate; None without time conditioning.
    keys: dropout keys, one per row; None disables dropout.
    seen: keys and values to attend to in place of the call's own.
    lora: keys of this layer for LoRA's dropout, one per row; None disables it.
  """

  kernel: Kernel = dataclasses.field(metadata={"static": True})
  prepared: Any
  at: caching.At | None
  cos: Float[Array, "B L K"]
  sin: Float[Array, "B L K"]
  condition: Float[Array, "B D"] | None
  keys: Key[Array, "B"] | None
  seen: caching.Pair | None = None
  lora: Key[Array, "B"] | None = None


# An output, and the keys and values to keep (see `cache.extend`).
Kept = tuple[Float[Array, "B L D"], caching.Pair]


def _branch_scale(config: ModelConfig) -> float:
  """Returns the init scale that keeps the residual's variance depth-free.

  Each of the 2 * num_layers branches adds 1 / (2 * num_layers) of it.
  """
  return (2 * config.num_layers) ** -0.5


class Attention(nnx.Module):
  """Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245)."""

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
    lora.adapt(self, config.lora, rngs)

  def __call__(
    self,
    x: Float[Array, "B L D"],
    layer: Int[Array, ""],
    shared: Shared,
    cached: caching.Pair | None,
  ) -> Kept:
    if shared.seen is None:
      query, *pair = self.heads(x, shared, "query", "key", "value")
      seen, kept = caching.extend(cached, shared.at, layer, *pair)
    else:
      (query,) = self.heads(x, shared, "query")
      seen = kept = shared.seen
    mixed = shared.kernel.attend(query, *seen, shared.prepared)
    out = layers.project(
      "out", "bgrlk,grkd->bld", mixed, self.out, "batch", "length", None
    )
    return lora.added(self, "out", mixed, out, shared.lora), kept

  def heads(
    self, x: Float[Array, "B L D"], shared: Shared, *names: str
  ) -> list[Array]:
    """Returns queries [B, G, R, L, K], keys or values [B, G, L, K], by name.

    Queries and keys are rotated, and normalised before if the config says so.
    """
    heads = [
      lora.added(self, name, x, self._product(name, x), shared.lora)
      for name in names
    ]
    if self.config.qkv_bias:
      biases = [getattr(self, f"{name}_bias") for name in names]
      pairs = zip(heads, biases, strict=True)
      heads = [a + _over_tokens(bias, a.dtype) for a, bias in pairs]
    pairs = zip(names, heads, strict=True)
    return [self._rotated(name, a, shared) for name, a in pairs]

  def _product(self, name: str, x: Float[Array, "B L D"]) -> Array:
    # Heads come before the length, so that the batched matmuls over [L, K]
    # need no transposed copies.
    heads, tokens = ("batch", "heads"), ("length", None)
    if name == "query":
      return layers.project(
        name, "bld,dgrk->bgrlk", x, self.query, *heads, None, *tokens
      )
    weight, number = (self.key, 1) if name == "key" else (self.value, 2)
    x = _apart(x, number)
    return layers.project(name, "bld,dgk->bglk", x, weight, *heads, *tokens)

  def _rotated(self, name: str, heads: Array, shared: Shared) -> Array:
    angles = shared.cos, shared.sin
    if name == "value":
      return heads
    if self.config.qk_norm:
      norm = self.query_norm if name == "query" else self.key_norm
      return layers.norm_and_rotate(heads, norm, *angles)
    return layers.rotate(heads, *angles)


def _apart(x: Float[Array, "B L D"], number: int) -> Float[Array, "B L D"]:
  """Returns x, for a product that XLA shall not join with others of x.

  XLA for GPUs would join them, only to copy the parts out of the result for the
  kernels that read them.
  """
  return _behind_barriers(x, number) if hardware.on_gpu() else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _behind_barriers(x: Array, number: int) -> Array:
  # A different number of them for each product: XLA merges what is equal.
  for _ in range(number):
    x = jax.lax.optimization_barrier(x)
  return x


# One barrier for the gradient: with more, XLA would add it up in more kernels.
_behind_barriers.defvjp(
  lambda x, number: (_behind_barriers(x, number), None),
  lambda number, _, grad: (jax.lax.optimization_barrier(grad),),
)


def _over_tokens(bias: nnx.Param, dtype: jnp.dtype) -> Float[Array, "1 *H 1 K"]:
  """Returns a per-head bias that broadcasts over [B, heads, L, K]."""
  return jnp.expand_dims(bias[...].astype(dtype), (0, -2))


class SwiGLU(nnx.Module):
  """Gated MLP: (silu(x gate) * (x up)) down (arXiv 2002.05202)."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    width, hidden = config.embed_dim, config.mlp_size
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
    self.config = config
    lora.adapt(self, config.lora, rngs)

  def __call__(
    self, x: Float[Array, "B L D"], keys: Key[Array, "B"] | None = None
  ) -> Float[Array, "B L D"]:
    """Returns the MLP of x; `keys` are for LoRA's dropout, one per row."""
    if self.config.lora.rank:
      hidden = layers.gated(
        *(self._adapted(name, x, keys) for name in ("gate", "up"))
      )
    else:
      hidden = layers.swiglu(x, self.gate, self.up)
    out = layers.project(
      "down", "blf,fd->bld", hidden, self.down, "batch", "length", None
    )
    return lora.added(self, "down", hidden, out, keys)

  def _adapted(self, name: str, x, keys) -> Float[Array, "B L F"]:
    weight, axes = getattr(self, name), ("batch", "length", "mlp")
    y = layers.project(name, "bld,df->blf", x, weight, *axes)
    return lora.added(self, name, x, y, keys)


class GELU(nnx.Module):
  """MLP with biases: gelu(x up + up_bias) down + down_bias, by tanh."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    width, hidden = config.embed_dim, config.mlp_size
    self.up = layers.normal(
      rngs(), (width, hidden), "embed", "mlp", fan_in=width
    )
    self.up_bias = layers.zeros((hidden,), "mlp")
    self.down = layers.normal(
      rngs(),
      (hidden, width),
      *("mlp", "embed"),
      fan_in=hidden,
      scale=_branch_scale(config),
    )
    self.down_bias = layers.zeros((width,), None)
    lora.adapt(self, config.lora, rngs)

  def __call__(
    self, x: Float[Array, "B L D"], keys: Key[Array, "B"] | None = None
  ) -> Float[Array, "B L D"]:
    """Returns the MLP of x; `keys` are for LoRA's dropout, one per row."""
    across = lambda bias: bias[...].astype(x.dtype)[None, None]
    h = layers.project(
      "up", "bld,df->blf", x, self.up, "batch", "length", "mlp"
    )
    h = lora.added(self, "up", x, h, keys)
    h = jax.nn.gelu(h + across(self.up_bias), approximate=True)
    out = layers.project(
      "down", "blf,fd->bld", h, self.down, "batch", "length", None
    )
    return lora.added(self, "down", h, out, keys) + across(self.down_bias)


# By `model.block`.
NORMS = {"swiglu": layers.RMSNorm, "gelu": layers.LayerNorm}
_MLPS = {"swiglu": SwiGLU, "gelu": GELU}


class Block(nnx.Module):
  """A pre-norm block with optional adaLN-zero conditioning on the mask rate."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    self.config = config
    norm, mlp = NORMS[config.block], _MLPS[config.block]
    self.attention_norm = norm(config.embed_dim, config.norm_eps)
    self.attention = Attention(config, rngs)
    self.mlp_norm = norm(config.embed_dim, config.norm_eps)
    self.mlp = mlp(config, rngs)
    if config.time_conditioning:
      shape = (config.embed_dim, 6, config.embed_dim)
      # Zeros close both gates, so that every block starts as the identity.
      self.modulation = layers.zeros(shape, "embed", None, None)

  def __call__(
    self,
    x: Float[Array, "B L D"],
    layer: Int[Array, ""],
    shared: Shared,
    cached: caching.Pair | None,
  ) -> Kept:
    shift, scale, gate = self._modulation(x, shared)
    keys = self._dropout_keys(layer, shared)
    if self.config.lora.rank and shared.keys is not None:
      own = _folded(shared.keys, 2 * self.config.num_layers + layer)
      shared = dataclasses.replace(shared, lora=own)
    h = self.attention_norm(x) * (1 + scale[0]) + shift[0]
    h, kept = self.attention(h, layer, shared, cached)
    h = layers.dropout(h, self.config.dropout, keys[0])
    x = x + gate[0] * h
    h = self.mlp_norm(x) * (1 + scale[1]) + shift[1]
    h = layers.dropout(self.mlp(h, shared.lora), self.config.dropout, keys[1])
    return x + gate[1] * h, kept

  def attend(
    self, x: Float[Array, "B L D"], layer: Int[Array, ""], shared: Shared
  ) -> tuple[Float[Array, "B L D"], Bool[Array, "B L D"] | None]:
    """Runs the block up to its MLP, without conditioning and LoRA.

    Returns:
      What goes into the MLP, and which entries of the MLP's output are dropped;
      None without dropout.
    """
    keys = self._dropout_keys(layer, shared)
    h, _ = self.attention(self.attention_norm(x), layer, shared, None)
    x = x + layers.dropout(h, self.config.dropout, keys[0])
    return x, layers.dropped(x.shape, self.config.dropout, keys[1])

  def add_mlp(
    self, x: Float[Array, "N D"], dropped: Bool[Array, "N D"] | None
  ) -> Float[Array, "N D"]:
    """Runs the rest of the block at any N positions; see `attend`."""
    h = self.mlp(self.mlp_norm(x)[:, None])[:, 0]
    return x + layers.without(h, self.config.dropout, dropped)

  def keys_and_values(
    self, x: Float[Array, "B L D"], shared: Shared
  ) -> caching.Pair:
    """Returns what other positions attend to: keys and values of x."""
    shift, scale, _ = self._modulation(x, shared)
    h = self.attention_norm(x) * (1 + scale[0]) + shift[0]
    return tuple(self.attention.heads(h, shared, "key", "value"))

  def _modulation(self, x: Float[Array, "B L D"], shared: Shared):
    """Returns shift, scale and gate, a pair each for attention and MLP.

    Source: adaLN-zero, Peebles and Xie 2022, arXiv 2212.09748.
    """
    # Without conditioning: the values that change nothing.
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

  def _dropout_keys(self, layer: Int[Array, ""], shared: Shared):
    if shared.keys is None or self.config.dropout == 0:
      return None, None
    # Distinct numbers for all branches of all layers, so no key is used twice.
    return _folded(shared.keys, 2 * layer), _folded(shared.keys, 2 * layer + 1)


def _folded(keys: Key[Array, "B"], number: Int[Array, ""]) -> Key[Array, "B"]:
  """Returns a key of each row for a number."""
  return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)
