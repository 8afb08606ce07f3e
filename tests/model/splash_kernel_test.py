"""Splash attention: the reference's results, run step by step on a CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mesh_harness import make_mesh

from mdm_jax.core import rng
from mdm_jax.core.errors import UserError
from mdm_jax.core.hardware import Place
from mdm_jax.model import kernel_choice, placement, splash_kernel
from mdm_jax.model.config import ModelConfig
from mdm_jax.model.context import FULL, Visibility, row_context
from mdm_jax.model.kernels import KERNELS, Case

TPU = Place("tpu")
ROWS, LENGTH = 8, 256
# One text; two and padding; three, of which one is a single token; padding.
TEXTS = [256], [100, 105], [70, 1, 129], []


@pytest.fixture(autouse=True)
def step_by_step(monkeypatch):
  """Lets Pallas run the kernel without a TPU, in two blocks a side."""
  library = splash_kernel._library()
  make = functools.partial(library.make_splash_mha, interpret=True)
  monkeypatch.setattr(library, "make_splash_mha", make)
  monkeypatch.setattr(splash_kernel, "_BLOCK", 128)
  # JAX's code promotes.
  with jax.numpy_dtype_promotion("standard"):
    yield


def split(*axes):
  return jax.P(("replica", "fsdp"), *axes)


def segments():
  rows = np.zeros((ROWS, LENGTH), np.int32)
  for row, lengths in zip(rows, TEXTS * 2, strict=True):
    numbers = np.arange(1, len(lengths) + 1)
    row[: sum(lengths)] = np.repeat(numbers, lengths)
  return jax.device_put(rows, split())


def results(name, visibility):
  """Returns an output and the gradients of query, key and value."""
  heads = {"q": (2, 2), "k": (2,), "v": (2,), "g": (2, 2)}
  draw = lambda name, n: jax.reshard(
    jax.random.normal(rng.stream(0, name), (ROWS, *n, LENGTH, 8)),
    split("tensor", *[None] * (len(n) + 1)),
  )
  kernel = KERNELS[name]()

  @jax.jit
  def run(segments):
    context = row_context(segments, visibility=visibility, most_segments=3)
    side = context.side
    *arrays, cotangent = (draw(name, n) for name, n in heads.items())
    prepared = kernel.prepare(visibility, side, side)
    attend = lambda *arrays: kernel.attend(*arrays, prepared)
    mixed, gradient = jax.vjp(attend, *arrays)
    return mixed, *gradient(cotangent)

  return run(segments())


KINDS = [("1x1", k) for k in ("full", "causal", "blocks", "noisy")]


@pytest.mark.parametrize("shape, kind", [*KINDS, ("4x2", "blocks")])
def test_it_is_the_reference(shape, kind):
  visibility = Visibility(kind, 7)
  with jax.set_mesh(make_mesh(shape)):
    got, want = (results(n, visibility) for n in ("splash", "reference"))
  for one, other in zip(got, want, strict=True):
    assert one.sharding.spec == other.sharding.spec
    np.testing.assert_allclose(one, other, atol=2e-5)


def test_a_block_of_the_whole_row_is_full_visibility():
  side = row_context(jnp.ones((1, 6), int), visibility=FULL).side
  prepare = splash_kernel.Splash().prepare
  assert prepare(Visibility("blocks", 6), side, side).ahead is None
  assert prepare(Visibility("blocks", 5), side, side).ahead == 4


def test_a_tokens_block_ends_where_its_text_does():
  ids, visibility = (
    np.array([[1] * 5 + [2] * 2 + [0] * 3]),
    Visibility("blocks", 3),
  )

  @jax.jit
  def last():
    side = row_context(jnp.asarray(ids), visibility=visibility).side
    return splash_kernel.Splash().prepare(visibility, side, side).last

  np.testing.assert_array_equal(last(), [[2, 2, 2, 4, 4, 6, 6, 9, 9, 9]])


@pytest.mark.parametrize(
  "changed, lacking",
  [
    ({}, None),
    ({"visibility": Visibility("causal"), "most_segments": 4}, None),
    ({"visibility": Visibility("noisy")}, None),
    ({"dtype": "float16"}, "float16"),
    ({"head": 96}, "heads of 96, only of 64"),
    ({"queries": 64, "keys": 64}, "rows of 64 tokens, only multiples of 128"),
    ({"keys": 256}, "cache of keys"),
    ({"visibility": Visibility("dual")}, "visibility dual"),
    ({"visibility": Visibility("blocks")}, "any number of texts"),
  ],
)
def test_what_it_lacks_is_named(changed, lacking):
  case = Case(
    **{"dtype": "bfloat16", "head": 64, "queries": 128, "keys": 128} | changed
  )
  found = splash_kernel.Splash().lacks(case, TPU)
  assert found == lacking or lacking in found


def test_where_jax_has_it_not_another_is_taken(monkeypatch):
  monkeypatch.setattr(splash_kernel, "_library", lambda: None)
  found = kernel_choice.choose("auto", TPU, Case("bfloat16", 64, 128, 128))
  told = "XLA's own: splash attention has no module in this version of JAX"
  assert (found.name, found.why) == ("xla", told)


def test_a_plan_may_name_it_on_any_machine():
  plan = jax.sharding.AbstractMesh((1,), ("a",))
  with jax.sharding.use_abstract_mesh(plan):
    found = kernel_choice.chosen("splash", Case("bfloat16", 64, 128, 128))
  assert found.name == "splash"


def test_by_name_it_needs_a_tpu(mesh):
  with pytest.raises(UserError) as caught:
    placement.check_model(ModelConfig(attention="splash"), mesh)
  told = (
    "model.attention=splash needs a TPU, this is a cpu; nearest valid: auto"
  )
  assert str(caught.value) == told
