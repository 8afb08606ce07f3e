"""The jitted train step: one optimizer update, compiled once per stage.

objective.examples of all rows -> scan over microbatches: objective.loss and its
gradient -> optimizer, with the summed gradient -> EMA of the parameters

The step works for any objective (`objectives/base.py`): it never looks inside
the examples.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from mdm_jax.core.errors import UserError
from mdm_jax.data.batches import Batch
from mdm_jax.model import lora
from mdm_jax.model.denoiser import Denoiser, Params
from mdm_jax.objectives.base import Objective, Ratio
from mdm_jax.objectives.draws import Draws, Plan
from mdm_jax.training import ema
from mdm_jax.training.gated import accumulated, choose
from mdm_jax.training.guard import SpikeGuard
from mdm_jax.training.state import TrainState

# By name: metrics of every update, and the objective's summaries.
Metrics = Mapping[str, Float[Array, ""] | Ratio]
# Called with the parameters beside LoRA's, if there are any.
TrainStep = Callable[..., tuple[TrainState, Metrics]]
# (params, base, step, batch) -> numbers for an incident report.
Diagnosis = Callable[[Params, Params, Int[Array, ""], Batch], dict[str, Any]]


@dataclasses.dataclass(eq=False)
class Parts:
  """The parts of a train step that are the same in all stages.

  Attributes:
    seed: seed of all random keys.
    denoiser: the model.
    optimizer: made by `optimizer.make_optimizer`.
    schedule: update -> learning rate; for the log, the optimizer has its own.
    guard: detects spikes of the gradient norm.
    ema_decay: decay of the averaged parameters.
  """

  seed: int
  denoiser: Denoiser
  optimizer: optax.GradientTransformationExtraArgs
  schedule: optax.Schedule
  guard: SpikeGuard
  ema_decay: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pass:
  """The result of an update's forward and backward pass.

  Attributes:
    loss: the loss, summed over microbatches.
    grads: its gradient with respect to the parameters.
    examples: the objective's examples.
    aux: the auxiliary results of `Objective.loss`, stacked over microbatches.
  """

  loss: Float[Array, ""]
  grads: Params
  examples: Any
  aux: Any


# (params, base, step, batch) -> Pass.
_Pass = Callable[[Params, Params, Int[Array, ""], Batch], Pass]


def make_pass(parts: Parts, objective: Objective, plan: Plan) -> _Pass:
  """Returns the forward and backward pass of a stage's updates.

  Loss weights are normalized over the whole update, so the microbatches' losses
  and gradients are summed, not averaged: 2 x 8 rows give the update of 1 x 16.
  """

  def loss_fn(params: Params, base: Params, part: Any):
    return objective.loss(parts.denoiser, lora.joined(base, params), part)

  def forward_backward(
    params: Params, base: Params, step: Int[Array, ""], batch: Batch
  ) -> Pass:
    draws = Draws(parts.seed, step, plan, batch.tokens.shape[1])
    # For all microbatches at once: the weights depend on the whole update.
    examples = objective.examples(batch, draws)

    # A scan, not optax.MultiSteps: that would run the optimizer for every
    # microbatch, and average them whatever their weights (docs/optimizer.md).
    def add(total, part):
      value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
      (loss, aux), grads = value_and_grad(params, base, part)
      return jax.tree.map(jnp.add, total, (loss, grads)), aux

    start = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
    (loss, grads), aux = jax.lax.scan(add, start, examples)
    return Pass(loss, grads, examples, aux)

  return forward_backward


def make_train_step(
  parts: Parts, objective: Objective, plan: Plan
) -> TrainStep:
  """Returns the jitted train step of one stage, which donates its state.

  An update that is not finite, or a spike, is not applied: parameters, EMA and
  optimizer state stay the same to the bit, and only `step` advances.

  Args:
    parts: what all stages share.
    objective: the stage's objective.
    plan: sizes of the stage.
  """
  forward_backward = make_pass(parts, objective, plan)
  optimizer, guard = parts.optimizer, parts.guard

  @jax.jit(donate_argnums=0)
  def train_step(state: TrainState, batch: Batch, base: Params | None = None):
    found = forward_backward(state.params, base or {}, state.step, batch)
    norm = optax.tree.norm(found.grads)
    # One NaN or inf anywhere in the gradient makes its norm NaN or inf.
    finite = jnp.isfinite(found.loss) & jnp.isfinite(norm)
    spike = finite & guard.is_spike(state.guard, norm)
    applied = finite & ~spike
    # The optimizer selects element by element, so that old and new moments are
    # never both in memory. With `lax.cond` around it instead, on a GPU the host
    # would wait for the gradient in every update (docs/performance.md).
    updates, opt_state = optimizer.update(
      *(found.grads, state.opt_state, state.params),
      step=state.step,
      applied=applied,
    )
    params = optax.apply_updates(state.params, updates)
    params = choose(applied, params, state.params)
    average = ema.averaged(
      state.ema_params, params, state.step, parts.ema_decay
    )
    new = TrainState(
      step=state.step + 1,
      params=params,
      ema_params=choose(applied, average, state.ema_params),
      opt_state=opt_state,
      guard=guard.remember(state.guard, norm, applied),
    )
    metrics = {
      "loss": found.loss,
      "grad_norm": norm,
      "param_norm": optax.tree.norm(params),
      "update_norm": optax.tree.norm(updates),
      "learning_rate": parts.schedule(state.step),
      "skipped": 1.0 - applied.astype(jnp.float32),
      "nonfinite": 1.0 - finite.astype(jnp.float32),
      "spike": spike.astype(jnp.float32),
      "tokens": _count_tokens(batch),
      **accumulated(opt_state, applied),
    }
    return new, _joined(metrics, _summaries(objective, found))

  return train_step


def make_diagnosis(parts: Parts, objective: Objective, plan: Plan) -> Diagnosis:
  """Returns a jitted function that recomputes an update without applying it.

  It returns the loss, the objective's summaries and its arrays by row, and for
  each parameter the gradient's norm and number of non-finite entries, all
  replicated.
  """
  forward_backward = make_pass(parts, objective, plan)

  @jax.jit
  def diagnose(
    params: Params, base: Params, step: Int[Array, ""], batch: Batch
  ):
    found = forward_backward(params, base, step, batch)
    whole = lambda x: jax.reshard(x, jax.P(*[None] * x.ndim))
    columns = objective.by_row(found.examples, found.aux)
    # Rows that only make the shards equally large are not reported.
    without_padding = lambda x: whole(x)[:, : plan.batch]
    numbers = {
      "loss": found.loss,
      "summaries": _summaries(objective, found),
      "by_row": jax.tree.map(without_padding, columns),
      "grad_norm": jax.tree.map(optax.tree.norm, found.grads),
      "grad_nonfinite": count_nonfinite(found.grads),
    }
    return jax.tree.map(whole, numbers)

  return diagnose


def count_nonfinite(tree: Any) -> Any:
  """Returns the number of non-finite entries of each leaf."""
  return jax.tree.map(lambda x: (~jnp.isfinite(x)).sum(), tree)


def _count_tokens(batch: Batch) -> Float[Array, ""]:
  """Returns the number of tokens that are not padding."""
  by_row = (batch.segments > 0).sum(axis=-1)
  return by_row.astype(jnp.float32).sum()


def _summaries(objective: Objective, found: Pass) -> dict[str, Ratio]:
  """Returns the objective's summaries, after checking their shapes."""
  summaries = objective.summaries(found.examples, found.aux)
  for name, (total, count) in summaries.items():
    tags = objective.tags.get(name)
    expected = () if tags is None else (len(tags),)
    if not total.shape == count.shape == expected:
      raise UserError(
        f"summary {name!r} of {type(objective).__name__} has the shapes"
        f" {total.shape} and {count.shape}; by its tags it must be {expected}"
      )
  return summaries


def _joined(metrics: Metrics, summaries: Metrics) -> Metrics:
  twice = metrics.keys() & summaries.keys()
  if twice:
    raise UserError(
      f"{', '.join(sorted(twice))}: every update already logs a metric with"
      " this name; rename the objective's summary"
    )
  return {**metrics, **summaries}
