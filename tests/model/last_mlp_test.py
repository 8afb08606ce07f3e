"""The last MLP at some positions gives what it would give at all of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.core import rng
from mdm_jax.core.sharding import RULES
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.model.config import ModelConfig
from mdm_jax.model.context import row_context
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.model.last_mlp import Unfinished
from mdm_jax.objectives import cross_entropy

MODEL = ModelConfig(
  num_layers=2,
  embed_dim=32,
  num_heads=2,
  dropout=0.25,
  layer_loop="unrolled",
  dtype="float32",
)
VOCAB = Vocabulary.after_text(28)
ROWS, LENGTH, SLOTS = 8, 12, 40  # slots of each data shard


def loss_of(config: ModelConfig, call: str):
  """Returns a loss as a function of the parameters, and what `call` gives."""
  denoiser = Denoiser(config, VOCAB)
  draw = np.random.default_rng(0)
  place = lambda x: jax.device_put(x, RULES.spec("batch"))
  x0 = place(draw.integers(0, 28, (ROWS, LENGTH)).astype(np.int32))
  segments = np.repeat([1, 2, 0], [5, 6, 1])
  segments = place(np.tile(segments, (ROWS, 1)).astype(np.int32))
  masked = place(draw.random((ROWS, LENGTH)) < 0.3)
  weight = place(draw.random((ROWS, LENGTH)).astype(np.float32) / x0.size)
  keys = rng.per_row(rng.stream(0, "dropout"), jnp.arange(ROWS))
  context = row_context(segments, keys=jax.reshard(keys, RULES.spec("batch")))
  kinds = []

  def loss(params):
    xt = jnp.where(masked, VOCAB.mask, x0)
    hidden = getattr(denoiser, call)(params, xt, context)
    kinds.append(type(hidden))
    return cross_entropy.masked_loss(
      *(denoiser.logits, denoiser.head(params), hidden, x0, masked, weight),
      *(SLOTS, VOCAB),
    )[0]

  return loss, denoiser, kinds


def test_loss_and_gradient_are_the_same(any_mesh):
  """With dropout, packed texts and padding."""
  check(MODEL)


def test_loss_and_gradient_are_the_same_with_shifted_outputs(mesh):
  check(dataclasses.replace(MODEL, shift_outputs=True))


def check(config: ModelConfig):
  """Compares both ways to a loss and its gradient."""
  found = []
  for call in ("hidden", "unfinished"):
    loss, denoiser, kinds = loss_of(config, call)
    params = denoiser.init(rng.stream(0, "init"))
    found.append(jax.jit(jax.value_and_grad(loss))(params))
  assert kinds == [Unfinished]
  for want, got in zip(*map(jax.tree.leaves, found), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


def products(jaxpr) -> list[tuple[int, ...]]:
  """Returns the shapes of all products' results."""
  found = []
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      found.append(eqn.outvars[0].aval.shape)
    for value in jax.tree.leaves(list(eqn.params.values())):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        found += products(inner)
  return found


def test_the_mlp_runs_at_the_slots_only(mesh):
  loss, denoiser, _ = loss_of(MODEL, "unfinished")
  params = jax.eval_shape(denoiser.init, rng.stream(0, "init"))
  found = products(jax.make_jaxpr(loss)(params).jaxpr)
  gates = [shape[:2] for shape in found if shape[2:] == (MODEL.mlp_size,)]
  # Gate and up of either block, as two products on a CPU.
  assert gates == [(ROWS, LENGTH)] * 2 + [(SLOTS, 1)] * 2


@pytest.mark.parametrize(
  "changes",
  [
    {"layer_loop": "scan"},
    {"remat": "full"},
    {"time_conditioning": True},
  ],
  ids=str,
)
def test_elsewhere_it_runs_at_every_position(mesh, changes):
  """In a loop, with recomputation, and where it needs more than a position."""
  denoiser = Denoiser(dataclasses.replace(MODEL, **changes), VOCAB)
  params = jax.eval_shape(denoiser.init, rng.stream(0, "init"))
  ids = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)

  def run(params, ids):
    context = row_context(ids, condition=jnp.ones(2))
    return denoiser.unfinished(params, ids, context)

  assert jax.eval_shape(run, params, ids).shape == (2, LENGTH, 32)
