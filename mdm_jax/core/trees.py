"""Leaves of pytrees by readable paths, as in `blocks/attention/key`."""

from typing import Any

import jax


def by_path(tree: Any) -> dict[str, Any]:
  """Returns the leaves of a tree by path, in the tree's order."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
  return {name(path): leaf for path, leaf in leaves}
