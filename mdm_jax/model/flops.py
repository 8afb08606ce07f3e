"""Analytic FLOPs of the model, for plans and model FLOPs utilisation (MFU).

Only matrix products count, with two operations per multiply-add; the backward
pass is twice the forward pass. Rematerialisation, softmaxes, norms, time
conditioning and the optimizer are not counted: MFU relates the work that the
model requires to the peak, not the work that an implementation does.
"""

from collections.abc import Sequence

from mdm_jax.core import accelerators
from mdm_jax.model.config import ModelConfig

# (queries, keys) per row, for each call of the model in an update.
Reads = Sequence[tuple[int, int]]


def trunk_flops(config: ModelConfig, rows: int, reads: Reads) -> float:
  """Returns the FLOPs of one forward pass through the blocks.

  Args:
    config: the denoiser.
    rows: number of rows B.
    reads: for each call of the model, the positions of a row it computes and
      how many positions each attends to. Segments of a packed row are ignored:
      masked pairs count, too.
  """
  queries = config.head_size * config.num_heads
  weights = sum(a * b for a, b in _products(config).values())
  # Attention: scores and weighted values, 2 K FLOPs each per head and pair.
  row = sum(q * (2 * weights + 4 * k * queries) for q, k in reads)
  return float(config.num_layers * row * rows)


def head_flops(config: ModelConfig, positions: int, vocab_size: int) -> float:
  """Returns the FLOPs of projecting some positions to the vocabulary."""
  return 2.0 * positions * config.embed_dim * vocab_size


def update_flops(
  config: ModelConfig, rows: int, reads: Reads, positions: int, vocab_size: int
) -> float:
  """Returns the FLOPs of an update, forward and backward.

  Args:
    config: the denoiser.
    rows: rows of the whole update, over all microbatches.
    reads: as in `trunk_flops`.
    positions: positions projected to the vocabulary, over all rows.
    vocab_size: rows of the embedding table, padding included.
  """
  trunk = trunk_flops(config, rows, reads)
  # A product's backward pass is two products of the same size.
  whole = 3 * (trunk + head_flops(config, positions, vocab_size))
  if not config.lora.rank:
    return whole
  tokens = config.num_layers * rows * sum(queries for queries, _ in reads)
  frozen = sum(2.0 * a * b for a, b in _products(config).values())
  added = sum(
    2.0 * config.lora.rank * sum(size)
    for name, size in _products(config).items()
    if name in (config.lora.products or (name,))
  )
  # Weights that stay as they are need no gradient: one product less.
  head = head_flops(config, positions, vocab_size)
  return whole - head + tokens * (3 * added - frozen)


def _products(config: ModelConfig) -> dict[str, tuple[int, int]]:
  """Returns the inputs and outputs of a block's products."""
  width, hidden = config.embed_dim, config.mlp_size
  queries = config.head_size * config.num_heads
  keys = config.head_size * (config.num_kv_heads or config.num_heads)
  gate = {"gate": (width, hidden)} if config.block == "swiglu" else {}
  return gate | {
    "query": (width, queries),
    "key": (width, keys),
    "value": (width, keys),
    "out": (queries, width),
    "up": (width, hidden),
    "down": (hidden, width),
  }


def peak_flops(device_kind: str) -> float | None:
  """Returns peak FLOP/s from a device's data sheet; None if not listed."""
  device = accelerators.by_kind(device_kind)
  return device.flops if device else None
