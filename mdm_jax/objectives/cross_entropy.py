"""Memory-efficient cross-entropy at masked positions only.

The hidden states of masked positions are gathered into a buffer before the
vocabulary projection, so its cost is proportional to the masked tokens. The
stage's mask rates bound the buffer's size (`corruption.max_masked`). The buffer
is projected in chunks, and each chunk's gradient is computed with its loss, so
neither a [B, L, V] array nor the logits of the whole buffer are ever built. The
gather stays within a data shard: it needs no communication.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from mdm_jax.core import hardware
from mdm_jax.core.sharding import (
  BATCH_AXES,
  gathered,
  sum_over_shards,
  vocab_ids,
)
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.model.last_mlp import Unfinished
from mdm_jax.objectives import masked_positions, one_pass

# (params, hidden states) -> logits.
Head = Callable[[Any, Float[Array, "N D"]], Float[Array, "N V"]]
# (params, hidden states, targets) -> losses [N].
_Losses = Callable[[Any, Float[Array, "N D"], Int[Array, "N"]], Array]

# Rows per chunk = 2 x embed_dim, so accumulating the head's gradient stays
# cheap; more where the chunk's logits are still a small array.
_ROWS_PER_WIDTH = 2
_SMALL = 2**24  # logits
# On a GPU every chunk is some launches and a pass over the head's gradient, and
# 1 GiB of logits is little.
_SMALL_ON_A_GPU = 2**28
# Without a gradient a chunk need not pay for a pass over the head.
_ROWS_WITHOUT_GRADIENT = 256


def cross_entropy(
  logits: Float[Array, "N V"],
  targets: Int[Array, "N"],
  vocab: Vocabulary,
  label_smoothing: float = 0.0,
) -> Float[Array, "N"]:
  """Returns the cross-entropy of each target in nats, in float32.

  With label smoothing s, the target distribution is 1 - s at the token plus
  s / n at each of the n predictable ids. Other ids get nothing: their logits
  are -inf, which would make the loss infinite.

  Inside a `shard_map` over the vocabulary, `logits` holds the ids of this
  tensor shard only; the result is that of the whole vocabulary.

  Args:
    logits: unnormalized log-probabilities, float32.
    targets: id of the correct token.
    vocab: which ids can be predicted.
    label_smoothing: s, between 0 and 1.
  """
  assert logits.dtype == jnp.float32, logits.dtype
  if hardware.on_gpu():
    return one_pass.cross_entropy(logits, targets, vocab, label_smoothing)
  ids = vocab_ids(logits.shape[-1])[None]
  total, largest = one_pass.over_vocabulary()
  # log_z does not depend on the maximum, it only avoids overflow in exp.
  highest = largest(jax.lax.stop_gradient(logits.max(axis=-1)))
  exp = jnp.exp(logits - highest[:, None])
  log_z = jnp.log(total(exp.sum(axis=-1))) + highest
  # Compare and sum: one fused pass that also works on a split vocabulary.
  target = total(jnp.where(ids == targets[:, None], logits, 0.0).sum(axis=-1))
  if label_smoothing == 0:
    return log_z - target
  possible = jnp.where(vocab.is_predictable(ids), logits, 0.0)
  mean = total(possible.sum(axis=-1)) / vocab.predictable
  return log_z - (1 - label_smoothing) * target - label_smoothing * mean


def masked_cross_entropy(
  head: Head,
  params: Any,
  hidden: Float[Array, "B L D"] | Unfinished,
  x0: Int[Array, "B L"],
  masked: Bool[Array, "B L"],
  capacity: int,
  vocab: Vocabulary,
  label_smoothing: float = 0.0,
) -> Float[Array, "B L"]:
  """Returns the cross-entropy at masked positions, and zeros elsewhere.

  For evaluation; `masked_loss` is the one to differentiate.

  Args:
    head: the vocabulary projection, to float32 logits.
    params: the head's parameters.
    hidden: the denoiser's output before the head, or what `Unfinished` has of
      it, which then is finished at masked positions only.
    x0: clean tokens.
    masked: True at the positions to score.
    capacity: maximum number of masked tokens per data shard. A batch with more
      is a bug, and gives NaN rather than a wrong number.
    vocab: which ids can be predicted.
    label_smoothing: see `cross_entropy`.
  """
  losses = _losses(head, vocab, label_smoothing)
  rows = max(_ROWS_WITHOUT_GRADIENT, _small() // vocab.predictable)
  chunks = -(-capacity // rows)
  states, targets, _, slot = masked_positions.pack(
    hidden, x0, masked, capacity, chunks
  )

  def by_chunk(params, *parts):
    return jax.lax.map(lambda part: losses(params, *part), parts)

  params = _gathered(params, states.dtype)
  packed = _in_shards(by_chunk, _BY_SLOT)(params, states, targets)
  return masked_positions.unpack(packed, masked, slot)


def masked_loss(
  head: Head,
  params: Any,
  hidden: Float[Array, "B L D"] | Unfinished,
  x0: Int[Array, "B L"],
  masked: Bool[Array, "B L"],
  weight: Float[Array, "B L"],
  capacity: int,
  vocab: Vocabulary,
  label_smoothing: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, "B L"]]:
  """Returns the sum of weight * cross-entropy, and the cross-entropies.

  For training: the gradient is computed in the forward pass, so no logits are
  kept for a backward pass. No gradient flows through the second result.

  Args:
    head: this and all others as in `masked_cross_entropy`.
    weight: weight of each masked token; not read elsewhere.
  """
  losses = _losses(head, vocab, label_smoothing)
  chunks = num_chunks(capacity, hidden.shape[-1], vocab)
  states, targets, position, slot = masked_positions.pack(
    hidden, x0, masked, capacity, chunks
  )
  rows = P(BATCH_AXES)
  weigh = jax.shard_map(
    functools.partial(masked_positions.pack_weights, chunks=chunks),
    in_specs=(rows, rows, rows),
    out_specs=P(None, *rows),
  )
  weights = weigh(weight, masked, position)
  total, packed = _weighted_sum(losses, params, states, targets, weights)
  packed = jax.lax.stop_gradient(packed)
  return total, masked_positions.unpack(packed, masked, slot)


def _losses(head: Head, vocab: Vocabulary, label_smoothing: float) -> _Losses:
  def losses(params, states, targets):
    logits = head(params, states)
    return cross_entropy(logits, targets, vocab, label_smoothing)

  return losses


def num_chunks(capacity: int, width: int, vocab: Vocabulary) -> int:
  """Returns the number of chunks that training projects a buffer in.

  Args:
    capacity: size of the buffer, in tokens.
    width: embedding size.
    vocab: the vocabulary.
  """
  rows = max(_ROWS_PER_WIDTH * width, _small() // vocab.predictable)
  return -(-capacity // rows)


def _small() -> int:
  return _SMALL_ON_A_GPU if hardware.on_gpu() else _SMALL


# MARK: the sum, and its gradient along with it


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_sum(
  losses: _Losses,
  params: Any,
  states: Float[Array, "C N D"],
  targets: Int[Array, "C N"],
  weights: Float[Array, "C N"],
) -> tuple[Float[Array, ""], Float[Array, "C N"]]:
  """Returns the sum of weights * losses over chunks, and the losses.

  The gradient of a scalar is linear in its cotangent. So the forward pass can
  compute each chunk's gradient while its logits exist, and the backward pass
  only scales it: logits are neither kept nor recomputed.
  """

  def sum_chunks(params, *parts):
    def chunk(total, part):
      value, by_slot = _chunk_sum(losses, params, *part)
      return total + value, by_slot

    total, by_slot = jax.lax.scan(chunk, _zero(), parts)
    return jax.lax.psum(total, BATCH_AXES), by_slot

  add_up = _in_shards(sum_chunks, (P(), _BY_SLOT))
  return add_up(_gathered(params, states.dtype), states, targets, weights)


def _chunk_sum(losses, params, states, targets, weights):
  by_slot = losses(params, states, targets)
  return (weights * by_slot).sum(), by_slot


def _weighted_sum_forward(losses, params, states, targets, weights):
  value_and_grad = jax.value_and_grad(
    functools.partial(_chunk_sum, losses), argnums=(0, 1), has_aux=True
  )
  specs = jax.tree.map(lambda p: jax.typeof(p).sharding.spec, params)

  def sum_chunks(whole, *parts):
    def chunk(carry, part):
      total, by_params = carry
      # Here and not before the loop, where XLA would drop both casts of a
      # matrix (`_gathered`) and repeat the first one in every chunk.
      given = jax.tree.map(lambda w, p: w.astype(p.dtype), whole, params)
      (value, by_slot), (more, by_states) = value_and_grad(given, *part)
      add = lambda a, b: a + b.astype(a.dtype)
      by_params = jax.tree.map(add, by_params, more)
      return (total + value, by_params), (by_slot, by_states)

    # Accumulate in the parameters' dtype: chunks may be computed in bfloat16.
    zeros = lambda w, p: jnp.zeros_like(w, p.dtype)
    start = _zero(), jax.tree.map(zeros, whole, params)
    (total, by_params), by_part = jax.lax.scan(chunk, start, parts)
    # Reduce-scatter the head's gradient once, not after every chunk.
    by_params = jax.tree.map(sum_over_shards, by_params, specs)
    return jax.lax.psum(total, BATCH_AXES), by_params, *by_part

  out_specs = P(), specs, _BY_SLOT, _BY_SLOT
  total, by_params, by_slot, by_states = _in_shards(sum_chunks, out_specs)(
    _gathered(params, states.dtype), states, targets, weights
  )
  return (total, by_slot), (by_params, by_states)


def _weighted_sum_backward(losses, gradients, grads):
  del losses
  grad, _ = grads  # `masked_loss` stops gradients through the losses
  scale = lambda g: g * grad.astype(g.dtype)
  return *jax.tree.map(scale, gradients), None, None


_weighted_sum.defvjp(_weighted_sum_forward, _weighted_sum_backward)


# MARK: the vocabulary's parameters, in every data shard

_BY_SLOT = P(None, BATCH_AXES)  # [chunks, slots of all shards, ...]


def _in_shards(function: Callable[..., Any], out_specs: Any):
  """Returns `function` wrapped in a `shard_map`.

  Args:
    function: takes the result of `_gathered` (this tensor shard's part), then
      arrays with this data shard's slots.
    out_specs: as in `jax.shard_map`.
  """

  def by_itself(params, *parts):
    # Mark the parameters as different in each data shard: else the transpose
    # would sum their gradient over shards in every chunk.
    mine = lambda p: jax.lax.pcast(p, BATCH_AXES, to="varying")
    return function(jax.tree.map(mine, params), *parts)

  def call(params, *parts):
    specs = jax.tree.map(lambda p: jax.typeof(p).sharding.spec, params)
    in_specs = specs, *[_BY_SLOT] * len(parts)
    run = jax.shard_map(by_itself, in_specs=in_specs, out_specs=out_specs)
    return run(params, *parts)

  return call


def _gathered(params: Any, dtype: jnp.dtype) -> Any:
  """Gathers parameters over data shards, once for all chunks."""

  def gather(p):
    # Matrices are cast first: the gather then moves the compute dtype's bytes.
    # The chunks cast them back for their gradients to be in the parameters'
    # dtype, as the sum over chunks is.
    small = p.astype(dtype) if p.ndim > 1 else p
    return jax.reshard(small, gathered(jax.typeof(p).sharding.spec))

  return jax.tree.map(gather, params)


def _zero() -> Float[Array, ""]:
  """Returns 0, typed as varying over data shards; starts a sum over chunks."""
  return jax.lax.pcast(jnp.float32(0), BATCH_AXES, to="varying")
