"""The denoiser: what its states depend on, its fields, and its parameters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mesh_harness import make_mesh

from mdm_jax import config as config_lib
from mdm_jax.core import rng, sharding
from mdm_jax.core.errors import UserError
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.model import flops, layers, placement
from mdm_jax.model.config import ModelConfig
from mdm_jax.model.context import (
  CAUSAL,
  OPENING,
  Opening,
  Visibility,
  row_context,
  visible,
)
from mdm_jax.model.denoiser import Denoiser

BASE = ModelConfig(num_layers=2, embed_dim=16, num_heads=4)
XT = jnp.array([[3, 1, 4, 1, 5, 9, 2, 6]])


hidden = jax.jit(Denoiser.hidden, static_argnums=0)


def build(**fields):
  return _build(dataclasses.replace(BASE, **fields), jax.sharding.get_mesh())


@functools.cache
def _build(config, _mesh):
  denoiser = Denoiser(config, Vocabulary(16, forbidden=((12, 16),)))
  return denoiser, jax.jit(denoiser.init)(rng.stream(0, "init"))


def run(*args, **fields):
  """States, fetched: to slice an array that isn't takes another program."""
  return np.asarray(states(*args, **fields))


def states(denoiser, params, xt=XT, segments=None, rate=0.5, row_keys=None):
  return _run(denoiser, params, xt, segments, rate, row_keys)


@functools.partial(jax.jit, static_argnums=0)
def _run(denoiser, params, xt, segments, rate, row_keys):
  segments = jnp.ones_like(xt) if segments is None else segments
  rates = jnp.full(len(xt), rate, jnp.float32)
  context = row_context(segments, condition=rates, keys=row_keys)
  return denoiser.hidden(params, xt, context)


def test_packed_segments_do_not_see_each_other(mesh):
  """The gradient of one text's states by another's embeddings is zero."""
  denoiser, params = build()
  segments = jnp.array([[1, 1, 1, 2, 2, 2, 2, 0]])

  def first_segment(embedding):
    changed = params | {"embedding": embedding}
    h = states(denoiser, changed, segments=segments)
    return (h[:, :3] ** 2).sum()

  grad = np.asarray(jax.jit(jax.grad(first_segment))(params["embedding"]))
  mine, others = {3, 1, 4}, {5, 9, 2, 6}
  for token in others:
    assert (grad[token] == 0).all()
  for token in mine:
    assert np.abs(grad[token]).max() > 0


def test_a_packed_text_gets_the_states_it_gets_alone(mesh):
  denoiser, params = build()
  segments = jnp.array([[1, 1, 1, 2, 2, 2, 2, 2]])
  packed = run(denoiser, params, segments=segments)
  alone = run(denoiser, params, xt=XT[:, 3:])
  np.testing.assert_allclose(packed[:, 3:], alone, rtol=1e-4, atol=1e-6)


def test_a_shifted_output_is_the_one_before_within_its_segment(mesh):
  denoiser, params = build()
  segments = jnp.array([[1, 1, 1, 2, 2, 2, 2, 0]])
  context = row_context(segments, visibility=CAUSAL)
  plain = hidden(denoiser, params, XT, context)
  shift = dataclasses.replace(context, shift=True)
  np.testing.assert_array_equal(
    hidden(denoiser, params, XT, shift), plain[:, [0, 0, 1, 3, 3, 4, 5, 7]]
  )


@pytest.mark.parametrize("kind", ["causal", "blocks"])
def test_nothing_comes_from_what_is_not_visible(mesh, kind):
  """The states of some positions, by the embeddings of all, block length 2."""
  denoiser, params = build()
  context = row_context(jnp.ones_like(XT), visibility=Visibility(kind, 2))

  def state(embedding):
    h = hidden(denoiser, params | {"embedding": embedding}, XT, context)
    return (h[:, 4] ** 2).sum()

  grad = np.abs(jax.jit(jax.grad(state))(params["embedding"])).max(axis=1)
  seen = 5 if kind == "causal" else 6
  mine, others = set(XT[0, :seen].tolist()), set(XT[0, seen:].tolist())
  assert (grad[list(others - mine)] == 0).all()
  assert (grad[list(mine)] > 0).all()


def test_nothing_comes_from_pairs_that_are_still_closed(mesh):
  """One layer, so that nothing comes through a third position."""
  denoiser, params = build(num_layers=1)
  xt = jnp.arange(8)[None]
  half = Opening(jnp.full(1, 0.5), rng.stream(0, "opening")[None])
  context = row_context(jnp.ones_like(xt), visibility=OPENING, opening=half)

  def state(embedding):
    h = hidden(denoiser, params | {"embedding": embedding}, xt, context)
    return (h[:, 3] ** 2).sum()

  grad = np.abs(jax.jit(jax.grad(state))(params["embedding"])).max(axis=1)
  seen = np.asarray(visible(context.side, context.side))[0, 3]
  assert 4 < seen.sum() < 8
  np.testing.assert_array_equal(grad[:8] > 0, seen)


def test_rotary_angles_follow_the_positions_that_are_given(mesh):
  denoiser, params = build()
  context = row_context(jnp.ones_like(XT), condition=jnp.ones(1))
  plain = np.asarray(hidden(denoiser, params, XT, context))
  later = dataclasses.replace(context, positions=context.positions + 7)
  apart = dataclasses.replace(context, positions=2 * context.positions)
  np.testing.assert_allclose(
    hidden(denoiser, params, XT, later), plain, rtol=1e-4, atol=1e-5
  )
  assert np.abs(hidden(denoiser, params, XT, apart) - plain).max() > 1e-3


def test_attention_is_bidirectional(mesh):
  denoiser, params = build()
  other = np.array(XT)
  other[0, 7] = 0
  changed = run(denoiser, params, xt=other)
  assert np.abs(changed - run(denoiser, params))[0, 0].max() > 0


def test_unreal_ids_are_never_predicted(mesh):
  denoiser, params = build()
  logits = jax.jit(denoiser.logits)(params, run(denoiser, params)[0])
  logits = np.asarray(logits)
  assert np.isneginf(logits[:, 12:]).all()
  assert np.isfinite(logits[:, :12]).all()


def test_grouped_queries_equal_repeated_heads(mesh):
  grouped, params = build(num_kv_heads=2)
  full, _ = build()
  attention = jax.tree.map(np.asarray, params["blocks"]["attention"])
  attention["query"] = attention["query"].reshape(2, 16, 4, 1, 4)
  attention["out"] = attention["out"].reshape(2, 4, 1, 4, 16)
  for name in ("key", "value"):
    attention[name] = np.repeat(attention[name], 2, axis=2)
  repeated = params | {"blocks": params["blocks"] | {"attention": attention}}
  np.testing.assert_allclose(
    run(grouped, params), run(full, repeated), rtol=1e-4, atol=1e-6
  )


@pytest.mark.parametrize("groups", [4, 2])
def test_xlas_attention_equals_the_reference(mesh, groups):
  segments = jnp.array([[1, 1, 1, 2, 2, 2, 2, 0]])
  denoiser, params = build(num_kv_heads=groups)
  other, _ = build(num_kv_heads=groups, attention="xla")
  np.testing.assert_allclose(
    run(denoiser, params, segments=segments),
    run(other, params, segments=segments),
    rtol=1e-4,
    atol=1e-6,
  )


@pytest.mark.parametrize(
  "shape, attention",
  [((1, 1, 1), "reference"), ((1, 1, 2), "reference"), ((1, 1, 2), "xla")],
  ids=str,
)
def test_found_C10_a_batch_of_one_row_works_however_it_is_split(
  shape, attention
):
  """Newer versions of JAX forget how an axis of size one is split."""
  devices = jax.devices()[: shape[0] * shape[1] * shape[2]]
  with jax.set_mesh(jax.make_mesh(shape, sharding.AXES, devices=devices)):
    denoiser, params = build(attention=attention)
    split = sharding.batch_sharding(jax.sharding.get_mesh(), rank=2)
    alone = jax.device_put(XT, split)
    two = jax.device_put(jnp.concatenate([XT, XT]), split)

    @functools.partial(jax.jit, static_argnums=2)
    @functools.partial(jax.grad, has_aux=True)
    def gradient(params, xt, _rows):
      h = states(denoiser, params, xt)
      return (h**2).sum(), h

    grads, h = jax.device_get(gradient(params, alone, 1))
    both, of_two = jax.device_get(gradient(params, two, 2))
    np.testing.assert_allclose(h[0], of_two[0], rtol=1e-5, atol=1e-6)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(2 * a, b, rtol=1e-4, atol=1e-5),
      *(grads, both),
    )


def test_rotation_depends_on_relative_positions_only():
  q, k = jax.random.normal(rng.stream(0, "qk"), (2, 1, 1, 1, 8))

  @jax.jit
  def score(m, n):
    at = lambda p: layers.rotary(jnp.reshape(p, (1, 1)), 8, 10_000.0)
    return (layers.rotate(q, *at(m)) * layers.rotate(k, *at(n))).sum()

  np.testing.assert_allclose(score(3, 1), score(13, 11), rtol=1e-4)
  assert abs(score(3, 1) - score(3, 2)) > 1e-4


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_gradient(mesh, remat):
  plain, params = build()
  other, _ = build(remat=remat)
  loss = lambda d: lambda p: (states(d, p) ** 2).sum()
  want, got = (jax.jit(jax.grad(loss(d)))(params) for d in (plain, other))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    want,
    got,
  )


def test_rate_is_read_only_with_time_conditioning(mesh):
  plain, params = build()
  np.testing.assert_array_equal(
    run(plain, params, rate=0.1), run(plain, params, rate=0.9)
  )
  timed, params = build(time_conditioning=True)
  # adaLN-zero starts as the identity; wake it up.
  params = jax.tree.map(lambda p: np.asarray(p) + np.float32(0.3), params)
  change = run(timed, params, rate=0.1) - run(timed, params, rate=0.9)
  assert np.abs(change).max() > 1e-3


def test_fresh_time_conditioning_is_the_identity(mesh):
  timed, params = build(time_conditioning=True)
  embedded = np.asarray(params["embedding"])[XT]
  np.testing.assert_array_equal(run(timed, params), embedded)


def test_dropout_follows_the_rows_keys(mesh):
  denoiser, params = build(dropout=0.5)
  xt = jnp.repeat(XT, 2, axis=0)
  keys = rng.per_row(rng.stream(0, "dropout"), jnp.arange(2))
  out = run(denoiser, params, xt=xt, row_keys=keys)
  out = np.asarray(out)
  assert np.abs(out[0] - out[1]).max() > 0
  alone = run(denoiser, params, row_keys=keys[1:])
  np.testing.assert_allclose(out[1:], alone, rtol=1e-4, atol=1e-6)
  without = np.asarray(run(denoiser, params, xt=xt))
  np.testing.assert_array_equal(without[0], without[1])


def test_bfloat16_keeps_float32_parameters_and_logits(mesh):
  denoiser, params = build(dtype="bfloat16")
  hidden = run(denoiser, params)
  assert hidden.dtype == jnp.bfloat16
  logits = jax.eval_shape(denoiser.logits, params, hidden[0])
  assert logits.dtype == jnp.float32
  assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  exact, _ = build()
  np.testing.assert_allclose(
    hidden.astype(jnp.float32), run(exact, params), atol=0.03
  )


def test_layers_differ_and_paths_are_readable(mesh):
  _, params = build()
  query = params["blocks"]["attention"]["query"]
  assert query.shape == (2, 16, 4, 1, 4)
  assert np.abs(query[0] - query[1]).max() > 0


def test_program_size_does_not_grow_with_depth(mesh):
  def size(layers):
    denoiser, params = build(num_layers=layers)
    loss = lambda p: states(denoiser, p).sum()
    return len(jax.jit(jax.grad(loss)).lower(params).as_text().splitlines())

  assert size(6) < 1.05 * size(2)


def test_parameters_are_split_as_the_rules_say(any_mesh):
  _, params = build()
  specs = jax.tree.map(lambda p: p.sharding.spec, params)
  assert specs["embedding"] == jax.P("tensor", "fsdp")
  assert specs["blocks"]["mlp"]["down"] == jax.P(None, "tensor", "fsdp")
  assert specs["blocks"]["attention"]["key"] == jax.P(
    None, "fsdp", "tensor", None
  )


# MARK: fields that other people's checkpoints need

ATTENTION = {  # of 4 heads, 2 of them with keys and values; without layers
  "query": lambda k: (16, 2, 2, k),
  "key": lambda k: (16, 2, k),
  "value": lambda k: (16, 2, k),
  "out": lambda k: (2, 2, k, 16),
}
BIASES = {"query_bias": (2, 2, 4), "key_bias": (2, 4), "value_bias": (2, 4)}
OTHERS = {
  "head_dim": ({"head_dim": 6}, {n: s(6) for n, s in ATTENTION.items()}),
  "qkv_bias": (
    {"qkv_bias": True},
    {n: s(4) for n, s in ATTENTION.items()} | BIASES,
  ),
  "norm_eps": ({"norm_eps": 1e-2}, {n: s(4) for n, s in ATTENTION.items()}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_fields_give_attention_its_shapes(mesh, name):
  fields, shapes = OTHERS[name]
  config = dataclasses.replace(BASE, num_kv_heads=2, **fields)
  denoiser = Denoiser(config, Vocabulary(16, forbidden=((12, 16),)))
  params = jax.eval_shape(denoiser.init, rng.stream(0, "init"))
  attention = params["blocks"]["attention"]
  got = {n: x.shape[1:] for n, x in attention.items() if "norm" not in n}
  assert got == shapes


def test_a_model_of_other_fields_is_the_same_on_every_mesh():
  """All of them at once: each adds a term to what is compared."""
  fields = {k: v for changed, _ in OTHERS.values() for k, v in changed.items()}
  tokens, found = np.tile(np.asarray(XT), (4, 1)) + np.arange(4)[:, None], []
  for mesh in ("1x1", "4x2"):
    with jax.set_mesh(make_mesh(mesh)):
      denoiser, params = build(num_kv_heads=2, **fields)
      params = jax.tree.map(lambda x: x + 0.1, params)  # biases begin at 0
      split = sharding.batch_sharding(jax.sharding.get_mesh(), rank=2)
      xt = jax.device_put(tokens, split)
      loss = lambda p, d=denoiser, xt=xt: (states(d, p, xt) ** 2).sum()
      both = jax.jit(jax.value_and_grad(loss))
      found.append(jax.device_get(both(params)))
  value, grads = found[0]
  assert np.isfinite(value) and value != 0
  for grad in jax.tree.leaves(grads["blocks"]):
    assert np.isfinite(grad).all() and np.abs(grad).max() > 0
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-3, atol=1e-5 * np.abs(b).max()
    ),
    *found,
  )


def test_a_bias_of_values_moves_what_attention_gives_by_itself(mesh):
  """Weights sum to 1, so all positions gain the same: values' biases, out."""
  denoiser, params = build(qkv_bias=True, num_layers=1)
  attention = params["blocks"]["attention"]
  bias = jnp.linspace(-1, 1, 16).reshape(1, 4, 4)
  moved = params["blocks"] | {"attention": attention | {"value_bias": bias}}
  flat = jax.tree.map(jnp.zeros_like, params["blocks"]["mlp"])
  silent = lambda blocks: params | {"blocks": blocks | {"mlp": flat}}
  change = run(denoiser, silent(moved)) - run(
    denoiser, silent(params["blocks"])
  )
  want = jnp.einsum("gk,grkd->d", bias[0], attention["out"][0])
  want = np.broadcast_to(want, change.shape)
  np.testing.assert_allclose(change, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head_dim", [None, 6])
def test_flops_are_those_of_the_weights_and_of_all_pairs(mesh, head_dim):
  denoiser, params = build(num_kv_heads=2, head_dim=head_dim)
  rows, length, size = 3, 8, head_dim or 4
  blocks = jax.tree.leaves(params["blocks"])
  weights = sum(x.size for x in blocks if x.ndim > 2)
  pairs = 2 * 4 * size * rows * length**2  # layers, heads
  want = 2 * weights * rows * length + 4 * pairs
  assert flops.trunk_flops(denoiser.config, rows, [(length, length)]) == want


def test_a_head_of_its_own_size_needs_no_divisor_but_must_be_even():
  check = lambda **fields: config_lib.Config(
    model=dataclasses.replace(BASE, **fields)
  )
  check(num_heads=3, head_dim=8)
  with pytest.raises(UserError, match="num_heads=3 does not divide.*head_dim"):
    check(num_heads=3)
  with pytest.raises(UserError, match="head_dim = 5 is odd.*head_dim=6"):
    check(head_dim=5)


def test_cudnn_is_refused_where_there_is_no_gpu(mesh):
  with pytest.raises(UserError, match="this is a cpu; nearest valid: auto"):
    placement.check_model(dataclasses.replace(BASE, attention="cudnn"), mesh)
