"""LoRA: a low-rank addition to products of a model that itself stays as it is.

A product x W becomes x W + alpha / rank (x A) B, with A [inputs, rank] drawn at
random and B [rank, outputs] zero (Hu et al. 2021, arXiv 2106.09685). A and B
stand beside the weight in the tree of parameters, as WEIGHT_lora/a and b, with
its axes: stacked over layers, heads apart.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from mdm_jax.model import layers
from mdm_jax.model.config import LoraConfig

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Product:
  """A product of a block that can be adapted.

  Attributes:
    inward: logical axes of the weight's inputs, which A begins with.
    outward: logical axes of the weight's outputs, which B ends with.
    into: einsum of the activations and A.
    out: einsum of their result and B.
    result: logical axes of the product.
  """

  inward: tuple[str | None, ...]
  outward: tuple[str | None, ...]
  into: str
  out: str
  result: tuple[str | None, ...]


_TOKENS = "length", None
_HEADS = "heads", None
_PRODUCTS = {
  "query": Product(
    ("embed",),
    (*_HEADS, None),
    *("bld,da->bla", "bla,agrk->bgrlk"),
    ("batch", *_HEADS, *_TOKENS),
  ),
  **{
    name: Product(
      ("embed",),
      _HEADS,
      *("bld,da->bla", "bla,agk->bglk"),
      ("batch", "heads", *_TOKENS),
    )
    for name in ("key", "value")
  },
  "out": Product(
    (*_HEADS, None),
    ("embed",),
    *("bgrlk,grka->bla", "bla,ad->bld"),
    ("batch", *_TOKENS),
  ),
  **{
    name: Product(
      ("embed",),
      ("mlp",),
      *("bld,da->bla", "bla,af->blf"),
      ("batch", "length", "mlp"),
    )
    for name in ("gate", "up")
  },
  "down": Product(
    ("mlp",),
    ("embed",),
    *("blf,fa->bla", "bla,ad->bld"),
    ("batch", *_TOKENS),
  ),
}
_SUFFIX = "_lora"


class Adapter(nnx.Module):
  """A and B of one product."""

  def __init__(
    self, name: str, config: LoraConfig, weight: nnx.Param, rngs: nnx.Rngs
  ):
    product, shape = _PRODUCTS[name], weight[...].shape
    inputs = shape[: len(product.inward)]
    self._name, self._config = name, config
    self.a = layers.normal(
      rngs(),
      (*inputs, config.rank),
      *product.inward,
      None,
      fan_in=math.prod(inputs),
    )
    outputs = shape[len(inputs) :]
    self.b = layers.zeros((config.rank, *outputs), None, *product.outward)

  def __call__(self, x: Array, keys: Key[Array, "B"] | None) -> Array:
    """Returns what is added to the product of x."""
    product = _PRODUCTS[self._name]
    if keys is not None:
      number = list(_PRODUCTS).index(self._name)
      keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)
    x = layers.dropout(x, self._config.dropout, keys)
    low = layers.project(
      f"{self._name}_a", product.into, x, self.a, "batch", *_TOKENS
    )
    # As large as the product itself, but cheap to compute again.
    high = layers.project(
      *(f"{self._name}_b", product.out, low, self.b),
      *product.result,
      keep=False,
    )
    return high * self._config.scale


def adapt(module: nnx.Module, config: LoraConfig, rngs: nnx.Rngs) -> None:
  """Gives a module adapters beside those of its weights that shall have one."""
  for name in (config.products or _PRODUCTS) if config.rank else ():
    weight = getattr(module, name, None)
    if isinstance(weight, nnx.Param):
      setattr(module, name + _SUFFIX, Adapter(name, config, weight, rngs))


def added(
  module: nnx.Module,
  name: str,
  x: Array,
  result: Array,
  keys: Key[Array, "B"] | None,
) -> Array:
  """Returns a product with what its adapter adds, if it has one.

  Args:
    module: has the weight.
    name: of the weight.
    x: what it was multiplied by.
    result: the product.
    keys: for dropout, one per row; None disables it.
  """
  adapter = getattr(module, name + _SUFFIX, None)
  return result if adapter is None else result + adapter(x, keys)


# MARK: trees of parameters


def split(params: Params) -> tuple[Params, Params]:
  """Returns what is trained, and the rest of a tree of parameters.

  Without adapters everything is trained, and the rest is empty.
  """
  trained, rest = _apart(params)
  return (trained, rest) if trained else (params, {})


def _apart(tree: Params) -> tuple[Params, Params]:
  trained, rest = {}, {}
  for name, value in tree.items():
    if name.endswith(_SUFFIX):
      trained[name] = value
    elif not isinstance(value, dict):
      rest[name] = value
    else:
      ours, others = _apart(value)
      trained |= {name: ours} if ours else {}
      rest |= {name: others} if others else {}
  return trained, rest


def joined(base: Params, trained: Params) -> Params:
  """Returns the tree that `split` split."""
  result = dict(base)
  for name, value in trained.items():
    inner = base.get(name)
    result[name] = joined(inner, value) if isinstance(inner, dict) else value
  return result


@functools.partial(jax.jit, static_argnums=0)
def merged(config: LoraConfig, base: Params, trained: Params) -> Params:
  """Returns the parameters of a plain model that computes the same.

  Args:
    config: of the adapters.
    base: the parameters beside them, stacked over layers.
    trained: the adapters.
  """
  return _merged(config, base, trained)


def _merged(config: LoraConfig, base: Params, trained: Params) -> Params:
  result = dict(base)
  for name, value in trained.items():
    if name.endswith(_SUFFIX):
      weight = name.removesuffix(_SUFFIX)
      more = _products(value["a"], value["b"]) * config.scale
      result[weight] = base[weight] + more.astype(base[weight].dtype)
    else:
      result[name] = _merged(config, base[name], value)
  return result


def _products(a: Array, b: Array) -> Array:
  """Returns A B of every layer: [N, *I, r] and [N, r, *O] -> [N, *I, *O]."""
  inputs, outputs = "cdefg"[: a.ndim - 2], "hijkl"[: b.ndim - 2]
  return jnp.einsum(
    f"n{inputs}r,nr{outputs}->n{inputs}{outputs}",
    a,
    b,
    # The default is less precise on accelerators.
    precision="highest",
  )
