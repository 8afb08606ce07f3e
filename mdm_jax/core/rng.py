"""Random keys as a pure function of (seed, stream name, counters).

No key is ever stored or split: whoever needs randomness says what it is for
and which update, microbatch or row it belongs to. A resumed run, another
device count and another host count therefore draw the same numbers.
"""

import zlib

import jax
from jaxtyping import Array, Int, Key


def stream(
  seed: int, name: str, *counters: int | Int[Array, ""]
) -> Key[Array, ""]:
  """Returns the key of one named stream at the given counters."""
  key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
  for counter in counters:
    key = jax.random.fold_in(key, counter)
  return key


def per_row(key: Key[Array, ""], rows: Int[Array, "*B"]) -> Key[Array, "*B"]:
  """Folds global row numbers into a key: one independent key a row."""
  fold = jax.random.fold_in
  for _ in range(rows.ndim):
    fold = jax.vmap(fold, in_axes=(None, 0))
  return fold(key, rows)
