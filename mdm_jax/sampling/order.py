"""Which positions are revealed first."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key


def random_order(
  row_keys: Key[Array, "B"], free: Bool[Array, "B L"]
) -> Int[Array, "B L"]:
  """Returns the positions of each row in random order, fixed ones last."""
  draw = jax.vmap(lambda key: jax.random.uniform(key, free.shape[1:]))
  return jnp.argsort(jnp.where(free, draw(row_keys), 2.0), axis=1)
