"""Meshes of any size, and which axes of an array they split."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from mdm_jax.core import sharding
from mdm_jax.core.errors import UserError
from mdm_jax.core.sharding import (
  AXES,
  RULES,
  MeshConfig,
  ShardingRules,
  mesh_sizes,
)
from mdm_jax.model import placement
from mdm_jax.model.config import ModelConfig

SIZE = st.integers(1, 12)


def refusal(function, *args):
  with pytest.raises(UserError) as told:
    function(*args)
  return str(told.value)


# MARK: sizes


@pytest.mark.parametrize(
  "text, sizes",
  [("8", (1, 8, 1)), ("64x4", (1, 64, 4)), ("2X64x4", (2, 64, 4))],
)
def test_a_mesh_is_written_as_its_sizes(text, sizes):
  mesh = sharding.planned_mesh(sharding.parse_mesh(text))
  assert tuple(mesh.shape.items()) == tuple(zip(AXES, sizes, strict=True))


@pytest.mark.parametrize("text", ["", "64x", "4x-1", "1x2x3x4", "four"])
def test_what_is_no_mesh_is_reported(text):
  message = refusal(sharding.parse_mesh, text)
  assert f"mesh {text!r}" in message and "64x4" in message


@given(SIZE, SIZE, SIZE)
def test_one_size_may_be_left_open(replica, fsdp, tensor):
  devices = replica * fsdp * tensor
  for open_axis in ("", *AXES):
    sizes = {"replica": replica, "fsdp": fsdp, "tensor": tensor}
    if open_axis:
      sizes[open_axis] = -1
    found = mesh_sizes(MeshConfig(**sizes), devices)
    assert found == (replica, fsdp, tensor)


@given(SIZE, SIZE, SIZE, st.sampled_from(["", *AXES]), st.integers(1, 64))
def test_every_size_that_is_named_instead_does(
  replica, fsdp, tensor, open_axis, devices
):
  sizes = {"replica": replica, "fsdp": fsdp, "tensor": tensor}
  if open_axis:
    sizes[open_axis] = -1
  try:
    found = mesh_sizes(MeshConfig(**sizes), devices)
  except UserError as error:
    told, _, valid = str(error).partition("nearest valid: ")
    assert f"{devices} device(s)" in told
    if not valid.startswith("mesh.fsdp=-1 and"):
      for change in valid.split(" or "):
        name, _, size = change.removeprefix("mesh.").partition("=")
        mesh_sizes(MeshConfig(**sizes | {name: int(size)}), devices)
  else:
    assert found[0] * found[1] * found[2] == devices


def test_the_arithmetic_is_printed():
  assert refusal(mesh_sizes, MeshConfig(fsdp=3, tensor=2), 8) == (
    "mesh replica=1 x fsdp=3 x tensor=2 does not fit 8 device(s): that is 6;"
    " nearest valid: mesh.fsdp=4"
  )
  assert refusal(mesh_sizes, MeshConfig(fsdp=-1, tensor=3), 8) == (
    "mesh replica=1 x fsdp=-1 x tensor=3 does not fit 8 device(s): 8 / 3 is not"
    " a whole number for mesh.fsdp; nearest valid: mesh.tensor=2 or"
    " mesh.tensor=4"
  )


# MARK: what is split


@pytest.mark.parametrize(
  "model, told",
  [
    (ModelConfig(num_heads=6), "key/value heads=6 does not split over mesh"),
    (ModelConfig(embed_dim=720, num_heads=12), "model.embed_dim=720"),
    (ModelConfig(mlp_dim=2050), "model.mlp_dim=2050"),
  ],
)
def test_a_model_that_does_not_split_is_reported(model, told):
  mesh = sharding.planned_mesh(MeshConfig(fsdp=64, tensor=4))
  message = refusal(placement.check_model, model, mesh)
  assert told in message and "nearest valid: mesh." in message


def test_the_nearest_mesh_is_named():
  mesh = sharding.planned_mesh(MeshConfig(fsdp=8, tensor=5))
  message = refusal(placement.check_model, ModelConfig(), mesh)
  assert (
    "12 / 5 = 2.4; nearest valid: mesh.tensor=4 or mesh.tensor=6" in message
  )
  mesh = sharding.planned_mesh(MeshConfig(fsdp=8, tensor=3))
  message = refusal(placement.check_vocabulary, 8320, mesh)
  assert "ids=8320" in message and "mesh.tensor=2 or mesh.tensor=4" in message


def test_an_axis_splits_one_of_an_arrays():
  rules = ShardingRules(mlp="fsdp")
  with pytest.raises(ValueError, match="embed and mlp .* 'fsdp'"):
    rules.spec("embed", "mlp")
  assert rules.spec("mlp", None) == P("fsdp", None)


def test_an_axis_that_is_taken_is_left_out():
  mesh = sharding.planned_mesh(MeshConfig(fsdp=2, tensor=2))
  seen = []

  def inside(x):
    seen.append(RULES.spec("batch", "vocab"))
    return x

  with jax.sharding.use_abstract_mesh(mesh):
    for taken in ({"replica", "fsdp"}, set(AXES)):
      run = jax.shard_map(inside, in_specs=P(), out_specs=P(), axis_names=taken)
      jax.eval_shape(run, jax.ShapeDtypeStruct((4,), "float32"))
  assert seen == [P(None, "tensor"), P(None, None)]


def test_gathering_keeps_the_tensor_axis():
  assert sharding.gathered(P("tensor", "fsdp")) == P("tensor", None)
  assert sharding.gathered(P(("replica", "fsdp"), None)) == P(None, None)


@pytest.mark.parametrize("spec", [P("tensor", "fsdp"), P("fsdp"), P(None)])
def test_shards_are_added_up_over_replicas_and_fsdp(spec):
  """Each of 2 x 2 data shards has its own array, and gets a part of the sum."""
  mesh = jax.make_mesh((2, 2, 2), AXES)
  values = np.random.default_rng(0).normal(size=(4, 8, 6)[: len(spec) + 1])
  values = values.astype(np.float32)
  whole = P(("replica", "fsdp"), *sharding.gathered(spec))

  def add(values):
    return sharding.sum_over_shards(values[0], spec)

  with jax.set_mesh(mesh):
    run = jax.shard_map(add, in_specs=whole, out_specs=spec)
    placed = jax.device_put(values, jax.NamedSharding(mesh, whole))
    np.testing.assert_allclose(
      jax.jit(run)(placed), values.sum(axis=0), rtol=1e-6, atol=1e-6
    )
