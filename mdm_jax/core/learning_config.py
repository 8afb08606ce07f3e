"""The configuration of the model and of how it learns.

`core/config.py` has the other sections and puts all of them together.
"""

import dataclasses
from typing import Literal

from mdm_jax.core.fields import COUNT, SHARE, SIZE, field, fixed


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """The denoiser, a bidirectional transformer."""

  num_layers: int = fixed(12, "transformer blocks", "[1, 65536]")
  embed_dim: int = fixed(768, "width D of the residual stream", SIZE)
  num_heads: int = fixed(
    12, "attention heads H; must divide embed_dim", "[1, 65536]"
  )
  num_kv_heads: int | None = fixed(
    None,
    "key/value heads for grouped-query attention (None: num_heads)",
    "[1, 65536]",
  )
  mlp_dim: int | None = fixed(
    None, "SwiGLU hidden width (None: 8/3 D rounded up to 64)", SIZE
  )
  dropout: float = fixed(
    0.0, "rate on the two residual branches of a block", "[0, 0.9]"
  )
  qk_norm: bool = fixed(True, "RMSNorm on queries and keys")
  tie_embeddings: bool = fixed(True, "the head is the embedding transposed")
  time_conditioning: bool = fixed(False, "adaLN-zero on the mask rate")
  rope_theta: float = fixed(
    10_000.0, "base of the rotary frequencies", "[1, 1e12]"
  )
  remat: Literal["none", "dots", "full"] = field(
    "dots", "what the backward pass recomputes: nothing, all but matmuls, all"
  )
  dtype: Literal["auto", "float32", "bfloat16"] = field(
    "auto", "compute dtype (auto: bfloat16 on accelerators, float32 on CPU)"
  )
  attention: Literal["auto", "reference", "fused", "cudnn"] = field(
    "auto",
    "reference: plain products; fused: jax.nn.dot_product_attention; cudnn:"
    " the same by cuDNN's kernel, on a GPU in bfloat16; auto: reference on a"
    " CPU, cudnn on a GPU where it is right, else fused: the plan says which",
  )

  @property
  def mlp_size(self) -> int:
    """SwiGLU's hidden width."""
    return self.mlp_dim or -(-8 * self.embed_dim // (3 * 64)) * 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseConfig:
  """The noise schedule alpha(t), used where rates come from t ~ U(0, 1)."""

  schedule: Literal["linear", "cosine", "polynomial"] = fixed(
    "linear", "shape of alpha(t), from 1 at t=0 to 0 at t=1"
  )
  exponent: float = fixed(
    2.0, "of the polynomial schedule 1 - t**exponent", "[0.01, 100]"
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
  """What a training step minimises."""

  weighting: Literal["masked_ce", "nelbo"] = fixed(
    "masked_ce",
    "mean cross-entropy over masked tokens, or the unbiased likelihood bound",
  )
  label_smoothing: float = field(
    0.0, "training loss only; uniform over real tokens", "[0, 0.9]"
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """AdamW, warm-up, then one cosine cycle a stage."""

  name: Literal["adamw"] = fixed("adamw", "the optimizer")
  learning_rate: float = field(2e-4, "peak of the first stage", "(0, 1]")
  schedule: Literal["cosine_with_restarts"] = field(
    "cosine_with_restarts", "one cosine cycle a stage"
  )
  warmup_steps: int = field(
    1000,
    "optimizer updates of linear warm-up, once, at the start of the run",
    COUNT,
  )
  min_lr_ratio: float = field(
    0.1, "floor of every cycle / learning_rate", SHARE
  )
  weight_decay: float = field(
    0.1, "decoupled; not on norms, biases and embeddings", "[0, 1000]"
  )
  clip_norm: float = field(
    1.0, "global gradient norm, before Adam", "[1e-9, 1e9]"
  )
  b1: float = field(0.9, "decay of Adam's first moment", "[0, 0.999999]")
  b2: float = field(0.95, "decay of Adam's second moment", "[0, 0.999999]")
  eps: float = field(1e-8, "Adam's epsilon", "[1e-30, 1]")
  accumulation: int = fixed(1, "microbatches an optimizer update", SIZE)
  ema_decay: float = field(
    0.9999,
    "of the averaged parameters that are evaluated and sampled",
    SHARE,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Devices along each mesh axis; one of them may be -1 (what is left)."""

  replica: int = field(
    1, "data parallel, parameters replicated", "-1 or [1, 1048576]"
  )
  fsdp: int = field(
    -1, "data parallel, parameters sharded", "-1 or [1, 1048576]"
  )
  tensor: int = field(
    1, "heads, mlp and vocabulary split", "-1 or [1, 1048576]"
  )
