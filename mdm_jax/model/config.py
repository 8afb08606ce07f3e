"""Configuration of the denoiser: its sizes, dtype and attention kernel."""

import dataclasses
from typing import Literal

from mdm_jax.core.errors import UserError, nearest
from mdm_jax.core.fields import SIZE, field, fixed
from mdm_jax.model.rope_scaling import RopeScaling

_PRODUCTS = "query", "key", "value", "out", "gate", "up", "down"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
  """LoRA: train low-rank additions to the model in init_from, not itself."""

  rank: int = fixed(
    0,
    "rank of LoRA's additions (0: none, all parameters are trained)",
    "[0, 65536]",
  )
  alpha: float = fixed(
    16.0, "the additions are multiplied by alpha / rank", "(0, 1e6]"
  )
  dropout: float = fixed(
    0.0, "rate on the additions' inputs, in training", "[0, 0.9]"
  )
  products: tuple[str, ...] = fixed(
    (), f"which products are added to: {', '.join(_PRODUCTS)} (none given: all)"
  )

  @property
  def scale(self) -> float:
    """Factor on the additions."""
    return self.alpha / self.rank

  def check(self, path: str) -> None:
    """Raises UserError at a product that there isn't."""
    for name in self.products:
      if name not in _PRODUCTS:
        raise UserError(
          f"{path}.products: no product {name!r}; {nearest(name, _PRODUCTS)}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """The denoiser, a bidirectional transformer."""

  num_layers: int = fixed(12, "transformer blocks", "[1, 65536]")
  embed_dim: int = fixed(768, "width D of the residual stream", SIZE)
  num_heads: int = fixed(
    12, "attention heads H; without head_dim, must divide D", "[1, 65536]"
  )
  num_kv_heads: int | None = fixed(
    None,
    "key/value heads for grouped-query attention (None: num_heads)",
    "[1, 65536]",
  )
  head_dim: int | None = fixed(
    None, "size K of a head, even (None: D / H)", "[2, 65536]"
  )
  mlp_dim: int | None = fixed(
    None, "hidden width of the MLP (None: 8/3 D rounded up to 64)", SIZE
  )
  block: Literal["swiglu", "gelu"] = fixed(
    "swiglu",
    "swiglu: RMSNorm and SwiGLU, as in Llama; gelu: LayerNorm, GELU, and biases"
    " in norms, MLP and head, as in MDLM's DiT",
  )
  dropout: float = fixed(
    0.0, "rate on the two residual branches of a block", "[0, 0.9]"
  )
  qk_norm: bool = fixed(True, "RMSNorm on queries and keys")
  qkv_bias: bool = fixed(False, "biases on queries, keys and values")
  norm_eps: float = fixed(
    1e-6, "added to a norm's mean square or variance", "[1e-12, 0.1]"
  )
  tie_embeddings: bool = fixed(True, "the head is the embedding transposed")
  time_conditioning: bool = fixed(False, "adaLN-zero on the mask rate")
  rope_theta: float = fixed(
    10_000.0, "base of the rotary frequencies", "[1, 1e12]"
  )
  rope_scaling: RopeScaling = RopeScaling()
  lora: LoraConfig = LoraConfig()
  shift_outputs: bool = fixed(
    False, "a position is predicted by the output before it, as in Dream"
  )
  remat: Literal["auto", "none", "dots", "full"] = field(
    "auto",
    "what the backward pass recomputes: nothing, all but matmuls, all (auto:"
    " nothing if the layers are unrolled, else all but matmuls)",
  )
  layer_loop: Literal["auto", "scan", "unrolled"] = field(
    "auto",
    "scan: the layers are one loop, quick to compile; unrolled: one after the"
    " other, faster on a GPU (auto: unrolled there up to 32 layers, if"
    " parameters are not split over mesh.fsdp)",
  )
  dtype: Literal["auto", "float32", "bfloat16"] = field(
    "auto", "compute dtype (auto: bfloat16 on accelerators, float32 on CPU)"
  )
  attention: str = field(
    "auto",
    "reference: plain products; xla: jax.nn.dot_product_attention; cudnn: the"
    " same by cuDNN's kernel, on a GPU in bfloat16; splash: JAX's splash"
    " attention, on a TPU; auto: reference on a CPU, cudnn on a GPU and splash"
    " on a TPU where they are right, else xla: the plan says which",
    registry="mdm_jax.model.kernels:KERNELS",
  )

  @property
  def head_size(self) -> int:
    """Size K of one attention head."""
    return self.head_dim or self.embed_dim // self.num_heads

  @property
  def mlp_size(self) -> int:
    """Hidden width F of SwiGLU."""
    # At 8/3 D its three matrices have the parameters of a two-matrix MLP at
    # 4 D (arXiv 2002.05202).
    return self.mlp_dim or -(-8 * self.embed_dim // (3 * 64)) * 64

  def check(self, path: str) -> None:
    """Raises UserError if the numbers and sizes of heads are inconsistent."""
    if self.rope_scaling.kind == "yarn" and self.rope_theta <= 1:
      raise UserError(
        f"{path}.rope_theta={self.rope_theta:g} must exceed 1 with"
        f" {path}.rope_scaling.kind=yarn; nearest: 10000"
      )
    self._check_lora(f"{path}.lora")
    if self.head_dim is None and self.embed_dim % self.num_heads:
      raise UserError(
        f"{path}.num_heads={self.num_heads} does not divide"
        f" {path}.embed_dim={self.embed_dim}; set {path}.head_dim, or another"
        " number of heads"
      )
    if self.head_size % 2:
      # Name the field that the user set: head_dim, or the two it follows from.
      quotient = f"{path}.embed_dim / {path}.num_heads"
      what = quotient if self.head_dim is None else f"{path}.head_dim"
      raise UserError(
        f"{what} = {self.head_size} is odd; rotary positions need an even head"
        f" size; nearest valid: {path}.head_dim={self.head_size + 1}"
      )
    if self.num_kv_heads and self.num_heads % self.num_kv_heads:
      raise UserError(
        f"{path}.num_kv_heads={self.num_kv_heads} does not divide"
        f" {path}.num_heads={self.num_heads}"
      )

  def _check_lora(self, path: str) -> None:
    if self.lora.rank > self.embed_dim:
      raise UserError(
        f"{path}.rank={self.lora.rank} is larger than the rank of any product"
        f" of a model of width {self.embed_dim}; nearest: {self.embed_dim}"
      )
    if self.block == "gelu" and "gate" in self.lora.products:
      raise UserError(
        f"{path}.products: an MLP of block=gelu has no product 'gate'; nearest:"
        " 'up'"
      )
