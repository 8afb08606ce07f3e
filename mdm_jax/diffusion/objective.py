"""The training objective: cross-entropy at the masked positions, and no other.

Unmasked positions never reach the vocabulary: the hidden states of the masked
ones are gathered first, into a buffer whose size the stage's rates bound
(`corruption.max_masked`), so the loss costs what is masked and a [B, L, V]
array is never built. Rows are gathered within their own data shard, which
costs no communication.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from mdm_jax.core.config import ObjectiveConfig
from mdm_jax.core.sharding import BATCH_AXES

Head = Callable[[Float[Array, "N D"]], Float[Array, "N V"]]


def row_weights(
  config: ObjectiveConfig,
  masked: Bool[Array, "*B L"],
  real: Bool[Array, "*B L"],
  inverse_density: Float[Array, "*B"],
) -> Float[Array, "*B"]:
  """Returns what each masked token of a row weighs; all rows together sum to 1.

  `masked_ce`: the mean over masked tokens, every one weighing the same.
  `nelbo`: the bound per real token. For a row of n real tokens, k of them
  masked, with a rate drawn from the density p, the estimate of its bound is
  n / p(r) times the mean cross-entropy of the k.
  """
  count = masked.sum(axis=-1).astype(jnp.float32)
  length = real.sum(axis=-1).astype(jnp.float32)
  match config.weighting:
    case "masked_ce":
      return jnp.ones_like(count) / jnp.maximum(count.sum(), 1)
    case "nelbo":
      share = length / jnp.maximum(length.sum(), 1)
      return share * inverse_density / jnp.maximum(count, 1)


def cross_entropy(
  logits: Float[Array, "N V"],
  targets: Int[Array, "N"],
  num_real: int,
  label_smoothing: float = 0.0,
) -> Float[Array, "N"]:
  """Returns -log p(target), in float32, against a smoothed target if asked.

  The smoothed target is (1 - s) at the token and s / num_real at each of the
  ids below `num_real`: never at MASK or PAD, whose logits are -inf.
  """
  assert logits.dtype == jnp.float32, logits.dtype
  ids = jnp.arange(logits.shape[-1])[None]
  log_z = jax.nn.logsumexp(logits, axis=-1)
  # Compare and sum: one fused pass that also works on a split vocabulary.
  target = jnp.where(ids == targets[:, None], logits, 0.0).sum(axis=-1)
  if label_smoothing == 0:
    return log_z - target
  mean = jnp.where(ids < num_real, logits, 0.0).sum(axis=-1) / num_real
  return log_z - (1 - label_smoothing) * target - label_smoothing * mean


def masked_cross_entropy(
  head: Head,
  hidden: Float[Array, "B L D"],
  x0: Int[Array, "B L"],
  masked: Bool[Array, "B L"],
  capacity: int,
  num_real: int,
  label_smoothing: float = 0.0,
) -> Float[Array, "B L"]:
  """Returns the cross-entropy at masked positions, and zeros elsewhere.

  Args:
    head: the vocabulary projection, to float32 logits.
    hidden: the denoiser's output before the head.
    x0: clean tokens.
    masked: where the loss is.
    capacity: masked tokens a data shard has at most; a batch with more is a
      bug, and gives NaN rather than a wrong number.
    num_real: ids that can be targets.
    label_smoothing: see `cross_entropy`.
  """
  rows = P(BATCH_AXES)
  pack = jax.shard_map(
    lambda *shard: _pack(*shard, capacity=capacity),
    in_specs=(rows, rows, rows),
    out_specs=(rows, rows, rows, rows),
  )
  states, targets, position, slot = pack(hidden, x0, masked)
  losses = cross_entropy(head(states), targets, num_real, label_smoothing)
  unpack = jax.shard_map(
    _unpack, in_specs=(rows, rows, rows, rows), out_specs=rows
  )
  return unpack(losses, masked, position, slot)


def _pack(
  hidden: Float[Array, "B L D"],
  x0: Int[Array, "B L"],
  masked: Bool[Array, "B L"],
  capacity: int,
) -> tuple[
  Float[Array, "N D"], Int[Array, "N"], Int[Array, "N"], Int[Array, "M"]
]:
  """Puts one shard's masked positions in the slots of a short buffer.

  Returns also which position fills each slot, and which slot each position
  fills; past the end for slots and positions that are left over.
  """
  flat = masked.reshape(-1)
  first = jnp.argsort(~flat, stable=True)[:capacity]  # faster than nonzero
  position = jnp.where(flat[first], first, flat.size)
  slot = jnp.where(flat, jnp.cumsum(flat) - 1, capacity)
  states = _move(hidden.reshape(flat.size, -1), position, slot)
  targets = x0.reshape(-1).at[position].get(mode="fill", fill_value=0)
  return states, targets, position, slot


def _unpack(
  losses: Float[Array, "N"],
  masked: Bool[Array, "B L"],
  position: Int[Array, "N"],
  slot: Int[Array, "M"],
) -> Float[Array, "B L"]:
  """Puts one shard's losses back where they came from."""
  placed = _move(losses, slot, position).reshape(masked.shape)
  overflow = masked.sum() > losses.shape[0]
  return jnp.where(overflow, jnp.nan, placed)


@jax.custom_vjp
def _move(
  x: Float[Array, "N *D"], source: Int[Array, "M"], back: Int[Array, "N"]
) -> Float[Array, "M *D"]:
  """Takes rows of x, zeros past the end; `back` is the inverse of `source`.

  Knowing the inverse, the gradient is a gather too, where JAX would scatter.
  """
  return x.at[source].get(mode="fill", fill_value=0)


def _move_forward(x, source, back):
  return _move(x, source, back), (source, back)


def _move_backward(indices, grad):
  source, back = indices
  return _move(grad, back, source), None, None


_move.defvjp(_move_forward, _move_backward)
