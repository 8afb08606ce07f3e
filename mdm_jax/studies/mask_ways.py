"""Ways to draw masks, each an unbiased estimate of the bound.

A row's n tokens have the bound E_r[1/r sum of CE], where each token is masked
with probability r ~ U(0, 1), or n E_k[mean CE], where k ~ U{1..n} of them are
(see `corruption.py`).
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from mdm_jax.objectives import corruption


@dataclasses.dataclass(frozen=True)
class Masks:
  """Masks of some calls, and the weight of a call's masked tokens.

  The sum over all calls of weight times cross-entropy estimates the rows' bound
  in nats; R rows have C calls each.
  """

  masked: Bool[Array, "C R L"]
  weight: Float[Array, "C R"]


@dataclasses.dataclass(frozen=True)
class Way:
  """One way to draw masks.

  Attributes:
    calls: denoiser calls that belong together, all of the same row.
    draw: (key, which tokens are real [R, L]) -> Masks with `calls` calls.
  """

  calls: int
  draw: Callable[[Key[Array, ""], Bool[Array, "R L"]], Masks]


def _independent(key: Key[Array, ""], rows: int) -> Float[Array, "R"]:
  return 1 - jax.random.uniform(key, (rows,))  # in (0, 1]


def _stratified(key: Key[Array, ""], rows: int) -> Float[Array, "R"]:
  """One uniform in (0, 1] per stratum; all share their offset (VDM, I.1)."""
  offset = 1 - jax.random.uniform(key)
  return (jnp.asarray(corruption.strata(rows), jnp.float32) + offset) / rows


Uniforms = Callable[[Key[Array, ""], int], Float[Array, "R"]]


def _coins(uniforms: Uniforms) -> Way:
  """Each token is masked independently with probability r."""

  def draw(key: Key[Array, ""], real: Bool[Array, "R L"]) -> Masks:
    first, second = jax.random.split(key)
    rate = uniforms(first, len(real))
    coins = jax.random.uniform(second, real.shape) < rate[:, None]
    return Masks((coins & real)[None], 1 / rate[None])

  return Way(1, draw)


def _counts(uniforms: Uniforms) -> Way:
  """Exactly ceil(r n) tokens are masked, as the library does."""

  def draw(key: Key[Array, ""], real: Bool[Array, "R L"]) -> Masks:
    first, second = jax.random.split(key)
    return _with_rates(second, real, uniforms(first, len(real))[None], 1.0)

  return Way(1, draw)


def _pairs(uniforms: Uniforms) -> Way:
  """Two calls with rates r and 1 - r, each with masks of its own."""

  def draw(key: Key[Array, ""], real: Bool[Array, "R L"]) -> Masks:
    first, second = jax.random.split(key)
    rate = uniforms(first, len(real))
    # r = 1 would leave a rate of 0, whose place is at the other end.
    other = jnp.where(rate < 1, 1 - rate, 1.0)
    return _with_rates(second, real, jnp.stack([rate, other]), 0.5)

  return Way(2, draw)


def _with_rates(
  key: Key[Array, ""],
  real: Bool[Array, "R L"],
  rate: Float[Array, "C R"],
  share: float,
) -> Masks:
  calls, rows = rate.shape
  keys = jax.random.split(key, (calls, rows))
  real = jnp.broadcast_to(real[None], (calls, *real.shape))
  zeros = jnp.zeros(real.shape, jnp.int32)
  masked = corruption.corrupt(keys, zeros, real, rate, 1).masked
  n, k = _count(real), _count(masked)
  return Masks(masked, share * n / jnp.maximum(k, 1))


def _complements(uniforms: Uniforms) -> Way:
  """Two calls: one masks k ~ U{0..n} tokens, the other all others.

  Every token is masked in one of them. The number masked in a call is uniform
  over 0..n, so the weight is (n + 1) / (2 k), and there is a case, k = 0, in
  which a call is wasted.
  """

  def draw(key: Key[Array, ""], real: Bool[Array, "R L"]) -> Masks:
    first, second = jax.random.split(key)
    n = _count(real)
    k = jnp.ceil(uniforms(first, len(real)) * (n + 1)) - 1
    noise = jnp.where(real, jax.random.uniform(second, real.shape), 2.0)
    rank = jnp.argsort(jnp.argsort(noise, axis=-1), axis=-1)
    one = (rank < k.astype(rank.dtype)[:, None]) & real
    masked = jnp.stack([one, ~one & real])
    return Masks(masked, (n[None] + 1) / jnp.maximum(2 * _count(masked), 1))

  return Way(2, draw)


def _count(where: Bool[Array, "*C R L"]) -> Float[Array, "*C R"]:
  return where.sum(axis=-1).astype(jnp.float32)


LIBRARY = "counts, mirrored"  # what `Masked` trains with
WAYS = {
  "coins": _coins(_independent),
  "coins, stratified": _coins(_stratified),
  "counts": _counts(_independent),
  "counts, stratified": _counts(_stratified),
  LIBRARY: _counts(corruption.stratified_uniforms),
  "r and 1 - r": _pairs(_independent),
  "r and 1 - r, stratified": _pairs(_stratified),
  "complements": _complements(_independent),
  "complements, stratified": _complements(_stratified),
}
