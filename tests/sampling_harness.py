"""Models whose distribution is known, and ways to draw from them.

A forced draw takes the token that a test says, while the sampler decides where
and notes the probability. If the places follow from the key and the tokens so
far, which is checked, a text has one way to come about under a row's key, and
the product of the probabilities on it is the probability of the text.
"""

import contextlib
import dataclasses
import functools
import itertools
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mdm_jax.core import rng
from mdm_jax.core.sharding import batch_sharding
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.sampling import sampler, schedule, tokens
from mdm_jax.sampling.call import Canvas
from mdm_jax.sampling.config import SampleConfig

LETTERS = Vocabulary.after_text(5)
EOS, PAD, MASK = LETTERS.end, LETTERS.pad, LETTERS.mask
WIDTH = EOS + 1  # of the models' logits
PLAIN = SampleConfig(
  order="random",
  temperature=1.0,
  temperature_range=None,
  top_k=None,
  top_p=None,
)


def settings(**fields):
  return dataclasses.replace(PLAIN, **fields)


def blank(rows, length):
  return np.full((rows, length), MASK, np.int32)


def canvas(x, free=None, lengths=None):
  """Free where x is MASK, unless it is said."""
  x = np.asarray(x, np.int32)
  free = x == MASK if free is None else free
  lengths = np.full(len(x), x.shape[1]) if lengths is None else lengths
  return Canvas(x, free, np.asarray(lengths, np.int32))


def row_keys(rows, seed=0):
  """One key a row; `rows` is their number, or their numbers."""
  rows = jnp.arange(rows) if isinstance(rows, int) else jnp.asarray(rows)
  return rng.per_row(rng.stream(seed, "sample"), rows)


def order_keys(rows):
  """The keys that the priorities of rows are drawn with."""
  return sampler.order_keys(row_keys(rows))


def draw(config, model, params, given, mesh, keys=None, pace=None, force=False):
  """Returns what the sampler has drawn, in numpy.

  Args:
    config: how to draw.
    model: what is asked.
    params: of the model.
    given: a canvas, or ids that are free where they are MASK.
    mesh: the current one.
    keys: of the rows.
    pace: if it is not the config's.
    force: to take `params["forced"]` instead of drawing.
  """
  given = given if isinstance(given, Canvas) else canvas(given)
  rows, length = given.tokens.shape
  keys = row_keys(rows) if keys is None else keys
  pace = schedule.pace(config, length) if pace is None else pace
  by_row = lambda a: jax.device_put(a, batch_sharding(mesh, np.ndim(a)))
  whole = NamedSharding(mesh, PartitionSpec())
  with forced_draws() if force else contextlib.nullcontext():
    drawn = _sampler(config, model, force)(
      model.place(params, by_row, whole),
      jax.tree.map(by_row, given),
      jax.device_put(pace, whole),
      tokens.effective_settings(config),
      by_row(keys),
    )
  return types.SimpleNamespace(**jax.device_get(vars(drawn)))


@functools.cache
def _sampler(config, model, force):
  del force  # a program of its own
  return sampler.make_sampler(config, model, LETTERS)


def forced_draws():
  marked = lambda keys, logits, _: logits[..., WIDTH:].argmax(axis=-1)
  return mock.patch.object(
    tokens, "draw", lambda *args: marked(*args).astype(jnp.int32)
  )


def _marked(logits, forced):
  """Appends columns without a chance, of which one says what is forced."""
  if forced is None:
    return logits
  hot = jax.nn.one_hot(forced, WIDTH, dtype=bool)
  return jnp.concatenate([logits, jnp.where(hot, -1e4, -jnp.inf)], axis=-1)


class _Model:
  """Hidden states are logits already."""

  def place(self, params, by_row, whole):
    put = lambda k, v: (
      by_row(v) if k in self.by_row else jax.device_put(v, whole)
    )
    return {k: put(k, v) for k, v in params.items()}

  def logits(self, params, hidden):
    return hidden


# MARK: joints over all texts


@functools.cache
def texts(ids, length):
  return np.array(list(itertools.product(ids, repeat=length)), np.int32)


@dataclasses.dataclass(frozen=True)
class Joint(_Model):
  """The exact conditionals of a joint over all texts of some ids.

  What is behind the first end of a text is padding and not looked at.
  """

  ids: tuple[int, ...] = (0, 1, 2)
  length: int = 4
  by_row = ("joint", "forced")

  @property
  def texts(self):
    return texts(self.ids, self.length)

  def hidden(self, params, xt, context):
    all_texts = jnp.asarray(self.texts)
    fits = xt[:, None] == all_texts[None]
    fits |= (xt[:, None] == MASK) | (xt[:, None] == PAD)
    fits = fits.all(axis=2)
    weight = jnp.where(fits, params["joint"], 0.0)
    possible = weight.sum(axis=1, keepdims=True) > 0
    weight = jnp.where(possible, weight, fits.astype(jnp.float32))
    hot = jax.nn.one_hot(all_texts, WIDTH)
    logits = jnp.log(jnp.einsum("bt,tlv->blv", weight, hot))
    return _marked(logits, params.get("forced"))


def random_joint(model, seed=0, zeros=0.0):
  numbers = np.random.default_rng(seed)
  weights = numbers.gamma(0.3, size=len(model.texts)) + 1e-3
  weights *= numbers.random(len(weights)) >= zeros
  return (weights / weights.sum()).astype(np.float32)


def many_joints(model):
  """Random ones, some with impossible texts, and some with ties only."""
  numbers = np.random.default_rng(7)
  even = model.texts.sum(axis=1) % 2 == 0
  joints = [random_joint(model, seed) for seed in range(3)]
  joints += [random_joint(model, seed, zeros=0.7) for seed in range(3)]
  joints += [np.ones(len(even)), even, numbers.integers(0, 3, len(even))]
  return np.array([j / j.sum() for j in joints], np.float32)


def every_text(model, joints, mesh, config, **kwargs):
  """Forces all texts of each joint, under one key a joint.

  Returns:
    log q [J, T], by a joint and a text, and what was drawn.
  """
  count, number = joints.shape
  params = {
    "joint": np.repeat(joints, number, axis=0),
    "forced": np.tile(model.texts, (count, 1)),
  }
  keys = row_keys(np.repeat(np.arange(count), number))
  x = blank(count * number, model.length)
  drawn = draw(config, model, params, x, mesh, keys, force=True, **kwargs)
  check_places(drawn, np.repeat(np.arange(count), number))
  return log_probability(drawn).reshape(count, number), drawn


def check_places(drawn, groups):
  """Rows of a group, which share a key, go on alike from the same state."""
  for i, x in enumerate(drawn.path[:-1]):
    states = np.column_stack([groups, x])
    _, first, which = np.unique(
      states, axis=0, return_index=True, return_inverse=True
    )
    now = drawn.step == i
    np.testing.assert_array_equal(now, now[first][which.ravel()])


def log_probability(drawn):
  """Returns the log-probability of each row's way."""
  with np.errstate(divide="ignore"):
    logs = np.log(drawn.confidence.astype(np.float64))
  return np.where(drawn.step >= 0, logs, 0.0).sum(axis=1)


def divergence(p, log_q):
  """KL(p || q) in nats, over the last axis."""
  with np.errstate(divide="ignore", invalid="ignore"):
    terms = p * (np.log(p) - log_q)
  return np.where(p > 0, terms, 0.0).sum(axis=-1)


def chi_square(counts, probs):
  """Pearson's statistic in standard deviations over its degrees of freedom."""
  counts, probs = np.ravel(counts), np.ravel(probs).astype(np.float64)
  assert counts[probs == 0].sum() == 0
  expected = probs / probs.sum() * counts.sum()
  often = expected > 5
  counts = np.append(counts[often], counts[~often].sum())
  expected = np.append(expected[often], expected[~often].sum())
  kept = expected > 0
  freedom = kept.sum() - 1
  statistic = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
  return (statistic - freedom) / np.sqrt(2 * freedom)


def count_texts(model, x):
  """Returns how often each text of a model was drawn."""
  digits = np.searchsorted(model.ids, x)
  powers = len(model.ids) ** np.arange(model.length)[::-1]
  return np.bincount(digits @ powers, minlength=len(model.texts))


# MARK: a model of any length


@dataclasses.dataclass(frozen=True)
class Pairs(_Model):
  """Logits that add something for every other token, and the mask rate."""

  length: int = 12
  by_row = ()

  def params(self, seed=0, scale=1.0, eos=-3.0):
    numbers = np.random.default_rng(seed)
    normal = lambda *shape: numbers.normal(size=shape).astype(np.float32)
    bias = 2 * scale * normal(self.length, WIDTH)
    bias[:, EOS] += eos
    pair = scale * normal(self.length, MASK + 1, self.length, WIDTH)
    return {"bias": bias, "pair": pair, "rate": normal(self.length, WIDTH)}

  def hidden(self, params, xt, context):
    rate = context.condition
    hot = jax.nn.one_hot(xt, MASK + 1) * context.segments[..., None].astype(
      rate.dtype
    )
    logits = jnp.einsum("bjc,jciv->biv", hot, params["pair"])
    logits += params["bias"][None]
    return logits + rate[:, None, None] * params["rate"][None]

  def plainly(self, params, x, masked, end):
    """Returns one row's logits in numpy, where so many are masked."""
    logits = params["bias"].astype(np.float64)
    for j in range(end):
      logits = logits + params["pair"][j, x[j]]
    return logits + masked / max(end, 1) * params["rate"]


# MARK: a Markov chain


@dataclasses.dataclass(frozen=True)
class Chain(_Model):
  """The exact conditionals of a Markov chain, forwards and backwards."""

  length: int = 64
  by_row = ("forced",)

  def hidden(self, params, xt, context):
    start, move = params["start"], params["move"]
    hot = jax.nn.one_hot(xt, len(start))
    seen = jnp.where((xt == MASK)[..., None], 1.0, hot).swapaxes(0, 1)
    ahead = self._messages(seen, move, start)
    back = self._messages(seen[::-1], move.T, jnp.ones_like(start))[::-1]
    logits = jnp.log(ahead * back).swapaxes(0, 1)
    rest = ((0, 0), (0, 0), (0, WIDTH - len(start)))
    logits = jnp.pad(logits, rest, constant_values=-jnp.inf)
    return _marked(logits, params.get("forced"))

  def _messages(self, seen, move, first):
    def step(message, seen):
      following = (message * seen) @ move
      return following / following.sum(axis=1, keepdims=True), message

    first = jnp.zeros_like(seen[0]) + first[None]
    return jax.lax.scan(step, first, seen)[1]


def stationary_chain(vocab=3, seed=0, sharpness=2.0):
  """Returns the distribution of every token, and given the one before."""
  normal = np.random.default_rng(seed).normal(size=(vocab, vocab))
  move = np.exp(sharpness * normal)
  move /= move.sum(axis=1, keepdims=True)
  return np.linalg.matrix_power(move, 10_000)[0], move


def expected_divergence(losses, bounds):
  """A schedule's expected divergence under random order, in nats.

  Args:
    losses: h_j for j = 0 .. L - 1 revealed tokens, in nats.
    bounds: tokens revealed before each step, and after the last.
  """
  steps = itertools.pairwise(bounds)
  return float(sum((losses[s] - losses[s:e]).sum() for s, e in steps))
