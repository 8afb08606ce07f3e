"""One optimizer update, jitted once a stage.

pose the questions of all rows -> for each microbatch: loss and gradient
-> optimizer with the sum of the gradients -> average the parameters

What is asked and how it is scored is up to the objective
(`objectives/base.py`), of which nothing is known here.
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
from mdm_jax.model.denoiser import Denoiser, Params
from mdm_jax.objectives.base import Draws, Objective, Plan, Ratio
from mdm_jax.training import ema
from mdm_jax.training.gated import accumulated, choose
from mdm_jax.training.guard import SpikeGuard
from mdm_jax.training.state import TrainState

# By name: what all updates have, and what the objective says of this one.
Metrics = Mapping[str, Float[Array, ""] | Ratio]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
# Parameters, the update's number and its rows, to numbers about it.
Diagnosis = Callable[[Params, Int[Array, ""], Batch], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Parts:
  """What every update of a run is made of, whatever its stage.

  Attributes:
    seed: of all that is drawn.
    model: the denoiser.
    optimizer: what turns gradients into updates.
    schedule: the learning rate of each update, for the log.
    guard: what tells spikes of the gradient.
    ema_decay: of the averaged parameters.
  """

  seed: int
  model: Denoiser
  optimizer: optax.GradientTransformationExtraArgs
  schedule: optax.Schedule
  guard: SpikeGuard
  ema_decay: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pass:
  """What an update's forward and backward pass finds.

  Attributes:
    loss: the weighted mean that is differentiated.
    grads: of the parameters, summed over microbatches.
    examples: what was asked.
    aux: what the objective returned beside the loss, of every microbatch.
  """

  loss: Float[Array, ""]
  grads: Params
  examples: Any
  aux: Any


# Parameters, the update's number and its rows.
_Pass = Callable[[Params, Int[Array, ""], Batch], Pass]


def make_pass(parts: Parts, objective: Objective, plan: Plan) -> _Pass:
  """Returns an update's forward and backward pass in one stage.

  The weights are those of the whole update: every microbatch knows the share
  that falls to it, so 2 x 8 rows give the update of 1 x 16.
  """

  def loss_fn(params: Params, part: Any):
    return objective.loss(parts.model, params, part)

  def forward_backward(
    params: Params, step: Int[Array, ""], batch: Batch
  ) -> Pass:
    draws = Draws(parts.seed, step, plan, batch.tokens.shape[1])
    examples = objective.examples(batch, draws)

    def add(total, part):
      value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
      (loss, aux), grads = value_and_grad(params, part)
      return jax.tree.map(jnp.add, total, (loss, grads)), aux

    start = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
    (loss, grads), aux = jax.lax.scan(add, start, examples)
    return Pass(loss, grads, examples, aux)

  return forward_backward


def make_train_step(
  parts: Parts, objective: Objective, plan: Plan
) -> TrainStep:
  """Returns the jitted update of one stage; it consumes the state it is given.

  An update that is not finite, or a spike, leaves every bit of the parameters,
  their average and the optimizer's state as it was; only `step` goes on.
  """
  forward_backward = make_pass(parts, objective, plan)
  optimizer, guard = parts.optimizer, parts.guard

  @jax.jit(donate_argnums=0)
  def train_step(state: TrainState, batch: Batch):
    found = forward_backward(state.params, state.step, batch)
    norm = optax.tree.norm(found.grads)
    finite = jnp.isfinite(found.loss) & jnp.isfinite(norm)
    spike = finite & guard.is_spike(state.guard, norm)
    applied = finite & ~spike
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
  """Returns a jitted second look at an update, which changes nothing.

  Its numbers are whole on every device: the loss, the objective's summaries and
  columns by row, and for each parameter the gradient's norm and its count of
  entries that are not finite.
  """
  forward_backward = make_pass(parts, objective, plan)

  @jax.jit
  def diagnose(params: Params, step: Int[Array, ""], batch: Batch):
    found = forward_backward(params, step, batch)
    whole = lambda x: jax.reshard(x, jax.P(*[None] * x.ndim))
    columns = objective.by_row(found.examples, found.aux)
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
  """Returns each leaf's number of entries that are not finite."""
  return jax.tree.map(lambda x: (~jnp.isfinite(x)).sum(), tree)


def _count_tokens(batch: Batch) -> Float[Array, ""]:
  """Counts the tokens that are not padding; exact by row, then in float32."""
  by_row = (batch.segments > 0).sum(axis=-1)
  return by_row.astype(jnp.float32).sum()


def _summaries(objective: Objective, found: Pass) -> dict[str, Ratio]:
  """Returns what the objective says of an update, each entry with a name."""
  summaries = objective.summaries(found.examples, found.aux)
  for name, (total, count) in summaries.items():
    tags = objective.tags.get(name)
    expected = () if tags is None else (len(tags),)
    if not total.shape == count.shape == expected:
      raise UserError(
        f"summary {name!r} of {type(objective).__name__} has the shapes"
        f" {total.shape} and {count.shape}; its tags ask for {expected}"
      )
  return summaries


def _joined(metrics: Metrics, summaries: Metrics) -> Metrics:
  twice = metrics.keys() & summaries.keys()
  if twice:
    raise UserError(
      f"{', '.join(sorted(twice))}: every update logs this already; give the"
      " objective's summary another name"
    )
  return {**metrics, **summaries}
