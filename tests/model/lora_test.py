"""LoRA: what is added to a model, and the model that it is merged into."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.core import fields, rng, trees
from mdm_jax.core.errors import UserError
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.model import flops, lora
from mdm_jax.model.config import LoraConfig, ModelConfig
from mdm_jax.model.context import row_context
from mdm_jax.model.denoiser import Denoiser

LORA = LoraConfig(rank=4, alpha=6.0)
GROUPED = ModelConfig(
  num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, lora=LORA
)
MODELS = {
  "swiglu": GROUPED,
  "gelu": dataclasses.replace(
    GROUPED, block="gelu", qk_norm=False, qkv_bias=True
  ),
}
XT = jnp.array([[3, 1, 4, 1, 5, 9, 2, 6]] * 4)
VOCAB = Vocabulary(16)


@functools.cache
def _build(config, _mesh):
  """A denoiser, and parameters whose additions are not zero."""
  denoiser = Denoiser(config, VOCAB)

  def init(key):
    trained, base = lora.split(denoiser.init(key))
    leaves, tree = jax.tree.flatten(trained)
    for i, leaf in enumerate(leaves):
      noise = 0.1 * jax.random.normal(jax.random.key(i), leaf.shape)
      spec = jax.typeof(leaf).sharding.spec
      leaves[i] = leaf + jax.reshard(noise, spec)
    return base, jax.tree.unflatten(tree, leaves)

  return denoiser, *jax.jit(init)(rng.stream(0, "init"))


def build(config):
  return _build(config, jax.sharding.get_mesh())


def without(config):
  return Denoiser(dataclasses.replace(config, lora=LoraConfig()), VOCAB)


@functools.partial(jax.jit, static_argnums=0)
def logits(denoiser, params, keys=None):
  context = row_context(jnp.ones_like(XT), keys=keys)
  hidden = denoiser.hidden(params, XT, context)
  return denoiser.logits(params, hidden[:, -1])


@pytest.mark.parametrize("name", MODELS)
def test_merged_parameters_give_the_same_logits(any_mesh, name):
  config = MODELS[name]
  denoiser, base, trained = build(config)
  merged = lora.merged(config.lora, base, trained)
  unmerged = np.asarray(logits(denoiser, lora.joined(base, trained)))
  plain = without(config)
  found = np.asarray(logits(plain, merged))
  np.testing.assert_allclose(found, unmerged, rtol=0, atol=1e-6)
  assert np.abs(found - np.asarray(logits(plain, base))).max() > 0.01
  like = lambda tree: jax.tree.map(jax.typeof, tree)
  assert like(merged) == like(base)


@pytest.mark.parametrize("name", MODELS)
def test_every_product_has_additions_of_its_shape(mesh, name):
  config = MODELS[name]
  _, base, trained = build(config)
  found, beside = trees.by_path(trained), trees.by_path(base)
  products = {path.rpartition("/")[0] for path in found}
  gate = {"blocks/mlp/gate_lora"} if name == "swiglu" else set()
  attention = {f"blocks/attention/{n}" for n in ("query", "key", "value")}
  attention |= {"blocks/attention/out", "blocks/mlp/up", "blocks/mlp/down"}
  assert products == {f"{path}_lora" for path in attention} | gate
  for product in products:
    a, b = found[f"{product}/a"].shape, found[f"{product}/b"].shape
    assert a[0] == b[0] == 2 and a[-1] == b[1] == 4
    weight = beside[product.removesuffix("_lora")].shape
    assert (*a[:-1], *b[2:]) == weight
  assert trees.by_path(lora.joined(base, trained)).keys() == {*found, *beside}


def test_only_the_chosen_products_are_added_to(mesh):
  some = dataclasses.replace(LORA, products=("query", "down"))
  _, _, trained = build(dataclasses.replace(GROUPED, lora=some))
  assert {path.rpartition("/")[0] for path in trees.by_path(trained)} == {
    "blocks/attention/query_lora",
    "blocks/mlp/down_lora",
  }


def test_at_the_start_nothing_is_added(mesh):
  """B is zero, so that even the model's own dropout is the same."""
  config = dataclasses.replace(
    GROUPED, dropout=0.3, lora=dataclasses.replace(LORA, dropout=0.5)
  )
  denoiser, base, _ = build(config)
  trained, _ = lora.split(jax.jit(denoiser.init)(rng.stream(0, "init")))
  keys = jax.random.split(jax.random.key(1), len(XT))
  np.testing.assert_allclose(
    logits(denoiser, lora.joined(base, trained), keys),
    logits(without(config), base, keys),
    rtol=0,
    atol=1e-6,
  )
  assert all(not np.any(p["b"]) and np.any(p["a"]) for p in _pairs(trained))


def _pairs(trained):
  return [p for part in trained["blocks"].values() for p in part.values()]


def test_dropout_is_on_the_additions_and_only_in_training(mesh):
  config = dataclasses.replace(
    GROUPED, lora=dataclasses.replace(LORA, dropout=0.5)
  )
  denoiser, base, trained = build(config)
  params = lora.joined(base, trained)
  keys = lambda seed: jax.random.split(jax.random.key(seed), len(XT))
  one, other = (logits(denoiser, params, keys(seed)) for seed in (1, 2))
  assert np.abs(one - other).max() > 1e-3
  np.testing.assert_array_equal(one, logits(denoiser, params, keys(1)))
  np.testing.assert_array_equal(
    logits(denoiser, params),
    logits(Denoiser(GROUPED, VOCAB), params),
  )


@pytest.mark.parametrize(
  "given, words",
  [
    ({"rank": -1}, "model.lora.rank=-1 must be in [0, 65536]"),
    ({"rank": 17}, "model.lora.rank=17 is larger than .* nearest: 16"),
    ({"rank": 4, "products": ("qery",)}, "no product 'qery'; .*'query'"),
    ({"rank": 4, "alpha": 0.0}, "model.lora.alpha=0.0 must be in (0"),
  ],
)
def test_a_mistake_is_one_line_with_the_nearest_value(given, words):
  pattern = words if ".*" in words else re.escape(words)
  with pytest.raises(UserError, match=pattern) as told:
    model = dataclasses.replace(GROUPED, lora=LoraConfig(**given))
    fields.check(model, "model")
  assert "\n" not in str(told.value)


def test_an_mlp_without_a_gate_names_what_it_has():
  gate = dataclasses.replace(LORA, products=("gate",))
  model = dataclasses.replace(MODELS["gelu"], lora=gate)
  with pytest.raises(UserError, match="has no product 'gate'; nearest: 'up'"):
    fields.check(model, "model")


@pytest.mark.parametrize("name", MODELS)
def test_weights_that_stay_need_no_gradient(mesh, name):
  """The FLOPs of an update, written out: two products of each, not three."""
  config = MODELS[name]
  _, base, trained = build(config)
  rows, length, asked, vocab = 3, 8, 5, 16
  size = lambda tree: sum(x.size for x in jax.tree.leaves(tree) if x.ndim > 2)
  weights = size({"blocks": base["blocks"]})
  if config.qkv_bias:
    weights -= sum(
      base["blocks"]["attention"][f"{n}_bias"].size
      for n in ("query", "key", "value")
    )
  tokens = rows * length
  pairs = 3 * 4 * config.num_layers * config.embed_dim * rows * length**2
  wanted = 2 * tokens * (2 * weights + 3 * size(trained)) + pairs
  wanted += 2 * 2 * asked * config.embed_dim * vocab  # the head's
  found = flops.update_flops(config, rows, [(length, length)], asked, vocab)
  assert found == wanted
