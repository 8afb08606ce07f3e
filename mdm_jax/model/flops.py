"""Floating-point operations of an update, counted by hand.

Only matrix products count, two operations a multiply and add; the backward pass
is twice the forward. What is computed again to save memory is not counted, nor
are softmaxes, norms, time conditioning and the optimizer: this is the work the
model asks for.
"""

from collections.abc import Sequence

from mdm_jax.core import accelerators
from mdm_jax.model.config import ModelConfig

Reads = Sequence[tuple[int, int]]


def trunk_flops(config: ModelConfig, rows: int, reads: Reads) -> float:
  """Returns FLOPs of one forward pass of the blocks.

  Args:
    config: the denoiser.
    rows: B.
    reads: for every call of the model, the positions of a row that it computes
      and how many these attend to: all of them, whatever is packed.
  """
  width, hidden = config.embed_dim, config.mlp_size
  queries = config.head_size * config.num_heads
  keys = config.head_size * (config.num_kv_heads or config.num_heads)
  weights = 2 * width * queries + 2 * width * keys + 3 * width * hidden
  row = sum(q * (2 * weights + 4 * k * queries) for q, k in reads)
  return float(config.num_layers * row * rows)


def head_flops(config: ModelConfig, positions: int, vocab_size: int) -> float:
  """Returns FLOPs of one forward pass of the vocabulary projection."""
  return 2.0 * positions * config.embed_dim * vocab_size


def update_flops(
  config: ModelConfig, rows: int, reads: Reads, positions: int, vocab_size: int
) -> float:
  """Returns FLOPs of an update.

  Args:
    config: the denoiser.
    rows: of the whole update.
    reads: as of `trunk_flops`.
    positions: that go through the head, all rows together.
    vocab_size: rows of the embedding, padding included.
  """
  trunk = trunk_flops(config, rows, reads)
  return 3 * (trunk + head_flops(config, positions, vocab_size))


def peak_flops(device_kind: str) -> float | None:
  """Returns a device's peak by its data sheet, None for one not listed."""
  device = accelerators.by_kind(device_kind)
  return device.flops if device else None
