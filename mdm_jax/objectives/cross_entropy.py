"""The training objective: cross-entropy at the masked positions, and no other.

Unmasked positions never reach the vocabulary: the hidden states of the masked
ones are gathered first, into a buffer whose size the stage's rates bound
(`corruption.max_masked`), so the loss costs what is masked. The buffer then
goes through the vocabulary in chunks, each one's gradient computed along with
its loss, so neither a [B, L, V] array nor all logits of the buffer are ever
built. Rows are gathered within their own data shard, which costs no
communication.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from mdm_jax.core.sharding import (
  BATCH_AXES,
  RULES,
  gathered,
  sum_over_shards,
  vocab_ids,
)
from mdm_jax.core.vocabulary import Vocabulary

# Parameters of the vocabulary projection and hidden states, to logits.
Head = Callable[[Any, Float[Array, "N D"]], Float[Array, "N V"]]
_Losses = Callable[[Any, Float[Array, "N D"], Int[Array, "N"]], Array]

# Rows per chunk = 2 x embed_dim, so accumulating the head's gradient stays
# cheap; more where the chunk's logits are still a small array.
_ROWS_PER_WIDTH = 2
_SMALL = 2**24  # logits


def cross_entropy(
  logits: Float[Array, "N V"],
  targets: Int[Array, "N"],
  vocab: Vocabulary,
  label_smoothing: float = 0.0,
) -> Float[Array, "N"]:
  """Returns -log p(target), in float32, against a smoothed target if asked.

  The smoothed target is (1 - s) at the token and s / n at each of the n ids
  that can be predicted: never at the others, whose logits are -inf.

  Inside a `shard_map` every tensor shard has the logits of its own ids.
  """
  assert logits.dtype == jnp.float32, logits.dtype
  ids = vocab_ids(logits.shape[-1])[None]
  total, largest = _over_vocabulary()
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


def _over_vocabulary():
  """Returns what adds up over tensor shards, and what takes their maximum."""
  if RULES.vocab not in jax.sharding.get_abstract_mesh().manual_axes:
    return (lambda x: x,) * 2
  return (
    functools.partial(jax.lax.psum, axis_name=RULES.vocab),
    functools.partial(jax.lax.pmax, axis_name=RULES.vocab),
  )


def masked_cross_entropy(
  head: Head,
  params: Any,
  hidden: Float[Array, "B L D"],
  x0: Int[Array, "B L"],
  masked: Bool[Array, "B L"],
  capacity: int,
  vocab: Vocabulary,
  label_smoothing: float = 0.0,
) -> Float[Array, "B L"]:
  """Returns the cross-entropy at masked positions, and zeros elsewhere.

  Args:
    head: the vocabulary projection, to float32 logits.
    params: of the head.
    hidden: the denoiser's output before the head.
    x0: clean tokens.
    masked: where the loss is.
    capacity: masked tokens a data shard has at most; a batch with more is a
      bug, and gives NaN rather than a wrong number.
    vocab: which ids can be targets.
    label_smoothing: see `cross_entropy`.
  """
  losses = _losses(head, vocab, label_smoothing)
  chunks = num_chunks(capacity, hidden.shape[-1], vocab)
  states, targets, _, slot = _pack_shards(hidden, x0, masked, capacity, chunks)

  def by_chunk(params, *parts):
    return jax.lax.map(lambda part: losses(params, *part), parts)

  params = _gathered(params, hidden.dtype)
  packed = _in_shards(by_chunk, _BY_SLOT)(params, states, targets)
  return _unpack_shards(packed, masked, slot)


def masked_loss(
  head: Head,
  params: Any,
  hidden: Float[Array, "B L D"],
  x0: Int[Array, "B L"],
  masked: Bool[Array, "B L"],
  weight: Float[Array, "B L"],
  capacity: int,
  vocab: Vocabulary,
  label_smoothing: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, "B L"]]:
  """Returns the sum of weight * cross-entropy, and `masked_cross_entropy`.

  For training: the sum's gradient needs no logits of the forward pass. What it
  is a sum of comes along, without a gradient.

  Args:
    head: as in `masked_cross_entropy`, and so are all others.
    weight: of every masked token; read at no other position.
  """
  losses = _losses(head, vocab, label_smoothing)
  chunks = num_chunks(capacity, hidden.shape[-1], vocab)
  states, targets, position, slot = _pack_shards(
    hidden, x0, masked, capacity, chunks
  )
  rows = P(BATCH_AXES)
  weigh = jax.shard_map(
    functools.partial(_pack_weights, chunks=chunks),
    in_specs=(rows, rows, rows),
    out_specs=P(None, *rows),
  )
  weights = weigh(weight, masked, position)
  total, packed = _weighted_sum(losses, params, states, targets, weights)
  packed = jax.lax.stop_gradient(packed)
  return total, _unpack_shards(packed, masked, slot)


def _losses(head: Head, vocab: Vocabulary, label_smoothing: float) -> _Losses:
  def losses(params, states, targets):
    logits = head(params, states)
    return cross_entropy(logits, targets, vocab, label_smoothing)

  return losses


def num_chunks(capacity: int, width: int, vocab: Vocabulary) -> int:
  """Returns how many chunks the buffer goes through the vocabulary in."""
  rows = max(_ROWS_PER_WIDTH * width, _SMALL // vocab.predictable)
  return -(-capacity // rows)


# MARK: the sum, and its gradient along with it


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_sum(
  losses: _Losses,
  params: Any,
  states: Float[Array, "C N D"],
  targets: Int[Array, "C N"],
  weights: Float[Array, "C N"],
) -> tuple[Float[Array, ""], Float[Array, "C N"]]:
  """Sums weights * losses over chunks; returns also the losses.

  The sum is linear in what comes back for it, so each chunk's gradient can be
  computed where its logits are: they are not kept, nor computed again.
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
      (value, by_slot), (more, by_states) = value_and_grad(whole, *part)
      add = lambda a, b: a + b.astype(a.dtype)
      by_params = jax.tree.map(add, by_params, more)
      return (total + value, by_params), (by_slot, by_states)

    # In the parameters' dtype, whatever the products are in.
    zeros = lambda w, p: jnp.zeros_like(w, p.dtype)
    start = _zero(), jax.tree.map(zeros, whole, params)
    (total, by_params), by_part = jax.lax.scan(chunk, start, parts)
    # Once for all chunks, and to each shard its own part.
    by_params = jax.tree.map(sum_over_shards, by_params, specs)
    return jax.lax.psum(total, BATCH_AXES), by_params, *by_part

  out_specs = P(), specs, _BY_SLOT, _BY_SLOT
  total, by_params, by_slot, by_states = _in_shards(sum_chunks, out_specs)(
    _gathered(params, states.dtype), states, targets, weights
  )
  return (total, by_slot), (by_params, by_states)


def _weighted_sum_backward(losses, gradients, grads):
  del losses
  grad, _ = grads  # nothing is differentiated by way of the losses
  scale = lambda g: g * grad.astype(g.dtype)
  return *jax.tree.map(scale, gradients), None, None


_weighted_sum.defvjp(_weighted_sum_forward, _weighted_sum_backward)


# MARK: the vocabulary's parameters, in every data shard

_BY_SLOT = P(None, BATCH_AXES)  # chunks, slots of all shards


def _in_shards(function: Callable[..., Any], out_specs: Any):
  """Returns a function that every shard calls by itself.

  Its first argument is what `_gathered` returns, each tensor shard's part of
  it; the others are chunks of the data shard's slots.
  """

  def by_itself(params, *parts):
    mine = lambda p: jax.lax.pcast(p, BATCH_AXES, to="varying")
    return function(jax.tree.map(mine, params), *parts)

  def call(params, *parts):
    specs = jax.tree.map(lambda p: jax.typeof(p).sharding.spec, params)
    in_specs = specs, *[_BY_SLOT] * len(parts)
    run = jax.shard_map(by_itself, in_specs=in_specs, out_specs=out_specs)
    return run(params, *parts)

  return call


def _gathered(params: Any, dtype: jnp.dtype) -> Any:
  """Brings parameters together once for all chunks, as the head reads them."""

  def gather(p):
    p = p.astype(dtype) if p.ndim > 1 else p
    return jax.reshard(p, gathered(jax.typeof(p).sharding.spec))

  return jax.tree.map(gather, params)


def _zero() -> Float[Array, ""]:
  """Returns 0 for a sum that differs between shards, as the chunks do."""
  return jax.lax.pcast(jnp.float32(0), BATCH_AXES, to="varying")


# MARK: the buffer


def _pack_shards(hidden, x0, masked, capacity: int, chunks: int):
  """Packs every data shard's masked positions, by itself."""
  rows = P(BATCH_AXES)
  pack = jax.shard_map(
    functools.partial(_pack, capacity=capacity, chunks=chunks),
    in_specs=(rows, rows, rows),
    out_specs=(P(None, *rows), P(None, *rows), rows, rows),
  )
  return pack(hidden, x0, masked)


def _pack(
  hidden: Float[Array, "B L D"],
  x0: Int[Array, "B L"],
  masked: Bool[Array, "B L"],
  capacity: int,
  chunks: int,
) -> tuple[
  Float[Array, "C N D"], Int[Array, "C N"], Int[Array, "S"], Int[Array, "M"]
]:
  """Puts one shard's masked positions in the slots of a short buffer.

  Returns also which position fills each slot, and which slot each position
  fills; past the end for slots and positions that are left over.
  """
  slots = -(-capacity // chunks) * chunks
  flat = masked.reshape(-1)
  first = jnp.argsort(~flat, stable=True)  # faster than nonzero
  first = jnp.pad(first, (0, slots))[:slots]
  filled = jnp.arange(slots) < flat.sum()
  position = jnp.where(filled, first, flat.size)
  slot = jnp.where(flat, jnp.cumsum(flat) - 1, slots)
  states = _move(hidden.reshape(flat.size, -1), position, slot)
  targets = x0.reshape(-1).at[position].get(mode="fill", fill_value=0)
  in_chunks = lambda x: x.reshape(chunks, -1, *x.shape[1:])
  return in_chunks(states), in_chunks(targets), position, slot


def _pack_weights(
  weight: Float[Array, "B L"],
  masked: Bool[Array, "B L"],
  position: Int[Array, "S"],
  chunks: int,
) -> Float[Array, "C N"]:
  """Puts one shard's weights in the slots; NaN where there are too few."""
  weights = weight.reshape(-1).at[position].get(mode="fill", fill_value=0)
  overflow = masked.sum() > position.size
  return jnp.where(overflow, jnp.nan, weights).reshape(chunks, -1)


def _unpack_shards(packed, masked, slot):
  """Puts every data shard's losses back, by itself."""
  rows = P(BATCH_AXES)
  unpack = jax.shard_map(
    _unpack, in_specs=(P(None, *rows), rows, rows), out_specs=rows
  )
  return unpack(packed, masked, slot)


def _unpack(
  losses: Float[Array, "C N"],
  masked: Bool[Array, "B L"],
  slot: Int[Array, "M"],
) -> Float[Array, "B L"]:
  """Puts one shard's losses back where they came from."""
  placed = losses.reshape(-1).at[slot].get(mode="fill", fill_value=0)
  overflow = masked.sum() > losses.size
  return jnp.where(overflow, jnp.nan, placed.reshape(masked.shape))


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
