"""Which kernel `model.attention=auto` chooses where; this needs no GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.core import accelerators, hardware, rng
from mdm_jax.core.errors import UserError
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.model import kernel_choice, kernels
from mdm_jax.model.context import (
  CAUSAL,
  FULL,
  Visibility,
  row_context,
  visible,
)
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.model.kernel_choice import Choice
from mdm_jax.model.kernels import KERNELS, Case, Kernel, Place

H100, A100 = Place("gpu", "9.0"), Place("gpu", "8.0")


@pytest.mark.parametrize(
  "place, dtype, head, length, name, why",
  [
    (Place("cpu"), "float32", 64, 128, "reference", "CPU"),
    (Place("tpu"), "bfloat16", 64, 128, "splash", "bfloat16, heads of 64"),
    (Place("tpu"), "bfloat16", 64, 64, "xla", "splash attention has no rows"),
    (Place("tpu"), "bfloat16", 96, 128, "xla", "no heads of 96, only of 64"),
    (Place("rocm"), "bfloat16", 64, 128, "xla", "on a rocm"),
    (H100, "bfloat16", 64, 512, "cudnn", "bfloat16, heads of 64"),
    (H100, "bfloat16", 256, 512, "cudnn", "heads of 256"),
    (A100, "bfloat16", 128, 64, "cudnn", "heads of 128"),
    (A100, "bfloat16", 256, 64, "xla", "only multiples of 8 up to 128"),
    (H100, "float32", 64, 512, "xla", "no float32"),
    (H100, "bfloat16", 36, 512, "xla", "heads of 36, only multiples of 8"),
    (H100, "bfloat16", 64, 511, "xla", "511 tokens, an odd number"),
    (Place("gpu", "7.0"), "bfloat16", 64, 512, "xla", "capability 7.0"),
    (Place("gpu", "gfx90a"), "bfloat16", 64, 512, "xla", "gfx90a"),
    (Place("gpu"), "bfloat16", 64, 512, "xla", "capability None"),
  ],
)
def test_auto_takes_the_fast_kernel_wherever_it_is_right(
  place, dtype, head, length, name, why
):
  case = Case(dtype, head, length, length)
  found = kernel_choice.choose("auto", place, case)
  assert found.name == name and why in found.why
  asked = kernel_choice.choose("xla", place, case)
  assert asked.name == "xla"


def test_what_jax_can_not_take_is_not_taken(monkeypatch):
  """There is no cuDNN here, whatever the GPU is said to be."""
  monkeypatch.setattr(hardware, "here", lambda: H100)
  case = Case("bfloat16", 64, 128, 128)
  found = kernel_choice.chosen("auto", case)
  assert found.name == "xla" and "JAX says of cuDNN's: " in found.why
  assert kernel_choice.refusal("xla", Case("float32", 64, 128, 128)) is None
  monkeypatch.setattr(kernel_choice, "refusal", lambda *_: None)
  why = "cuDNN's, of bfloat16, heads of 64"
  dense = f"{why}; its mask is dense, 0.03 MiB a row"
  assert kernel_choice.chosen("auto", case) == Choice("cudnn", dense)
  alone = dataclasses.replace(case, most_segments=1)
  assert kernel_choice.chosen("auto", alone) == Choice("cudnn", why)


def test_cudnn_by_name_is_refused_in_one_line_where_it_can_not_be(monkeypatch):
  case = Case("bfloat16", 64, 128, 128)
  assert kernel_choice.chosen("cudnn", case).name == "cudnn"
  monkeypatch.setattr(hardware, "here", lambda: H100)
  with pytest.raises(UserError, match="rows of 7 tokens.*nearest valid: auto"):
    kernel_choice.chosen("cudnn", Case("bfloat16", 64, 7, 7))


def test_gpus_have_a_capability_and_tpus_have_none():
  for name in ("a100-40", "a100-80", "h100", "h200"):
    assert kernels.parsed(accelerators.by_name(name).capability) >= (8, 0)
  assert accelerators.by_name("v5e").capability is None


# MARK: by name


def test_a_kernels_old_name_is_answered_with_the_new_one():
  with pytest.raises(UserError) as caught:
    KERNELS.check("fused", "model.attention")
  assert str(caught.value) == "model.attention='fused' is called 'xla' now"
  with pytest.raises(UserError, match="unknown attention kernel; did you mean"):
    kernel_choice.choose("referense", Place("cpu"), Case("float32", 8, 8, 8))
  assert [*KERNELS][:4] == ["auto", "reference", "xla", "cudnn"]


class Slow(Kernel):
  """Of a user: one pair at a time, by the rule, for causal calls only."""

  def lacks(self, case, place):
    return None if case.visibility == CAUSAL else case.visibility.kind

  def prepare(self, visibility, q, k):
    return visible(q, k)

  def attend(self, query, key, value, prepared):
    scores = (
      jnp.einsum("bgrqk,bgmk->bgrqm", query, key) / query.shape[-1] ** 0.5
    )
    scores = jnp.where(prepared[:, None, None], scores, -jnp.inf)
    return jnp.einsum("bgrqm,bgmk->bgrqk", jax.nn.softmax(scores), value)


@pytest.fixture
def slow(monkeypatch):
  monkeypatch.setattr(KERNELS, "_pieces", {**KERNELS._pieces})
  KERNELS.register("slow", Slow)


def test_a_kernel_of_your_own_is_taken_by_its_name(mesh, tiny_model, slow):
  own = dataclasses.replace(tiny_model, attention="slow")
  vocab = Vocabulary(16)
  denoiser, reference = Denoiser(own, vocab), Denoiser(tiny_model, vocab)
  params = jax.jit(denoiser.init)(rng.stream(0, "init"))
  tokens = jnp.arange(14).reshape(2, 7) % 12
  segments = jnp.array([[1, 1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1]])
  causal = row_context(segments, visibility=CAUSAL)
  np.testing.assert_allclose(
    jax.jit(denoiser.hidden)(params, tokens, causal),
    jax.jit(reference.hidden)(params, tokens, causal),
    rtol=1e-4,
    atol=1e-5,
  )
  with pytest.raises(UserError, match="slow has no full; nearest valid: auto"):
    jax.eval_shape(denoiser.hidden, params, tokens, row_context(segments))


# MARK: what is prepared


@pytest.mark.parametrize("name", ["reference", "xla"])
@pytest.mark.parametrize("kind", ["full", "causal", "blocks"])
def test_queries_and_keys_may_differ_in_number(any_mesh, name, kind):
  """The last queries of rows, alone, get what they get among all."""
  rows, length, last = 8, 6, 2
  split = lambda *axes: jax.P(("replica", "fsdp"), *axes)
  segments = np.tile([[1, 1, 1, 1, 2, 2], [1, 1, 1, 1, 1, 0]], (4, 1))
  segments = jax.device_put(segments.astype(np.int32), split())
  context = row_context(segments, visibility=Visibility(kind, 2))
  k = context.side
  tail = lambda x: jax.device_put(np.asarray(x)[..., -last:], split())
  q = dataclasses.replace(
    k, **{n: tail(getattr(k, n)) for n in ("segments", "label", "horizon")}
  )
  heads = split("tensor", None, None, None)
  draw = lambda name, *shape: jax.random.normal(rng.stream(0, name), shape)
  query = jax.device_put(draw("q", rows, 2, 3, length, 4), heads)
  key, value = (
    jax.device_put(draw(n, rows, 2, length, 4), split("tensor", None, None))
    for n in "kv"
  )
  kernel, visibility = KERNELS[name](), context.visibility

  @jax.jit
  def attend(query, q):
    return kernel.attend(query, key, value, kernel.prepare(visibility, q, k))

  whole, some = attend(query, k), attend(query[..., -last:, :], q)
  np.testing.assert_allclose(whole[..., -last:, :], some, rtol=1e-4, atol=1e-5)


def test_cudnn_gets_lengths_where_they_describe_the_mask():
  """JAX's own takes the same arguments: where real, what the mask gives."""
  segments = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])

  @functools.partial(jax.jit, static_argnums=0)
  def both(visibility):
    draw = lambda name: jax.random.normal(rng.stream(0, name), (2, 6, 3, 4))
    heads, attend = map(draw, "qkv"), jax.nn.dot_product_attention
    query, key, value = heads
    context = row_context(
      jnp.asarray(segments), visibility=visibility, most_segments=1
    )
    side = context.side
    given = kernels.CuDNN().prepare(visibility, side, side)
    assert "mask" not in given
    want = attend(query, key, value, mask=visible(side, side)[:, None])
    return attend(query, key, value, **given), want

  for visibility in (FULL, CAUSAL):
    got, want = map(np.asarray, both(visibility))
    real = segments > 0
    np.testing.assert_allclose(got[real], want[real], rtol=1e-4, atol=1e-5)

  def prepare(segments):
    packed = row_context(segments).side
    return kernels.CuDNN().prepare(FULL, packed, packed)["mask"]

  assert jax.eval_shape(prepare, segments).shape[-2:] == (6, 6)
