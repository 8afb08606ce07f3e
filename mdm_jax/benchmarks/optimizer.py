"""Measures the optimizer's part of an update: time and temporary memory.

  python -m mdm_jax.benchmarks.optimizer --preset=char --json

Timed in turn, each with the parameter average and the logged norms:

adamw, lion, muon, adafactor   by name, as a run has them
stock chain                    optax's clip and AdamW, always applied
stock chain, gated             the same; a skipped update keeps the old state
                               by a choice between the two
4 gradients, added             a scan that sums them, then adamw
4 gradients, MultiSteps        adamw in `optax.MultiSteps`, called for each
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import flags

from mdm_jax.benchmarks import timing, workload
from mdm_jax.benchmarks.workload import PRESETS
from mdm_jax.core import log_lines
from mdm_jax.core.progress import console
from mdm_jax.core.sharding import MeshConfig, make_mesh
from mdm_jax.model.denoiser import Params
from mdm_jax.training.config import OptimizerConfig
from mdm_jax.training.gated import accumulate, gate
from mdm_jax.training.optimizer import OPTIMIZERS, decay_mask, make_optimizer

_MICROBATCHES = 4
_TURN = 0.2  # seconds, about
_NAMES = "adamw", "lion", "muon", "adafactor"

# Parameters, their average and the optimizer's state.
_State = tuple[Any, Any, Any]


def measure(
  config: OptimizerConfig, params: Params, repeats: int
) -> dict[str, dict[str, Any]]:
  """Measures the seconds and the memory of every way.

  Args:
    config: the optimizer's settings; its name is ignored.
    params: a model's parameters, on the current mesh.
    repeats: turns.

  Returns:
    Seconds and bytes of every way.
  """
  programs, runs = {}, {}
  for name, (optimizer, update) in _ways(config).items():
    # Every way donates its state, so it needs arrays of its own.
    copy = lambda: jax.tree.map(jnp.copy, params)
    state = copy(), copy(), jax.jit(optimizer.init)(params)
    grads = copy()
    if "gradients" in name:
      grads = jax.tree.map(lambda x: jnp.stack([x] * _MICROBATCHES), grads)
    update = jax.jit(functools.partial(update, optimizer), donate_argnums=0)
    applied = jnp.bool_(True)
    programs[name] = timing.compiled(update, state, grads, applied)
    runs[name] = _Updates(programs[name], state, (grads, applied))
  seconds = timing.interleave(runs, repeats, _TURN)
  return {
    name: {"seconds": timing.spread(seconds[name]), **program.facts()}
    for name, program in programs.items()
  }


class _Updates:
  """An update that is called over and over, on the state it returned."""

  def __init__(self, program: timing.Program, state: _State, args: tuple):
    self._program, self._state, self._args = program, state, args

  def __call__(self) -> Any:
    self._state, norms = self._program.call(self._state, *self._args)
    return self._state, norms


def _ways(config: OptimizerConfig) -> dict[str, tuple[Any, Callable]]:
  """Returns, by name, an optimizer and a function that updates with it."""
  schedule = lambda step: jnp.full((), 1e-4)
  named = {
    name: make_optimizer(dataclasses.replace(config, name=name), schedule)
    for name in _NAMES
  }
  adamw = optax.adamw(
    schedule, weight_decay=config.weight_decay, mask=decay_mask
  )
  stock = optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
  steps = accumulate(OPTIMIZERS["adamw"](config, schedule), _MICROBATCHES)
  return {
    **{name: (optimizer, _once) for name, optimizer in named.items()},
    "stock chain": (optax.with_extra_args_support(stock), _once),
    "stock chain, gated": (gate(stock), _once),
    f"{_MICROBATCHES} gradients, added": (named["adamw"], _added),
    f"{_MICROBATCHES} gradients, MultiSteps": (gate(steps), _stepped),
  }


def _once(optimizer, state: _State, grads, applied) -> tuple[_State, Any]:
  """Does what a train step does once it has the gradient."""
  params, average, opt_state = state
  updates, opt_state = optimizer.update(
    grads, opt_state, params, step=jnp.int32(0), applied=applied
  )
  new = optax.apply_updates(params, updates)
  norms = [optax.tree.norm(tree) for tree in (grads, updates, new)]
  average = optax.incremental_update(new, average, 1e-4)
  return (new, average, opt_state), norms


def _added(optimizer, state: _State, grads, applied) -> tuple[_State, Any]:
  add = lambda total, part: (jax.tree.map(jnp.add, total, part), None)
  zeros = jax.tree.map(jnp.zeros_like, state[0])
  total, _ = jax.lax.scan(add, zeros, grads)
  return _once(optimizer, state, total, applied)


def _stepped(optimizer, state: _State, grads, applied) -> tuple[_State, Any]:
  params, average, opt_state = state

  def step(carry, part):
    params, opt_state = carry
    updates, opt_state = optimizer.update(
      part, opt_state, params, step=jnp.int32(0), applied=applied
    )
    norms = [optax.tree.norm(tree) for tree in (part, updates)]
    return (optax.apply_updates(params, updates), opt_state), norms

  (new, opt_state), norms = jax.lax.scan(step, (params, opt_state), grads)
  average = optax.incremental_update(new, average, 1e-4)
  return (new, average, opt_state), (norms, optax.tree.norm(new))


def main(_: list[str]) -> None:
  values = flags.FLAGS
  jax.config.update("jax_enable_compilation_cache", False)
  preset = PRESETS[values.preset]
  with jax.set_mesh(make_mesh(MeshConfig())):
    data = workload.make_data(preset, workload.make_rows(preset))
    config = workload.make_config(preset)
    work = workload.make_work(config, data, jax.sharding.get_mesh())
    params = work.trainer.init().params
    results = measure(config.optimizer, params, values.repeats)
  headline = {}
  for name, found in results.items():
    headline[f"{name}: ms"] = 1e3 * found["seconds"]["median"]
    headline[f"{name}: MB temporary"] = found["temporary_bytes"] / 1e6
  for name, value in headline.items():
    console.print(f"{name:<40}{value:>10.1f}", highlight=False)
  if values.json:
    told = {"facts": timing.facts(), "headline": headline, "ways": results}
    print(json.dumps(told))


def _define_flags() -> None:
  flags.DEFINE_enum("preset", "char", list(PRESETS), "Which model.")
  flags.DEFINE_integer("repeats", 10, "Turns.", 1)
  flags.DEFINE_bool("json", False, "Print JSON on the last line.")


if __name__ == "__main__":
  _define_flags()
  log_lines.run(main)
