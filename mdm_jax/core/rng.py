"""Random keys as a pure function of (seed, stream name, counters).

No key is stored or split. Code that needs randomness names its stream and the
update, microbatch or row that it is for. So a resumed run, and a run on another
number of devices or hosts, draws the same numbers.
"""

import zlib

import jax
from jaxtyping import Array, Int, Key


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
