"""MD4's own model and training step, for comparison.

Re-creates google-deepmind/md4 (Shi et al. 2024, arXiv 2406.04329) as its text
configs set it up. What costs time or memory is the same:

- blocks are unrolled, everything is float32, nothing is rematerialised
- queries, keys and values are three products, [B, L, H, K]; rotary embeddings
  rotate adjacent pairs; scores [B, H, L, L] are materialised; a position
  attends to its whole row
- a gated MLP (sigmoid) of three products; adaLN-zero from the time; an untied
  head initialised to zero; logits [B, L, V], with V the predictable ids
- dropout draws a whole mask, [B, H, L, L] for attention. The rate is 0 as in
  their configs, or --dropout; their sweeps have 0.02 and 0.05
- antithetic times, a coin per token, one-hot cross-entropy at all positions
- AdamW on everything, a parameter average, no clipping; every device has a
  copy of the state, which is not donated (theirs means to be, but pmap donates
  no argument that is passed by name)

Taken from the library: layers, width, heads, MLP width (the same as theirs
except in `tiny`), batch, learning rate, and the distribution of a row's mask
rate, so that the objective is the same (theirs: U(0, 1) less 1e-4 at both ends,
in bits).
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import optax
from jax.nn import initializers
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key

from mdm_jax.core import rng
from mdm_jax.core.sharding import BATCH_AXES, RULES
from mdm_jax.model.config import ModelConfig
from mdm_jax.model.denoiser import Params
from mdm_jax.objectives.noise import RateDistribution
from mdm_jax.training.state import TrainState
from mdm_jax.training.step import TrainStep


def init(key: Key[Array, ""], model: ModelConfig, vocab_size: int) -> Params:
  """Returns fresh parameters.

  Args:
    key: for the random initial values.
    model: layers, widths and heads.
    vocab_size: number of predictable ids; the mask's id comes after them.
  """
  width, hidden = model.embed_dim, model.mlp_size
  keys, time = _keys(key), width // model.num_heads

  def dense(fan_in: int, fan_out: int, scale: float = 1.0):
    draw = initializers.variance_scaling(scale, "fan_in", "truncated_normal")
    return draw(next(keys), (fan_in, fan_out))

  affine = lambda weight: (weight, jnp.zeros(weight.shape[1]))
  # MD4 scales the MLP's initial weights down with depth.
  inward = functools.partial(dense, width, hidden, 2 / model.num_layers)
  block = lambda: {
    "modulation": affine(jnp.zeros((time, 6 * width))),
    **{n: dense(width, width) for n in ("query", "key", "value", "out")},
    **{"gate": inward(), "up": inward()},
    "down": dense(hidden, width, 2 / model.num_layers),
  }
  table = vocab_size + 1, width  # the last row is MASK's
  return {
    "embedding": initializers.normal(width**-0.5)(next(keys), table),
    "time_in": affine(dense(time, 4 * time)),
    "time_out": affine(dense(4 * time, time)),
    "blocks": [block() for _ in range(model.num_layers)],
    "modulation": affine(jnp.zeros((time, 2 * width))),
    "head": jnp.zeros((width, vocab_size)),
  }


def logits(
  params: Params,
  xt: Int[Array, "B L"],
  rate: Float[Array, "B"],
  model: ModelConfig,
  key: Key[Array, ""],
) -> Float[Array, "B L V"]:
  """Returns the logits of all positions.

  Args:
    params: made by `init`.
    xt: masked tokens.
    rate: mask rate of each row, the model's time.
    model: layers, widths and heads.
    key: for dropout.
  """
  size = model.embed_dim // model.num_heads
  drop = functools.partial(_dropout, rate=model.dropout, keys=_keys(key))
  condition = _condition(params, rate, size)
  x = drop(params["embedding"][xt])
  cos, sin = _rotary(xt.shape[1], size)
  for block in params["blocks"]:
    a, b, c, d, e, f = _modulation(block, condition, 6)
    h = _attention(block, _norm(x) * (b + 1) + a, cos, sin, drop)
    x = x + c * drop(h, over_length=True)
    h = _norm(x) * (e + 1) + d
    h = (jax.nn.sigmoid(h @ block["gate"]) * (h @ block["up"])) @ block["down"]
    x = x + f * drop(h, over_length=True)
  shift, scale = _modulation(params, condition, 2)
  return (_norm(x) * (scale + 1) + shift) @ params["head"]


def _keys(key: Key[Array, ""]):
  return map(functools.partial(jax.random.fold_in, key), itertools.count())


def _affine(part: tuple[Array, Array], x: Float[Array, "B N"]) -> Array:
  return x @ part[0] + part[1][None]


def _condition(params: Params, rate: Float[Array, "B"], size: int):
  frequency = 10_000.0 ** -jnp.linspace(0.0, 1.0, size // 2)
  angles = 1000 * rate[:, None] * frequency[None]
  features = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
  hidden = jax.nn.swish(_affine(params["time_in"], features))
  return _affine(params["time_out"], hidden)


def _modulation(part: Params, condition: Float[Array, "B N"], count: int):
  """Returns `count` arrays [B, 1, D] of shifts, scales and gates."""
  both = _affine(part["modulation"], jax.nn.sigmoid(condition))
  return jnp.split(both[:, None], count, axis=-1)


def _norm(x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
  # The order is flax's. With the mean subtracted first, XLA's CPU compiler
  # fuses 6 layers in a way that doubles the time of a step.
  square = jnp.square(x)
  mean, mean_square = x.mean(axis=-1), square.mean(axis=-1)
  variance = jnp.maximum(0, mean_square - jnp.square(mean))[..., None]
  return (x - mean[..., None]) * jax.lax.rsqrt(variance + 1e-5)


def _dropout(x: Array, rate: float, keys, over_length: bool = False) -> Array:
  """Zeroes a share of x [B ...].

  With `over_length` one mask is drawn per row and feature, for all positions.
  """
  if rate == 0:
    return x
  shape = (x.shape[0], 1, x.shape[2]) if over_length else x.shape
  kept = jax.random.bernoulli(next(keys), 1 - rate, shape)
  return jnp.where(kept, x / (1 - rate), 0)


def _rotary(length: int, size: int) -> tuple[Array, Array]:
  frequency = 10_000.0 ** -(jnp.arange(0, size, 2) / size)
  angles = jnp.arange(length)[:, None] * frequency[None]
  return tuple(f(angles)[None, :, None] for f in (jnp.cos, jnp.sin))


def _rotate(x: Float[Array, "B L H K"], cos: Array, sin: Array):
  pairs = x.reshape(*x.shape[:-1], -1, 2)
  a, b = pairs[..., 0], pairs[..., 1]
  return jnp.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x.shape)


def _attention(block: Params, h: Float[Array, "B L D"], cos, sin, drop):
  three = [h @ block[name] for name in ("query", "key", "value")]
  shape = *h.shape[:2], -1, 2 * cos.shape[-1]
  query, key, value = (x.reshape(shape) for x in three)
  query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
  query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
  scores = query @ key.swapaxes(2, 3) / query.shape[-1] ** 0.5
  mixed = drop(jax.nn.softmax(scores, axis=-1)) @ value
  return mixed.swapaxes(1, 2).reshape(h.shape) @ block["out"]


def loss_fn(
  params: Params,
  x0: Int[Array, "B L"],
  model: ModelConfig,
  rates: RateDistribution,
  key: Key[Array, ""],
) -> Float[Array, ""]:
  """Returns an estimate of the likelihood bound, in nats per token.

  Args:
    params: made by `init`.
    x0: clean tokens.
    model: layers, widths and heads.
    rates: the distribution of a row's mask rate.
    key: for rates, masks and dropout.
  """
  time_key, mask_key, dropout_key = jax.random.split(key, 3)
  rows, mask = len(x0), params["head"].shape[1]
  # Antithetic: one offset, and equally spaced rows.
  u = jax.random.uniform(time_key) + jnp.arange(rows) / rows
  u = 1 - jnp.mod(u, 1.0)  # in (0, 1]
  rate = rates.rate(u)
  kept = jax.random.bernoulli(mask_key, 1 - rate[:, None], x0.shape)
  xt = jnp.where(kept, x0, mask)
  log_p = jax.nn.log_softmax(logits(params, xt, rate, model, dropout_key))
  one_hot = jax.nn.one_hot(x0, mask)  # materialised, [B, L, V]
  picked = jnp.where(one_hot > 0, one_hot * log_p, 0.0).sum(axis=-1)
  by_row = -jnp.where(xt == mask, picked, 0.0).sum(axis=1)
  return (rates.inverse_density(u) / rate * by_row).mean() / x0.shape[1]


def make_train_step(
  model: ModelConfig,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
  rates: RateDistribution,
) -> TrainStep:
  """Returns the jitted update of one batch."""

  def update(state: TrainState, x0: Int[Array, "B L"]):
    key = rng.stream(0, "md4", state.step, jax.lax.axis_index(BATCH_AXES))
    found = jax.value_and_grad(loss_fn)(state.params, x0, model, rates, key)
    loss, grads = jax.lax.pmean(found, BATCH_AXES)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = optax.incremental_update(params, state.ema_params, 1e-4)
    new = TrainState(state.step + 1, params, ema, opt_state)
    return new, {"loss": loss, "learning_rate": schedule(state.step)}

  specs = P(), RULES.spec("batch", None)
  # As under pmap: every device has a whole copy of the state.
  step = jax.shard_map(update, in_specs=specs, out_specs=P(), check_vma=False)
  return jax.jit(lambda state, batch: step(state, batch.tokens[0]))
