"""The program for GPUs computes what the one for CPUs does; tried on a CPU.

Its kernels in Pallas run step by step here. cuDNN's run on a GPU only.
"""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from mdm_jax.core import hardware, rng
from mdm_jax.core.hardware import Place
from mdm_jax.core.sharding import RULES
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.model import gpu_kernels, layer_loop, layers
from mdm_jax.model.config import ModelConfig
from mdm_jax.model.context import row_context
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.objectives import cross_entropy, one_pass

MODEL = ModelConfig(
  num_layers=2, embed_dim=64, num_heads=2, dropout=0.25, dtype="float32"
)
VOCAB = Vocabulary.after_text(28)
ROWS, LENGTH = 8, 16
GPU, TPU = Place("gpu", "9.0"), Place("tpu")


@pytest.fixture(autouse=True)
def step_by_step(monkeypatch):
  """Lets Pallas run kernels without a GPU."""
  call = functools.partial(pl.pallas_call, interpret=True)
  monkeypatch.setattr(gpu_kernels.pl, "pallas_call", call)


def inputs(length):
  """Two texts a row and padding, a third of the tokens masked."""
  place = lambda x: jax.device_put(x, RULES.spec("batch"))
  draw = np.random.default_rng(0)
  x0 = place(draw.integers(0, 28, (ROWS, length)).astype(np.int32))
  row = np.repeat([1, 2, 0], [6, 8, length - 14])
  segments = place(np.tile(row, (ROWS, 1)).astype(np.int32))
  masked = place(draw.random((ROWS, length)) < 0.3) & (segments > 0)
  return x0, segments, masked


def loss_and_gradient(
  config: ModelConfig, smoothing: float = 0.1, length: int = LENGTH
):
  """Returns a function of the parameters, traced anew in every test."""
  denoiser = Denoiser(config, VOCAB)
  x0, segments, masked = inputs(length)
  keys = rng.per_row(rng.stream(0, "dropout"), jnp.arange(ROWS))
  keys = jax.reshard(keys, RULES.spec("batch"))

  def loss(params):
    xt = jnp.where(masked, VOCAB.mask, x0)
    context = row_context(segments, keys=keys, most_segments=2)
    hidden = denoiser.unfinished(params, xt, context)
    weight = jax.reshard(jnp.ones(x0.shape), RULES.spec("batch", None))
    return cross_entropy.masked_loss(
      *(denoiser.logits, denoiser.head(params), hidden, x0, masked, weight),
      *(x0.size, VOCAB, smoothing),
    )[0]

  return jax.value_and_grad(loss), denoiser


def test_loss_and_gradient_are_those_of_the_cpu(any_mesh, monkeypatch):
  """With unrolled layers, joined gates, one pass and the fused kernel."""
  run, denoiser = loss_and_gradient(MODEL)
  params = jax.jit(denoiser.init)(rng.stream(0, "init"))
  want = jax.jit(run)(params)
  monkeypatch.setattr(hardware, "target", lambda: GPU)
  got = jax.jit(loss_and_gradient(MODEL)[0])(params)
  np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
  for one, other in zip(*map(jax.tree.leaves, (got[1], want[1])), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=5e-6)


def dots(jaxpr) -> collections.Counter:
  """Counts the operands' and the result's dtypes of products without a batch.

  Products with one are those of attention.
  """
  found = collections.Counter()
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      _, (batch, _) = eqn.params["dimension_numbers"]
      if not batch:
        avals = [v.aval.dtype.name for v in (*eqn.invars, *eqn.outvars)]
        found[tuple(avals)] += 1
    for value in jax.tree.leaves(list(eqn.params.values())):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        found += dots(inner)
  return found


@pytest.mark.parametrize("place", [GPU, TPU])
def test_every_product_has_bfloat16_operands(mesh, monkeypatch, place):
  """And what is summed over tokens, the weights' gradients, is float32."""
  config = dataclasses.replace(
    MODEL, dtype="bfloat16", attention="reference", layer_loop="scan"
  )
  monkeypatch.setattr(hardware, "target", lambda: place)
  run, denoiser = loss_and_gradient(config)
  params = jax.eval_shape(denoiser.init, rng.stream(0, "init"))
  program = jax.make_jaxpr(run)(params)
  # Masked positions are found by a prefix sum: on GPUs a sort is many kernels.
  assert ("sort[" in str(program)) == (place != GPU)
  found = dots(program.jaxpr)
  assert {pair[:2] for pair in found} == {("bfloat16", "bfloat16")}
  # q, k, v, out, gate and up, down, and the head; its logits are float32, too.
  assert found["bfloat16", "bfloat16", "float32"] == 6 + 2


_DOT = re.compile(r"dot_general .*: \((.*)\) -> (.*)")
_BATCH = re.compile(r"batching_dims = \[([\d, ]*)\]")


def products(text: str) -> collections.Counter:
  """Counts the dtypes of a lowered program's products, attention's included.

  Those that leave only axes of a batch, sums over a head, are left out.
  """
  found = collections.Counter()
  for line in filter(_DOT.search, text.splitlines()):
    operands, result = _DOT.search(line).groups()
    *sizes, dtype = re.search(r"<(.*)>", result).group(1).split("x")
    batch = _BATCH.search(line)
    if len(sizes) > (len(batch.group(1).split(",")) if batch else 0):
      found[*re.findall(r"(\w+)>", operands.replace("x", " ")), dtype] += 1
  return found


def test_on_a_tpu_every_product_has_bfloat16_operands(mesh, monkeypatch):
  """In the program that is lowered for it, with splash attention."""
  config = dataclasses.replace(MODEL, dtype="bfloat16", embed_dim=128)
  monkeypatch.setattr(hardware, "target", lambda: TPU)
  run, denoiser = loss_and_gradient(config, length=128)
  params = jax.eval_shape(denoiser.init, rng.stream(0, "init"))
  with jax.numpy_dtype_promotion("standard"):  # splash attention promotes
    traced = jax.jit(run).trace(params)
  text = traced.lower(lowering_platforms=("tpu",)).as_text()
  found = products(text)
  # Six weights, forward and backward, and the head backward; in float32 the
  # logits and all weights' gradients.
  assert found == {
    ("bf16", "bf16", "bf16"): 13,
    ("bf16", "bf16", "f32"): 8,
  }
  # One loop over the layers, in which attention is not computed again.
  kernels = re.findall(r'kernel_name = "(\w+)"', text)
  assert sorted(kernels) == [
    "splash_mha_dkv_segmented_no_residuals",
    "splash_mha_fwd_segmented_residuals",
  ]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_pass_gives_the_same_losses_and_gradients(smoothing):
  """Also with ids that can't be predicted, and with large logits."""
  draw = np.random.default_rng(0)
  logits = 30 * draw.standard_normal((5, VOCAB.size)).astype(np.float32)
  possible = VOCAB.is_predictable(np.arange(VOCAB.size))
  logits = jnp.where(possible, logits, -jnp.inf)
  targets, weight = jnp.array([0, 3, 27, 5, 5]), jnp.arange(1.0, 6)
  results = [
    jax.jit(
      jax.value_and_grad(
        lambda x, f=f: (weight * f(x, targets, VOCAB, smoothing)).sum()
      )
    )(logits)
    for f in (one_pass.cross_entropy, cross_entropy.cross_entropy)
  ]
  np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-6)
  np.testing.assert_allclose(results[0][1], results[1][1], atol=1e-5)


@pytest.mark.parametrize("size, length", [(32, 24), (128, 7)])
def test_the_fused_norm_and_rotation_are_the_two_functions(size, length):
  shape = 2, length, 3, size
  draw = lambda name, *shape: jax.random.normal(rng.stream(0, name), shape)

  @jax.jit
  def both():
    x, cotangent = draw("x", *shape), draw("g", *shape)
    scale = 1 + 0.1 * draw("scale", size)
    positions = jnp.stack([jnp.arange(length), jnp.arange(length)[::-1]])
    cos, sin = layers.rotary(positions, size, 1e4)

    def plain(x, scale):
      heads = layers.rms_norm(jnp.swapaxes(x, 1, 2), scale, 1e-6)
      return jnp.swapaxes(layers.rotate(heads, cos, sin), 1, 2)

    fused = lambda x, scale: gpu_kernels.norm_rotate(x, scale, cos, sin, 1e-6)
    results = [jax.vjp(f, x, scale) for f in (fused, plain)]
    return [(out, gradient(cotangent)) for out, gradient in results]

  (got, got_grad), (want, want_grad) = both()
  np.testing.assert_allclose(got, want, atol=1e-5)
  for one, other in zip(got_grad, want_grad, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_drops_at_its_rate_independently(rate):
  """Against the binomial; by entry, by neighbours, by rows and by keys."""

  @jax.jit
  def dropped():
    keys = rng.per_row(rng.stream(0, "dropout"), jnp.arange(4))
    return layers.dropout(jnp.ones((4, 256, 128)), rate, keys)

  out = np.asarray(dropped())
  kept = out > 0
  np.testing.assert_allclose(np.unique(out[kept]), [1 / (1 - rate)], rtol=1e-6)

  def close(share, expected, count):
    error = (expected * (1 - expected) / count) ** 0.5
    assert np.abs(share - expected).max() < 5 * error

  close(kept.mean(), 1 - rate, kept.size)
  close(kept.mean(axis=(0, 1)), 1 - rate, 4 * 256)
  close(kept.mean(axis=(0, 2)), 1 - rate, 4 * 128)
  both = (1 - rate) ** 2
  for shift, axis in ((1, 2), (1, 1), (2, 2), (1, 0)):
    close((kept & np.roll(kept, shift, axis)).mean(), both, kept.size)


def test_dropouts_bits_are_fair():
  keys = rng.per_row(rng.stream(0, "dropout"), jnp.arange(2))
  words = np.asarray(rng.words(keys, (256, 256)))
  bits = (words[..., None] >> np.arange(32, dtype=np.uint32)) & 1
  spread = np.abs(bits.mean(axis=(1, 2)) - 0.5)
  assert spread.max() < 5 * 0.5 / 256


@pytest.mark.parametrize(
  "changed, place, unrolled, remat",
  [
    ({}, GPU, True, "none"),
    ({}, TPU, False, "dots"),
    ({}, Place("cpu"), False, "dots"),
    ({}, None, False, "dots"),
    ({"num_layers": 33}, GPU, False, "dots"),
    ({"layer_loop": "scan"}, GPU, False, "dots"),
    ({"layer_loop": "unrolled"}, Place("cpu"), True, "none"),
    ({"remat": "full"}, GPU, True, "full"),
  ],
)
def test_layers_are_unrolled_on_gpus(changed, place, unrolled, remat):
  found = layer_loop.choose(dataclasses.replace(MODEL, **changed), place)
  assert (found.unrolled, found.remat) == (unrolled, remat)


@pytest.mark.parametrize(
  "place, size, fused",
  [
    (GPU, 64, True),
    (GPU, 96, False),
    (GPU, 16, False),
    (Place("gpu", "7.5"), 64, False),
    (Place("gpu", "gfx90a"), 64, False),
    (TPU, 64, False),
  ],
)
def test_the_fused_kernel_is_for_gpus_that_have_it(
  monkeypatch, place, size, fused
):
  monkeypatch.setattr(hardware, "target", lambda: place)
  assert layers._has_kernel(size) == fused


def test_split_parameters_are_gathered_in_a_loop(any_mesh):
  split = any_mesh.shape["fsdp"] > 1
  assert layer_loop.choose(MODEL, GPU).unrolled == (not split)


def test_unrolled_layers_give_the_loops_gradient(mesh):
  """Whatever is computed again in the backward pass."""
  params = jax.jit(Denoiser(MODEL, VOCAB).init)(rng.stream(0, "init"))

  def gradient(loop, remat):
    config = dataclasses.replace(MODEL, layer_loop=loop, remat=remat)
    return jax.tree.leaves(jax.jit(loss_and_gradient(config)[0])(params))

  want = gradient("scan", "dots")
  for remat in ("none", "dots", "full"):
    for one, other in zip(gradient("unrolled", remat), want, strict=True):
      np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


def test_the_target_follows_the_mesh(mesh):
  assert hardware.target() == hardware.here() == Place("cpu")
  plan = jax.sharding.AbstractMesh((1,), ("a",))
  with jax.sharding.use_abstract_mesh(plan):
    assert hardware.target() is None and not hardware.on_gpu()
