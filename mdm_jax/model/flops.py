"""Floating-point operations of an update, counted by hand.

Only matrix products count, two operations a multiply and add; the backward pass
is twice the forward. What is computed again to save memory is not counted, nor
are softmaxes, norms, time conditioning and the optimizer: this is the work the
model asks for.
"""

from mdm_jax.core import accelerators
from mdm_jax.model.config import ModelConfig


def trunk_flops(config: ModelConfig, rows: int, length: int) -> float:
  """Returns FLOPs of one forward pass of the blocks.

  Args:
    config: the denoiser.
    rows: B.
    length: L; attention is over all of it, whatever is packed.
  """
  width, hidden = config.embed_dim, config.mlp_size
  heads = config.num_heads
  shared = width // heads * (config.num_kv_heads or heads)
  weights = 2 * width * width + 2 * width * shared + 3 * width * hidden
  token = 2 * weights + 4 * length * width
  return float(config.num_layers * token * rows * length)


def head_flops(config: ModelConfig, positions: int, vocab_size: int) -> float:
  """Returns FLOPs of one forward pass of the vocabulary projection."""
  return 2.0 * positions * config.embed_dim * vocab_size


def update_flops(
  config: ModelConfig, rows: int, length: int, positions: int, vocab_size: int
) -> float:
  """Returns FLOPs of an update.

  Args:
    config: the denoiser.
    rows: of the whole update.
    length: tokens a row.
    positions: that go through the head, all rows together.
    vocab_size: rows of the embedding, padding included.
  """
  trunk = trunk_flops(config, rows, length)
  return 3 * (trunk + head_flops(config, positions, vocab_size))


def peak_flops(device_kind: str) -> float | None:
  """Returns a device's peak by its data sheet, None for one not listed."""
  device = accelerators.by_kind(device_kind)
  return device.flops if device else None
