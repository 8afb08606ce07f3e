"""cuDNN's attention for packed rows: what it is given, and when it is taken."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.core import hardware, jax_internals, rng
from mdm_jax.core.errors import UserError
from mdm_jax.core.hardware import Place
from mdm_jax.model import kernel_choice, packed_kernel
from mdm_jax.model.context import CAUSAL, FULL, Visibility, row_context
from mdm_jax.model.kernels import KERNELS, Case

H100, A100 = Place("gpu", "9.0"), Place("gpu", "8.0")
CASE = Case("bfloat16", 64, 512, 512, most_segments=4)


def test_spans_are_the_texts_and_the_padding():
  segments = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1], [0] * 6])
  spans = jax.jit(packed_kernel.spans, static_argnums=1)
  lengths, offsets = spans(segments, 2)
  np.testing.assert_array_equal(lengths, [[3, 2, 1], [6, -1, -1], [6, -1, -1]])
  np.testing.assert_array_equal(
    offsets, [[0, 3, 5, 6], [0, 6, -1, -1], [0, 6, -1, -1]]
  )


@pytest.mark.parametrize("visibility", [FULL, CAUSAL])
def test_it_is_attention_within_the_spans(monkeypatch, visibility):
  """A function that follows the offsets stands for cuDNN's here."""

  def attend(query, key, value, lengths, offsets, causal):
    del lengths
    at = jnp.arange(query.shape[1])
    index = jax.vmap(
      lambda o: (at[:, None] >= jnp.where(o < 0, len(at), o)[None]).sum(1)
    )(offsets)
    mask = index[:, :, None] == index[:, None]
    mask = mask & (at[:, None] >= at[None])[None] if causal else mask
    return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None])

  monkeypatch.setattr(jax_internals, "packed_attention", lambda: attend)

  @jax.jit
  def both():
    segments = jnp.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
    side = row_context(segments, visibility=visibility, most_segments=2).side
    draw = lambda name, *shape: jax.random.normal(rng.stream(0, name), shape)
    query = draw("q", 2, 2, 3, 6, 8)
    key, value = draw("k", 2, 2, 6, 8), draw("v", 2, 2, 6, 8)
    return [
      kernel.attend(query, key, value, kernel.prepare(visibility, side, side))
      for kernel in (KERNELS["cudnn_packed"](), KERNELS["reference"]())
    ]

  got, want = both()
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  "changed, place, lacking",
  [
    ({}, H100, None),
    ({}, A100, "compute capability 8.0"),
    ({"most_segments": 1}, H100, "rows of one text"),
    ({"most_segments": 7}, H100, None),
    ({"most_segments": 8}, H100, "rows of up to 8 texts"),
    ({"most_segments": None}, H100, "any number of texts"),
    ({"visibility": CAUSAL}, H100, None),
    ({"visibility": Visibility("blocks", 4)}, H100, "visibility blocks"),
    ({"cache": True}, H100, "cache of keys"),
    ({"dtype": "float32"}, H100, "float32"),
  ],
)
def test_it_is_for_few_texts_on_a_gpu_that_has_it(changed, place, lacking):
  case = dataclasses.replace(CASE, **changed)
  found = KERNELS["cudnn_packed"]().lacks(case, place)
  assert found is lacking is None or lacking in found


def test_without_the_entry_in_jax_it_is_refused(monkeypatch):
  assert jax_internals.packed_attention() is not None
  monkeypatch.setattr(jax_internals, "packed_attention", lambda: None)
  assert "this version of JAX" in KERNELS["cudnn_packed"]().lacks(CASE, H100)


def test_a_program_for_a_gpu_elsewhere_can_not_have_it(monkeypatch):
  monkeypatch.setattr(hardware, "target", lambda: H100)
  with pytest.raises(UserError, match="on its GPU only; nearest valid: auto"):
    kernel_choice.chosen("cudnn_packed", CASE)
  assert kernel_choice.chosen("auto", CASE).name == "cudnn"
