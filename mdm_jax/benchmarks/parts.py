"""Times the parts of an update, each alone, forward and backward.

trunk            the blocks
head             the loss at masked positions, given the blocks' output
optimizer        clip, AdamW, parameter average and the logged norms
plain head       the loss with the logits of every position
plain optimizer  AdamW and parameter average
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mdm_jax.benchmarks import plain, timing
from mdm_jax.benchmarks.workload import Work
from mdm_jax.core import rng
from mdm_jax.core.sharding import RULES, data_shards
from mdm_jax.model.context import row_context
from mdm_jax.model.denoiser import compute_dtype
from mdm_jax.objectives import corruption, cross_entropy


def make_parts(work: Work, against: str) -> dict[str, timing.Timed]:
  """Returns the parts of the library's update, and of the plain one's.

  Args:
    work: the run to time.
    against: `plain` adds the plain step's head and optimizer.
  """
  trainer = work.trainer
  params = jax.jit(trainer.denoiser.init)(rng.stream(0, "init"))
  inputs = _inputs(work)
  heads = {"head": _gathered_loss(work)}
  optimizers = {"optimizer": (trainer.optimizer, True)}
  if against == "plain":
    heads["plain head"] = functools.partial(plain.losses, trainer.denoiser)
    own = plain.make_optimizer(trainer.schedule)
    own = optax.with_extra_args_support(own)
    optimizers["plain optimizer"] = own, False
  parts = {"trunk": _trunk(work, params, inputs)}
  for name, loss in heads.items():
    parts[name] = _head(loss, params, inputs)
  for name, (optimizer, with_norms) in optimizers.items():
    parts[name] = _optimizer(optimizer, params, with_norms)
  return parts


def _inputs(work: Work) -> dict[str, jax.Array]:
  """Returns a batch, clean and masked, and random hidden states for it."""
  x0, segments = work.batch.tokens[0], work.batch.segments[0]
  rows = len(x0)
  spread = lambda x: jax.device_put(x, RULES.spec("batch"))
  u = corruption.stratified_uniforms(jax.random.key(0), rows)
  rate = spread(work.rates.rate(u))
  keys = spread(rng.per_row(jax.random.key(1), jnp.arange(rows)))
  drawn = corruption.corrupt(keys, x0, segments > 0, rate, work.mask_id)
  model = work.config.model
  shape = *x0.shape, model.embed_dim
  # The head is timed on its own, so its input need not come from the blocks.
  hidden = jax.random.normal(jax.random.key(2), shape, compute_dtype(model))
  return {
    "x0": x0,
    "xt": drawn.xt,
    "masked": drawn.masked,
    "segments": segments,
    "rate": rate,
    "hidden": jax.device_put(hidden, RULES.spec("batch", None, None)),
  }


def _trunk(work: Work, params: Any, inputs: dict[str, jax.Array]):
  denoiser = work.trainer.denoiser

  @jax.jit
  @jax.grad
  def gradient(params, xt, segments, rate):
    context = row_context(segments, condition=rate)
    hidden = denoiser.hidden(params, xt, context)
    # Any scalar will do: the gradient of the blocks is what is timed.
    return jnp.square(hidden.astype(jnp.float32)).mean()

  return _timed(
    gradient, params, inputs["xt"], inputs["segments"], inputs["rate"]
  )


def _gathered_loss(work: Work) -> Callable[..., jax.Array]:
  denoiser = work.trainer.denoiser
  # The loss's buffer is per data shard.
  capacity = work.head_positions // data_shards(work.trainer.mesh)

  def loss(params, hidden, x0, masked):
    head = denoiser.logits, denoiser.head(params)
    weight = jnp.ones_like(x0, jnp.float32)
    total, _ = cross_entropy.masked_loss(
      *(*head, hidden, x0, masked, weight, capacity, denoiser.vocab)
    )
    return total

  return loss


def _head(loss, params: Any, inputs: dict[str, jax.Array]) -> timing.Timed:
  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1))
  def gradient(params, hidden, x0, masked):
    return loss(params, hidden, x0, masked).sum()

  return _timed(
    gradient, params, inputs["hidden"], inputs["x0"], inputs["masked"]
  )


def _optimizer(optimizer, params: Any, with_norms: bool) -> timing.Timed:
  """Returns an update that donates its state, to run in place as in a run."""

  @jax.jit(donate_argnums=0)
  def update(state, grads):
    params, ema, opt_state = state
    norms = optax.tree.norm(grads) if with_norms else 0.0
    updates, opt_state = optimizer.update(grads, opt_state, params, step=0)
    new = optax.apply_updates(params, updates)
    if with_norms:
      norms += optax.tree.norm(updates) + optax.tree.norm(new)
    ema = optax.incremental_update(new, ema, 1e-4)
    return (new, ema, opt_state), norms

  grads = jax.tree.map(jnp.copy, params)
  copy = lambda: jax.tree.map(jnp.copy, params)
  state = copy(), copy(), jax.jit(optimizer.init)(params)
  program = timing.compiled(update, state, grads)

  def run():
    nonlocal state
    state, norms = program.call(state, grads)
    return state, norms

  return run


def _timed(function: Any, *args: Any) -> timing.Timed:
  program = timing.compiled(function, *args)
  return lambda: program.call(*args)
