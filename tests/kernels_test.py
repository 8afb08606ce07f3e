"""What `model.attention=auto` takes where; no GPU is needed to say it."""

import jax.numpy as jnp
import pytest

from mdm_jax.core import accelerators
from mdm_jax.core.errors import UserError
from mdm_jax.model import kernels
from mdm_jax.model.kernels import Choice, Place

H100, A100 = Place("gpu", "9.0"), Place("gpu", "8.0")


@pytest.mark.parametrize(
  "place, dtype, head, length, name, why",
  [
    (Place("cpu"), "float32", 64, 128, "reference", "CPU"),
    (Place("tpu"), "bfloat16", 64, 128, "fused", "on a tpu"),
    (H100, "bfloat16", 64, 512, "cudnn", "bfloat16, heads of 64"),
    (H100, "bfloat16", 256, 512, "cudnn", "heads of 256"),
    (A100, "bfloat16", 128, 64, "cudnn", "heads of 128"),
    (A100, "bfloat16", 256, 64, "fused", "only multiples of 8 up to 128"),
    (H100, "float32", 64, 512, "fused", "no float32"),
    (H100, "bfloat16", 36, 512, "fused", "heads of 36, only multiples of 8"),
    (H100, "bfloat16", 64, 511, "fused", "511 tokens, an odd number"),
    (Place("gpu", "7.0"), "bfloat16", 64, 512, "fused", "capability 7.0"),
    (Place("gpu", "gfx90a"), "bfloat16", 64, 512, "fused", "gfx90a"),
    (Place("gpu"), "bfloat16", 64, 512, "fused", "capability None"),
  ],
)
def test_auto_takes_cudnn_wherever_it_is_right(
  place, dtype, head, length, name, why
):
  found = kernels.choose("auto", place, jnp.dtype(dtype), head, length)
  assert found.name == name and why in found.why
  asked = kernels.choose("fused", place, jnp.dtype(dtype), head, length)
  assert asked.name == "fused"


def test_what_jax_can_not_take_is_not_taken(monkeypatch):
  """There is no cuDNN here, whatever the GPU is said to be."""
  monkeypatch.setattr(kernels, "here", lambda: H100)
  found = kernels.chosen("auto", jnp.dtype("bfloat16"), 64, 128)
  assert found.name == "fused" and "JAX says of cuDNN's: " in found.why
  assert kernels.refusal("xla", "float32", 64, 128) is None
  monkeypatch.setattr(kernels, "refusal", lambda *_: None)
  found = kernels.chosen("auto", jnp.dtype("bfloat16"), 64, 128)
  assert found == Choice("cudnn", "cuDNN's, of bfloat16, heads of 64")


def test_cudnn_by_name_is_refused_in_one_line_where_it_can_not_be(monkeypatch):
  assert kernels.chosen("cudnn", jnp.dtype("bfloat16"), 64, 128).name == "cudnn"
  monkeypatch.setattr(kernels, "here", lambda: H100)
  with pytest.raises(UserError, match="rows of 7 tokens.*nearest valid: auto"):
    kernels.chosen("cudnn", jnp.dtype("bfloat16"), 64, 7)


def test_gpus_have_a_capability_and_tpus_have_none():
  for name in ("a100-40", "a100-80", "h100", "h200"):
    assert kernels._parsed(accelerators.by_name(name).capability) >= (8, 0)
  assert accelerators.by_name("v5e").capability is None
