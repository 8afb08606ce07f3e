"""Keeps compiled programs on disk, so that the next process finds them."""

import os

import jax


def turn_on() -> None:
  """Turns on JAX's compilation cache on disk, unless it is set already."""
  cache = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
  # JAX_COMPILATION_CACHE_DIR takes precedence.
  if not jax.config.jax_compilation_cache_dir:
    jax.config.update(
      "jax_compilation_cache_dir", os.path.join(cache, "mdm_jax", "xla")
    )
