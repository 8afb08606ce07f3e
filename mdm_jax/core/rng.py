"""Random keys as a pure function of (seed, stream name, counters).

No key is stored or split. Code that needs randomness names its stream and the
update, microbatch or row that it is for. So a resumed run, and a run on another
number of devices or hosts, draws the same numbers.
"""

import zlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key, UInt32


def stream(
  seed: int, name: str, *counters: int | Int[Array, ""]
) -> Key[Array, ""]:
  """Returns the key of a named stream at the given counters.

  Args:
    seed: the run's seed.
    name: name of the stream; use each name for one purpose only.
    *counters: such as the update's index.

  Example:

    key = rng.stream(seed, "mask", update)
    keys = rng.per_row(key, jnp.arange(num_rows))
  """
  # crc32, not `hash`, which is salted differently in every process.
  key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
  for counter in counters:
    key = jax.random.fold_in(key, counter)
  return key


def per_row(key: Key[Array, ""], rows: Int[Array, "*B"]) -> Key[Array, "*B"]:
  """Returns one key per row, by folding global row indices into a key."""
  fold = jax.random.fold_in
  for _ in range(rows.ndim):
    fold = jax.vmap(fold, in_axes=(None, 0))
  return fold(key, rows)


def words(
  keys: Key[Array, "B"], shape: tuple[int, int]
) -> UInt32[Array, "B M N"]:
  """Returns 32 random bits per entry: a hash of the row's key and its position.

  JAX's generators would take as long as a tenth of an update on a GPU. This is
  MurmurHash3's finaliser, with half of the key added before each of its rounds.

  Args:
    keys: one per row.
    shape: sizes M and N of the axes behind the rows.
  """
  data = jax.random.key_data(keys)
  first, second = (data[:, i, None, None] for i in (0, 1))
  rows, columns = (
    jax.lax.broadcasted_iota(jnp.uint32, (1, *shape), axis) for axis in (1, 2)
  )
  h = (rows * shape[1] + columns) * jnp.uint32(0x9E3779B9) + first
  h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B) + second
  h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
  return h ^ (h >> 16)
