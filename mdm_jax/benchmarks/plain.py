"""A straightforward training step for the same objective, for comparison.

It is written as MD4's is (Shi et al. 2024, arXiv 2406.04329). The same as in
the library: the denoiser's blocks, their dtype, the head's weights, the
distribution of a row's mask rate, the bound that is minimised, float32
parameters, AdamW and a parameter average. What differs is MD4's way:

- every position goes through the vocabulary, masked or not: logits [B, L, V]
- the cross-entropy is a product with a one-hot array [B, L, V]
- every token is masked by its own coin, and a masked one has the weight
  -alpha'(t) / (1 - alpha(t)): in rates, 1 / (p(r) r)
- one offset for the rates of a batch; the number of masked tokens is not
  bounded
- AdamW alone: no clipping, no norms in the metrics, no check for NaN, weight
  decay on everything

MD4's own blocks are float32, unrolled and without fused attention. Their cost
is left out here (`md4.py` has it), so this compares the step around the blocks.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from mdm_jax.core import rng
from mdm_jax.core.sharding import RULES
from mdm_jax.data.batches import Batch
from mdm_jax.model.context import row_context
from mdm_jax.model.denoiser import Denoiser, Params
from mdm_jax.objectives.noise import RateDistribution
from mdm_jax.training.state import TrainState
from mdm_jax.training.step import TrainStep

_EMA = 0.9999


def make_optimizer(schedule: optax.Schedule) -> optax.GradientTransformation:
  """Returns AdamW with MD4's default settings."""
  return optax.adamw(schedule, b1=0.9, b2=0.999, weight_decay=0.03)


def cross_entropy(
  logits: Float[Array, "N V"], targets: Int[Array, "N"]
) -> Float[Array, "N"]:
  """Returns -log p(target), by a product with a one-hot array."""
  log_p = jax.nn.log_softmax(logits, axis=-1)
  one_hot = jax.nn.one_hot(targets, logits.shape[-1])
  picked = jnp.where(one_hot > 0, one_hot * log_p, 0.0)
  return -picked.sum(axis=-1)


def losses(
  denoiser: Denoiser,
  params: Params,
  hidden: Float[Array, "B L D"],
  x0: Int[Array, "B L"],
  masked: Bool[Array, "B L"],
) -> Float[Array, "B L"]:
  """Returns cross-entropies, zero where not masked.

  As in MD4 they are computed at all positions, and most are thrown away.

  Args:
    denoiser: the model.
    params: its parameters.
    hidden: output of its last block.
    x0: clean tokens.
    masked: which positions count.
  """
  flat = lambda x: x.reshape(-1, *x.shape[2:])
  logits = denoiser.logits(params, flat(hidden))
  logits = jax.reshard(logits, RULES.spec("batch", None))
  # At all positions: what the library avoids, and what is measured here.
  values = cross_entropy(logits, flat(x0)).reshape(masked.shape)
  return jnp.where(masked, values, 0.0)


def mask_tokens(
  key: Array, x0: Int[Array, "B L"], rate: Float[Array, "B"], mask_id: int
) -> Int[Array, "B L"]:
  """Masks each token with its row's probability, independently."""
  keep = jax.random.uniform(key, x0.shape)
  keep = jax.reshard(keep, RULES.spec("batch", None)) >= rate[:, None]
  return jnp.where(keep, x0, mask_id)


def make_train_step(
  denoiser: Denoiser,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
  rates: RateDistribution,
  mask_id: int,
) -> TrainStep:
  """Returns the jitted update of one batch; it donates the state."""

  def loss_fn(params: Params, x0, segments, key):
    rate_key, mask_key = jax.random.split(key)
    rows = len(x0)
    u = jnp.mod(jax.random.uniform(rate_key) + jnp.arange(rows) / rows, 1.0)
    u = jax.reshard(1 - u, RULES.spec("batch"))  # in (0, 1]
    rate = rates.rate(u)
    xt = mask_tokens(mask_key, x0, rate, mask_id)
    context = row_context(segments, condition=rate)
    hidden = denoiser.hidden(params, xt, context)
    masked = xt == mask_id
    by_row = losses(denoiser, params, hidden, x0, masked).sum(axis=1)
    weight = rates.inverse_density(u) / rate
    return (weight * by_row).mean() / x0.shape[1]

  @jax.jit(donate_argnums=0)
  def train_step(state: TrainState, batch: Batch):
    x0, segments = batch.tokens[0], batch.segments[0]
    key = rng.stream(0, "plain", state.step)
    loss, grads = jax.value_and_grad(loss_fn)(state.params, x0, segments, key)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = jax.tree.map(
      lambda x, y: x + (1 - _EMA) * (y - x), state.ema_params, params
    )
    new = TrainState(state.step + 1, params, ema, opt_state)
    return new, {"loss": loss, "learning_rate": schedule(state.step)}

  return train_step
