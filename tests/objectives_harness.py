"""Toy objectives, as a user writes them: outside the package, a class each."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.core import rng
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data import batches
from mdm_jax.data.rows import Rows
from mdm_jax.model.config import ModelConfig
from mdm_jax.model.context import CAUSAL, row_context, starts
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.objectives.base import (
  Cost,
  Decoding,
  Examples,
  Objective,
  Ratio,
  score,
)
from mdm_jax.objectives.draws import Draws, Plan

VOCAB = Vocabulary(
  8, end=2, begin=5, pad=6, mask=7, forbidden=((5, 8),)
)  # 0 to 4 can be predicted
PLAN = Plan(
  accumulation=2, batch=8, length=16, shards=1, most_asked=16, most_segments=3
)
MODEL = ModelConfig(num_layers=2, embed_dim=16, num_heads=2)


def make_rows(rows=16, length=16):
  """Rows of one or two texts, some with padding."""
  tokens = np.random.default_rng(0).integers(0, 5, (rows, length))
  segments = np.ones((rows, length), np.int64)
  segments[::3, 10:] = 2
  segments[::4, 13:] = 0
  return Rows(np.where(segments, tokens, VOCAB.pad), segments)


def make_batch(mesh, plan=PLAN, rows=None):
  """All rows as one update."""
  rows = rows or make_rows(plan.rows, plan.length)
  return batches.make_batch(rows, np.arange(plan.rows), plan.accumulation, mesh)


def pose(objective, plan, step, batch):
  """Returns the questions of an update."""
  return objective.examples(batch, Draws(0, step, plan, batch.tokens.shape[1]))


def ask(objective, mesh, step=0, plan=PLAN):
  """Returns the questions of an update of `make_rows`."""
  posed = jax.jit(functools.partial(pose, objective, plan))
  return posed(jnp.asarray(step), make_batch(mesh, plan))


def network(model=MODEL):
  """Returns a denoiser and its parameters, on the current mesh."""
  return _network(model, jax.sharding.get_mesh())


@functools.cache
def _network(model, _mesh):
  denoiser = Denoiser(model, VOCAB)
  return denoiser, jax.jit(denoiser.init)(rng.stream(0, "init"))


def answer(objective, batch, plan=PLAN, model=MODEL, step=0):
  """Returns an update's loss, what comes beside it, and its gradient."""
  denoiser, params = network(model)
  found = jax.jit(
    functools.partial(trace_update, objective, denoiser, plan, step)
  )
  return jax.device_get(found(params, batch))


def trace_update(objective, denoiser, plan, step, params, batch):
  """Does the same inside a program that is compiled."""
  examples = pose(objective, plan, jnp.asarray(step), batch)

  def add(total, part):
    def loss(params):
      return objective.loss(denoiser, params, part)

    (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return jax.tree.map(jnp.add, total, (value, grads)), aux

  start = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
  (total, grads), aux = jax.lax.scan(add, start, examples)
  return total, aux, grads


# MARK: the objectives


class Toy(Objective):
  """An objective that is trained and never measured."""

  def jobs(self, held, part, draws):
    raise AssertionError("only its training is tested here")

  pose = values = jobs


@dataclasses.dataclass(frozen=True)
class NextToken(Toy):
  """Each text, shifted right by one behind `begin`: what comes next?"""

  plan: Plan
  begin: int = VOCAB.begin
  headline = "nats_per_token"

  def examples(self, batch, draws):
    asked = batch.segments > 0
    before = jnp.pad(batch.tokens[..., :-1], ((0, 0), (0, 0), (1, 0)))
    return Examples(
      tokens=jnp.where(starts(batch.segments), self.begin, before),
      context=row_context(
        batch.segments, visibility=CAUSAL, keys=draws.dropout()
      ),
      targets=batch.tokens,
      asked=asked,
      weights=jnp.full_like(batch.tokens, 1 / asked.sum(), jnp.float32),
      capacity=self.cost().asked,
    )

  def cost(self):
    p = self.plan
    return Cost(((p.length, p.length),), -(-p.batch // p.shards) * p.length)

  def decoding(self):
    return Decoding("left_to_right", CAUSAL, begin=self.begin)


def halves(batch, draws):
  """Masks half of the real tokens, and the other half; all are asked once."""
  real = batch.segments > 0
  draw = lambda key: jax.random.bernoulli(key, 0.5, batch.tokens.shape[-1:])
  some = jax.vmap(jax.vmap(draw))(draws.keys("half")) & real
  return some, ~some & real


def halved(batch, asked, keys, capacity):
  """Returns questions for what one of the halves hides."""
  every = (batch.segments > 0).sum()
  return Examples(
    tokens=jnp.where(asked, VOCAB.mask, batch.tokens),
    context=row_context(batch.segments, keys=keys),
    targets=batch.tokens,
    asked=asked,
    weights=jnp.full_like(batch.tokens, 1 / every, jnp.float32),
    capacity=capacity,
  )


@dataclasses.dataclass(frozen=True)
class Complementary(Toy):
  """Every row twice, one copy hiding what the other shows."""

  plan: Plan
  headline = "nats_per_token"

  def examples(self, batch, draws):
    both = [
      halved(batch, asked, draws.keys(f"dropout{i}"), self.cost().asked)
      for i, asked in enumerate(halves(batch, draws))
    ]
    # Side by side: a row's copies stay in its shard, whatever the mesh.
    return jax.tree.map(lambda a, b: interleaved(a, b), *both)

  def by_row(self, examples, aux):
    del examples
    return {"cross_entropy": aux.reshape(*aux.shape[:1], -1, 2).sum(axis=-1)}

  def cost(self):
    p = self.plan
    once = (p.length, p.length)
    return Cost((once, once), -(-p.batch // p.shards) * p.length)

  def decoding(self):
    return Decoding("any_order")


def interleaved(a, b):
  """[A, B, *] and [A, B, *] to [A, 2B, *]."""
  both = jnp.stack([a, b], axis=2)
  shape = (a.shape[0], 2 * a.shape[1], *a.shape[2:])
  return both.reshape(shape)


@dataclasses.dataclass(frozen=True)
class TwoPasses(Toy):
  """The same as `Complementary`, by two calls of the model."""

  plan: Plan
  headline = "nats_per_token"

  def examples(self, batch, draws):
    return [
      halved(batch, asked, draws.keys(f"dropout{i}"), self.cost().asked)
      for i, asked in enumerate(halves(batch, draws))
    ]

  def loss(self, model, params, part):
    scores = [
      score(model, params, p, model.hidden(params, p.tokens, p.context))
      for p in part
    ]
    return jax.tree.map(lambda *found: sum(found), *scores)

  def summaries(self, examples, aux):
    asked = sum(e.asked.sum(axis=(1, 2)).astype(jnp.float32) for e in examples)
    return {"ce": Ratio(aux.sum(), asked.sum())}

  def by_row(self, examples, aux):
    del examples
    return {"cross_entropy": aux}

  cost = Complementary.cost
  decoding = Complementary.decoding


@dataclasses.dataclass(frozen=True)
class Joint(Toy):
  """A weighted sum of other objectives, each with draws of its own."""

  shares: Mapping[str, tuple[float, Any]]
  scoped: bool = True
  headline = "nats_per_token"

  def examples(self, batch, draws):
    scope = draws.scope if self.scoped else lambda _: draws
    return {
      name: child.examples(batch, scope(name))
      for name, (_, child) in self.shares.items()
    }

  def loss(self, model, params, part):
    total, beside = 0.0, {}
    for name, (share, child) in self.shares.items():
      value, beside[name] = child.loss(model, params, part[name])
      total += share * value
    return total, beside

  def cost(self):
    costs = [child.cost() for _, child in self.shares.values()]
    reads = sum((c.reads for c in costs), ())
    return Cost(reads, sum(c.asked for c in costs))

  def decoding(self):
    return Decoding("any_order")
